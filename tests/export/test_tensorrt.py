"""Real parsing and building with TensorRT-RTX, which needs no GPU for either."""

from __future__ import annotations

import _thread
import json
import shutil
import signal

import pytest
import tiny

from retnet_export.export.tensorrt import CompileOptions, compile_bundle
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import Bundle, open_bundle
from retnet_export.runtime.bundle.engines import FOLDER, find_engine, map_engine, read_engines
from retnet_export.runtime.bundle.seal import sealed
from retnet_export.runtime.errors import UserError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
GPUS = ("8.6", "8.9", "12.0")


def rtx(**options: object) -> CompileOptions:
    return CompileOptions(target="tensorrt-rtx", compute_capabilities=options.pop("compute_capabilities", GPUS), **options)


@pytest.fixture
def bundle(tmp_path):
    return tiny.bundle(tmp_path, tiny.CONFIGS["fla"])


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_both_graphs_of_every_family_build_for_three_gpus(tmp_path, family):
    record = compile_bundle(tiny.bundle(tmp_path, tiny.CONFIGS[family]), rtx())
    assert record.compute_capabilities == GPUS
    assert [part.role for part in record.parts] == ["decode", "prefill", "prefill"]


@pytest.mark.parametrize(("precision", "max_batch"), [("fp32", 1), ("fp16", 8)])
def test_one_engine_for_decode_and_prefill_holds_the_weights_once(tmp_path, precision, max_batch):
    model = tiny.config(vocab_size=4096, hidden_size=256, ffn_size=512)
    bundle = tiny.bundle(tmp_path, model, precision=precision)
    record = compile_bundle(bundle, rtx(compute_capabilities=("8.6",), max_batch=max_batch))
    assert len(record.files) == 1
    assert record.weights_bytes == pytest.approx(bundle.manifest.weights_bytes, rel=0.02)


def test_weights_that_were_cut_stay_cut_in_the_engine_and_are_there_once(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config(hidden_size=512, vocab_size=4096), precision="fp16")
    whole, cut = (
        compile_bundle(bundle, rtx(compute_capabilities=("8.6",), largest_weight_mb=largest, candidates=0)) for largest in (None, 1)
    )
    steps = [record.anatomy_of("decode") for record in (whole, cut)]
    assert steps[0].kernels + 3 <= steps[1].kernels <= steps[0].kernels + 4  # the head, 4 MB, is four products
    assert steps[1].bytes < 1.1 * steps[0].bytes
    assert cut.weights_bytes < 1.1 * whole.weights_bytes


def test_separate_engines_hold_the_weights_twice(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config(vocab_size=4096, hidden_size=256, ffn_size=512))
    record = compile_bundle(bundle, rtx(compute_capabilities=("8.6",), form="separate"))
    assert [part.graph for part in record.parts] == ["decode", "prefill", "prefill"]
    assert record.weights_bytes == pytest.approx(2 * bundle.manifest.weights_bytes, rel=0.02)


def test_a_bundle_of_fixed_batch_builds_for_that_batch(tmp_path):
    record = compile_bundle(tiny.bundle(tmp_path, tiny.CONFIGS["fla"], batch=3), rtx())
    assert record.max_batch == 3


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_bundles_build_for_three_gpus_and_stay_small(tmp_path, weights, tied):
    model = tiny.config(vocab_size=2048, hidden_size=256, ffn_size=512, head_value_dim=32, tied_embeddings=tied)
    source = tiny.bundle(tmp_path, model, precision="fp16")
    bundle = quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions(weights=weights))
    record = compile_bundle(bundle, rtx())
    assert record.weights_bytes < 0.8 * source.manifest.weights_bytes


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    bundle = tiny.bundle(tmp_path_factory.mktemp("built"), tiny.CONFIGS["fla"])
    return bundle, compile_bundle(bundle, rtx())


@pytest.fixture
def compiled(built_once, tmp_path):
    """A compiled bundle of one's own."""
    bundle, record = built_once
    return open_bundle(shutil.copytree(bundle.path, tmp_path / "compiled.retnet")), record


def test_an_engine_is_found_by_target_version_and_gpu(compiled):
    bundle, record = compiled
    assert find_engine(bundle, "tensorrt-rtx", record.version, "8.9") == record
    assert len(map_engine(bundle, record, record.parts[0].file)) == next(iter(record.files.values())).bytes
    for version, capability in ((record.version, "8.0"), ("1.0.0.0", "8.9")):
        with pytest.raises(UserError, match=rf"no engine for tensorrt-rtx {version} on compute capability {capability}"):
            find_engine(bundle, "tensorrt-rtx", version, capability)


def test_an_engine_of_other_weights_is_refused(tmp_path, compiled):
    bundle, record = compiled
    other = tiny.bundle(tmp_path / "other", tiny.CONFIGS["fla"], precision="fp16")
    shutil.copytree(bundle.path / FOLDER, other.path / FOLDER)
    with pytest.raises(UserError, match="built from other graphs or weights than the bundle has now; compile again"):
        find_engine(other, "tensorrt-rtx", record.version, "8.6")


def test_a_damaged_engine_is_refused(compiled):
    bundle, record = compiled
    name = record.parts[0].file
    path = bundle.path / FOLDER / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match its record"):
        map_engine(bundle, record, name)


