"""The model repository: as Triton's own definitions read it, as its rules pair the state, and on the real server."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny
import triton_server
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.model import load
from retnet_export.serve.triton import TritonOptions, check_pairs, write_repository

NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}


def config_of(path: Path):
    """config.pbtxt as Triton reads it."""
    pytest.importorskip("tritonclient.grpc", reason="tritonclient, which has Triton's definitions, is not installed")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.mark.parametrize(
    "options",
    [TritonOptions(), TritonOptions("other", instances=2, max_batch=32, gpus=(0, 1), platform="tensorrt")],
    ids=["cpu", "gpus"],
)
def test_both_configurations_are_valid_and_say_what_was_asked(example_bundle, tmp_path, options):
    write_repository(example_bundle, tmp_path / "models", options)
    name = options.name or "classics"
    text, step = config_of(tmp_path / "models" / name), config_of(tmp_path / "models" / f"{name}_step")
    assert (text.name, text.backend, text.model_transaction_policy.decoupled) == (name, "python", True)
    assert text.parameters["max_batch"].string_value == str(options.max_batch)
    assert step.max_batch_size == options.max_batch
    assert (step.backend, step.platform) == (("onnxruntime", "") if options.platform == "onnxruntime" else ("", "tensorrt_plan"))
    for config in (text, step):
        (group,) = config.instance_group
        assert (group.count, tuple(group.gpus)) == (options.instances, options.gpus)
        assert group.kind == (group.KIND_GPU if options.gpus else group.KIND_CPU)
    assert len(step.sequence_batching.state) == len(example_bundle.manifest.state)
    assert load(tmp_path / "models" / name / "1" / "bundle.retnet").bundle.manifest == example_bundle.manifest


class ImplicitState:
    """Triton's rules for one model, over ONNX Runtime.

    State inputs and outputs are each sorted by name and paired by place; a sequence begins with the initial state; a batch takes
    requests of several sequences.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.config = config_of(folder)
        from tritonclient.grpc import model_config_pb2

        self.session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        state = self.config.sequence_batching.state
        self.pairs = list(zip(sorted(each.input_name for each in state), sorted(each.output_name for each in state), strict=True))
        self.initial = {}
        for each in state:
            (initial,) = each.initial_state
            assert initial.zero_data
            assert (list(initial.dims), initial.data_type) == (list(each.dims), each.data_type)
            dtype = NUMPY[model_config_pb2.DataType.Name(each.data_type)]
            self.initial[each.input_name] = np.zeros((1, *each.dims), dtype)
        self.sequences = {}

    def infer(self, requests: dict[int, int]) -> dict[int, np.ndarray]:
        """A token for each sequence, by its id; logits."""
        assert len(requests) <= self.config.max_batch_size
        states = [self.sequences.get(sequence, self.initial) for sequence in requests]
        feed = {name: np.concatenate([state[name] for state in states]) for name in self.initial}
        feed["tokens"] = np.array(list(requests.values()), np.int64)[:, None]
        names = ["logits", *(output for _, output in self.pairs)]
        results = dict(zip(names, self.session.run(names, feed), strict=True))
        for row, sequence in enumerate(requests):
            self.sequences[sequence] = {name: results[output][row : row + 1] for name, output in self.pairs}
        return {sequence: results["logits"][row] for row, sequence in enumerate(requests)}


def test_a_step_whose_state_triton_keeps_gives_the_logits_of_the_runtime(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config(num_layers=12))
    write_repository(bundle, tmp_path / "models", TritonOptions(max_batch=3))
    triton, model = ImplicitState(tmp_path / "models" / "tiny_step"), load(bundle.path, "onnxruntime", threads=1)
    generator, sessions = np.random.default_rng(0), {}
    for _ in range(12):
        chosen = generator.choice(4, generator.integers(1, 4), replace=False)
        requests = {int(sequence): int(generator.integers(0, 50)) for sequence in chosen}
        for sequence, logits in triton.infer(requests).items():
            session = sessions.setdefault(sequence, model.session())
            # Twelve layers of rounding in float32; states that changed places would differ by about 1.
            np.testing.assert_allclose(logits, session.step([requests[sequence]])[0], atol=1e-3)


def test_names_that_triton_would_mix_up_are_refused(example_bundle):
    from dataclasses import replace

    state = [replace(example_bundle.manifest.state[-1], input=f"state.{i}", output=f"state.{i}_out") for i in range(11)]
    check_pairs(state[:10])
    with pytest.raises(UserError, match="do not sort alike"):
        check_pairs(state)