def test_a_compiled_bundle_is_as_whole_as_before(built_once, compiled):
    assert compiled[0].manifest == built_once[0].manifest


def test_progress_moves_forward_and_names_the_phase(bundle):
    seen: list[tuple[str, float]] = []
    compile_bundle(bundle, rtx(), progress=lambda stage, share: seen.append((stage, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len({stage for stage, _ in seen}) > 3


@pytest.fixture
def heeds_ctrl_c():
    """A process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_cancels_the_build_and_leaves_nothing(bundle):
    interrupted = False

    def interrupt(stage: str, share: float) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        compile_bundle(bundle, rtx(), progress=interrupt)
    assert not (bundle.path / FOLDER).exists()


def test_a_node_that_tensorrt_does_not_know_is_named(bundle):
    with_foreign_node(bundle)
    with pytest.raises(UserError, match=r"node prefill\.layers\.0\.foreign \(LinearAttention\).*export the checkpoint again"):
        compile_bundle(bundle, rtx())


def with_foreign_node(bundle: Bundle) -> None:
    """Put an operator of ONNX Runtime's into the prefill graph."""
    import onnx

    path = bundle.path / "prefill.onnx"
    model = onnx.load(path, load_external_data=False)
    logits = next(node for node in model.graph.node if "logits" in node.output)
    logits.output[list(logits.output).index("logits")] = "inner"
    node = onnx.helper.make_node("LinearAttention", ["inner"], ["logits"], name="layers.0.foreign", domain="com.microsoft")
    model.graph.node.append(node)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": "tensorrt-rtx", "compute_capabilities": ("8.7",)},
            "need target=tensorrt on the device",
        ),
        ({"target": "tensorrt-rtx", "compute_capabilities": ("3.5",)}, r"builds for 7\.5, 8\.0, 8\.6"),
        ({"target": "tensorrt", "compute_capabilities": ("8.6",)}, "builds for the GPU of the machine it runs on"),
        ({"target": "openvino"}, "expected tensorrt or tensorrt-rtx"),
        ({"target": "tensorrt-rtx", "timing_cache": "cache"}, "does not measure kernels when it builds"),
        ({"max_batch": 0}, "max_batch is 0, expected at least 1"),
        ({"workspace_mb": 0}, "workspace_mb is 0, expected at least 1"),
        ({"largest_weight_mb": 0}, "largest_weight_mb is 0, expected at least 1"),
        ({"candidates": 4000}, "expected 0 to 3840"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CompileOptions(**options)


def test_bfloat16_is_refused_on_a_gpu_without_it(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.CONFIGS["fla"], precision="bf16")
    with pytest.raises(UserError, match=r"bfloat16 need compute capability 8\.0 or later, this is for 7\.5.*precision=fp16"):
        compile_bundle(bundle, rtx(compute_capabilities=("7.5",)))


def test_a_record_that_is_no_json_is_named(bundle):
    (bundle.path / FOLDER).mkdir()
    (bundle.path / FOLDER / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json: not valid JSON"):
        read_engines(bundle)


def test_a_flipped_bit_of_a_record_is_noticed(compiled):
    bundle, record = compiled
    path = bundle.path / FOLDER / f"{record.stem}.json"
    content = path.read_bytes()
    for place in range(0, len(content), 41):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match=record.stem):
            read_engines(bundle)
    path.write_bytes(content)


def test_a_record_cannot_name_files_outside_its_folder(compiled):
    bundle, record = compiled
    path = bundle.path / FOLDER / f"{record.stem}.json"
    document = json.loads(json.dumps(json.loads(path.read_text())).replace(record.parts[0].file, "../weights.bin"))
    path.write_bytes(sealed({name: value for name, value in document.items() if name != "sha256"}))
    with pytest.raises(UserError, match="its engines and their files do not match"):
        read_engines(bundle)


def test_compile_inspect_and_plan_say_what_a_step_does(tmp_path):
    from typer.testing import CliRunner

    from retnet_export.cli import app

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    bundle = tiny.bundle(tmp_path, tiny.config(), chunk=8)
    plain = json.loads(run("plan", bundle.path, "--device", "agx-orin-64gb", "--json"))
    compiled = run("compile", bundle.path, "--target", "tensorrt-rtx", "--compute-capability", "8.6")
    inspected = run("inspect", bundle.path)
    counted = json.loads(run("plan", bundle.path, "--device", "agx-orin-64gb", "--json"))
    step = read_engines(bundle)[0].anatomy_of("decode")
    for output in (compiled, inspected):
        assert f"{step.kernels}, {step.kernels_per_layer:.1f} a layer" in output
        assert "a step, one sequence" in output
        assert "a chunk of 8 tokens, one sequence" in output
    assert "over one copy of the weights" in compiled
    assert json.loads(run("inspect", bundle.path, "--json"))["engines"][0]["anatomy"][0]["kernels"] == step.kernels
    assert plain["devices"][0]["kernels_per_step"] is None
    assert counted["devices"][0]["kernels_per_step"] == step.kernels
    assert counted["devices"][0]["bytes_per_step"] == step.bytes