def test_the_command_writes_a_repository_and_replaces_no_other_folder(example_bundle, tmp_path):
    target = tmp_path / "models"
    arguments = ["triton", str(example_bundle.path), "-o", str(target)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "exists already" in CliRunner().invoke(app, arguments).output
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    (target / ".retnet-export-triton").unlink()
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 1
    assert "GPU" not in (target / "README.md").read_text()


real = pytest.mark.skipif(triton_server.missing() is not None, reason=triton_server.missing() or "")


@pytest.fixture(scope="module")
def repository(example_bundle, tmp_path_factory):
    """With a copy of the package beside the model, as if it were installed for Triton's Python."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    write_repository(example_bundle, folder, TritonOptions(max_batch=8))
    shutil.copytree(folder / "classics", folder / "damaged")
    config = folder / "damaged" / "config.pbtxt"
    config.write_text(config.read_text().replace('"classics"', '"damaged"'))
    weights = folder / "damaged" / "1" / "bundle.retnet" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    for name in ("classics", "damaged"):
        (folder / name / "1" / "retnet_export").symlink_to(Path(__file__).resolve().parent.parent.parent)
    return folder


@pytest.fixture(scope="module")
def triton(repository, tmp_path_factory):
    with triton_server.triton(repository, tmp_path_factory.mktemp("scratch"), "classics") as server:
        yield server


@contextlib.contextmanager
def client(triton):
    grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    with grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as one:
        answers = queue.Queue()
        one.start_stream(lambda result, error: answers.put((result, error)))
        try:
            yield one, answers
        finally:
            one.stop_stream(cancel_requests=True)


def ask(one, request_id: str, text: str, **parameters) -> None:
    from tritonclient.grpc import InferInput

    prompt = InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([text.encode()], object))
    one.async_stream_infer("classics", [prompt], request_id=request_id, parameters=parameters, enable_empty_final_response=True)


def collect(answers, count: int = 1) -> dict[str, str]:
    """Texts by request, once all are final."""
    texts: dict[str, str] = {}
    final = 0
    while final < count:
        result, error = answers.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        if response.parameters["triton_final_response"].bool_param:
            final += 1
        else:
            texts[response.id] = texts.get(response.id, "") + result.as_numpy("text")[0].decode()
    return texts


@real
def test_grpc_and_http_stream_what_generate_gives_for_the_same_seed(triton, writer):
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    expected = "".join(writer.generate("In the beginning", Options(max_new_tokens=20, **options)))
    given = {"max_tokens": 20, "temperature": "0.8", "top_p": "0.9", "seed": 7}
    with client(triton) as (one, answers):
        ask(one, "a", "In the beginning", **given)
        assert collect(answers) == {"a": expected}
    body = {"prompt": "In the beginning", "parameters": given}
    with httpx.stream("POST", f"{triton.url}/models/classics/generate_stream", json=body, timeout=60) as answer:
        pieces = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert "".join(piece["text"] for piece in pieces) == expected
    assert pieces[-1]["finish_reason"] == "length"
    ids = {"tokens": writer.tokenizer.encode("In the beginning"), "parameters": {"max_tokens": 3, "temperature": 0}}
    answer = httpx.post(f"{triton.url}/models/classics/generate_stream", json=ids, timeout=60).text
    assert len(answer.split("\n\n")) == 5


@real
def test_thirty_two_sequences_at_once_get_a_text_each(triton, writer):
    with client(triton) as (one, answers):
        for seed in range(32):
            ask(one, str(seed), "Once upon a time", max_tokens=10 + seed % 7, seed=seed)
        texts = collect(answers, 32)
    for seed in range(32):
        assert texts[str(seed)] == "".join(writer.generate("Once upon a time", Options(max_new_tokens=10 + seed % 7, seed=seed)))


@real
def test_a_client_that_goes_away_frees_its_slots(triton):
    with client(triton) as (one, answers):
        for number in range(8):
            ask(one, str(number), "On and on", max_tokens=4096, ignore_eos=True)
        for _ in range(8):
            assert answers.get(timeout=60)[1] is None
    # All slots were taken for some seconds; the next one comes at once.
    began = time.perf_counter()
    with client(triton) as (one, answers):
        ask(one, "next", "Hello", max_tokens=2)
        collect(answers)
    assert time.perf_counter() - began < 3


@real
def test_what_is_wrong_is_said(triton):
    for body, message in [
        ({"prompt": "x", "parameters": {"temperature": "hot"}}, "temperature: Input should be a valid number"),
        ({"prompt": "x", "parameters": {"max_tokens": 100000}}, "this server generates at most 4096"),
        ({"tokens": [99999]}, "token 99999 is not in the vocabulary"),
    ]:
        answer = httpx.post(f"{triton.url}/models/classics/generate_stream", json=body, timeout=60)
        assert message in answer.text, answer.text


@real
def test_a_damaged_bundle_does_not_load_and_the_log_says_why(triton):
    answer = httpx.post(f"{triton.url.removesuffix('/v2')}/v2/repository/models/damaged/load", json={}, timeout=60)
    assert answer.status_code == 400
    assert "weights.bin" in triton.log
    assert "damaged" in triton.log


@real
def test_a_model_is_unloaded_and_loaded_again(triton):
    base = f"{triton.url}/repository/models/classics"
    assert httpx.post(f"{base}/unload", json={}, timeout=60).status_code == 200
    deadline = time.monotonic() + 30
    while httpx.get(f"{triton.url}/models/classics/ready").status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert httpx.get(f"{triton.url}/models/classics/ready").status_code != 200
    assert httpx.post(f"{base}/load", json={}, timeout=60).status_code == 200
    with client(triton) as (one, answers):
        ask(one, "again", "Hello", max_tokens=3)
        assert collect(answers)["again"]
