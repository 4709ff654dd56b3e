"""The TensorRT backend on the strict double: bindings, buffers, graphs and copies are real, the arithmetic is ONNX Runtime's."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tensorrt_double
import tiny
from cuda_double import Misuse
from tensorrt_double import CONTEXTS, addresses_of, profile_of

from retnet_export.export.tensorrt import CompileOptions, compile_bundle
from retnet_export.plan.preflight import needed_bytes
from retnet_export.plan.sizes import sizes_of_bundle
from retnet_export.runtime.backends import open_backend
from retnet_export.runtime.backends.base import initial_state
from retnet_export.runtime.backends.tensorrt_api import load_module
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import FOLDER, Probe
from retnet_export.runtime.device import cuda as device_cuda
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import TOLERANCES, measure

RELEASES = tuple(tensorrt_double.RELEASES)
TOKENS = np.random.default_rng(1).integers(0, 50, (3, 24), dtype=np.int64)
SAME = TOLERANCES["chunkwise-float32"].relative


@pytest.fixture
def cuda(monkeypatch):
    yield tensorrt_double.install(monkeypatch)
    gc.collect()  # buffers return to the double that they came from


def compiled(folder, cuda, *, options=None, **changes):
    bundle = tiny.bundle(folder, tiny.config(**changes), chunk=8)
    compile_bundle(bundle, options or CompileOptions(max_batch=3, candidates=5))
    return bundle


@pytest.fixture
def bundle(tmp_path, cuda):
    return compiled(tmp_path, cuda)


def follow(runner, tokens):
    """Logits after each of a batch's tokens (B, T)."""
    logits = []
    for column in tokens.T:
        runner.step(column)
        logits.append(runner.logits().copy())
    return np.array(logits)


@pytest.mark.parametrize("release", RELEASES)
def test_steps_and_chunks_give_what_onnx_runtime_gives_on_every_release(tmp_path, monkeypatch, release):
    capability = (8, 6) if "rtx" in release else (8, 7)
    tensorrt_double.install(monkeypatch, release, capability)
    target = release.split()[0]
    bundle = compiled(tmp_path, None, options=CompileOptions(target=target, max_batch=3))
    ours, reference = (open_backend(name, bundle).open_runner(3) for name in (target, "onnxruntime"))
    for runner in (ours, reference):
        runner.prefill(TOKENS[:, :8], np.array([8, 3, 0]))
        runner.prefill(TOKENS[:, 8:13], np.array([5, 1, 2]))
    assert measure(ours.logits(), reference.logits()).relative < SAME
    assert measure(follow(ours, TOKENS[:, 13:]), follow(reference, TOKENS[:, 13:])).relative < SAME
    for slot in range(3):
        for name, value in reference.read_state(slot).items():
            np.testing.assert_allclose(ours.read_state(slot)[name], value, atol=1e-4)
    gc.collect()


@pytest.mark.parametrize("candidates", [0, 5])
def test_scores_are_those_of_onnx_runtime_and_drafts_leave_no_trace(tmp_path, cuda, candidates):
    bundle = compiled(tmp_path, cuda, options=CompileOptions(max_batch=3, candidates=candidates))
    ours, reference = (open_backend(name, bundle).open_runner(3) for name in ("tensorrt", "onnxruntime"))
    chunks = (
        (TOKENS[:, :8], np.array([8, 3, 0]), np.array([[0, 7, 3], [2, 4, 1], [0, 1, 2]])),
        (TOKENS[:, 8:13], np.array([1, 0, 5]), np.array([[4], [4], [0]])),
        (TOKENS[:, 8:14], np.array([2, 2, 2]), np.tile(np.arange(6), (3, 1))),
    )
    for chunk in chunks:
        assert measure(ours.score(*chunk), reference.score(*chunk)).relative < SAME
    for runner in (ours, reference):
        runner.step(TOKENS[:, 14])
    assert measure(ours.logits(), reference.logits()).relative < SAME
    np.testing.assert_array_equal(ours.top(3)[0], reference.top(3)[0])
    for slot, taken in enumerate((12, 6, 8)):
        assert ours.read_state(slot)["position"] == taken
    for runner in (ours, reference):
        runner.score_on_trial(*chunks[0])
        runner.undo()
        runner.step(TOKENS[:, 13])
    assert measure(ours.logits(), reference.logits()).relative < SAME
    assert ours.read_state(0)["position"] == 13


def test_auto_takes_the_engine_that_was_compiled_for_this_gpu(bundle):
    assert open_backend("auto", bundle).name == "tensorrt"
    assert open_backend("auto", bundle, threads=1).name == "onnxruntime"


def test_auto_passes_over_an_engine_of_another_gpu(tmp_path, monkeypatch):
    tensorrt_double.install(monkeypatch, RELEASES[0], (8, 7))
    bundle = compiled(tmp_path, None)
    tensorrt_double.install(monkeypatch, RELEASES[0], (9, 0))
    assert open_backend("auto", bundle).name == "onnxruntime"
    gc.collect()


@pytest.mark.parametrize("form", [None, "prefill", "separate"])
@pytest.mark.parametrize("batch", [None, 3])
def test_every_form_of_engines_and_fixed_batches_run_alike(tmp_path, cuda, form, batch):
    bundle = tiny.bundle(tmp_path, tiny.config(), chunk=8, batch=batch)
    record = compile_bundle(bundle, CompileOptions(max_batch=3, form=form))
    assert record.form == (form or ("joined" if batch is None else "prefill"))
    ours, reference = (open_backend(name, bundle).open_runner(3) for name in ("tensorrt", "onnxruntime"))
    for runner in (ours, reference):
        runner.prefill(TOKENS[:, :8], np.array([8, 8, 8]))
    assert measure(follow(ours, TOKENS[:, 8:12]), follow(reference, TOKENS[:, 8:12])).relative < SAME


def test_each_direction_runs_once_and_is_then_a_graph(bundle, cuda):
    runner = open_backend("tensorrt", bundle).open_runner(1)
    for count, launches in ((1, 0), (2, 0), (3, 1), (4, 2), (10, 8)):
        while steps_read(runner) < count:
            runner.step(TOKENS[:1, 0])
        assert cuda.launches == launches


def steps_read(runner) -> int:
    """Steps taken so far, from the position in the state."""
    return int(runner.read_state(0)["position"][0])


def test_a_step_waits_once_and_copies_only_the_candidates(bundle, cuda):
    runner = open_backend("tensorrt", bundle).open_runner(2)
    for column in TOKENS[:2, :6].T:
        runner.step(column)
        runner.top(5)
    waited, copied = cuda.synchronizations, cuda.copied_to_host
    for column in TOKENS[:2, 6:10].T:
        runner.step(column)
        runner.top(1)
        runner.top(5)
    assert cuda.synchronizations - waited == 4
    assert cuda.copied_to_host - copied == 4 * 2 * 5 * (4 + 4)


def test_candidates_are_the_largest_logits_in_order_and_more_are_taken_from_the_logits(bundle):
    ours, reference = (open_backend(name, bundle).open_runner(3) for name in ("tensorrt", "onnxruntime"))
    for column in TOKENS.T:
        for runner in (ours, reference):
            runner.step(column)
        for k in (1, 5, 6, 50):
            tokens, logits = ours.top(k)
            expected_tokens, expected_logits = reference.top(k)
            np.testing.assert_array_equal(tokens, expected_tokens)
            assert measure(logits, expected_logits).maximum < 1e-4


def test_equal_logits_come_in_the_order_of_their_tokens(tmp_path, cuda):
    from random_weights import random_weights

    model = tiny.config()
    weights = dict(random_weights(model))
    weights["head.weight"] = np.zeros_like(weights["head.weight"])
    bundle = tiny.bundle(tmp_path, model, weights, chunk=8)
    compile_bundle(bundle, CompileOptions(candidates=50))
    runner = open_backend("tensorrt", bundle).open_runner(1)
    runner.step(TOKENS[:1, 0])
    assert runner.top(3)[0].tolist() == [[0, 1, 2]]


def test_without_candidates_the_logits_cross_instead(tmp_path, cuda):
    bundle = compiled(tmp_path, cuda, options=CompileOptions(candidates=0))
    runner = open_backend("tensorrt", bundle).open_runner(1)
    runner.step(TOKENS[:1, 0])
    assert runner.top(2)[0][0, 0] == runner.logits().argmax()


def test_a_state_that_was_read_can_be_written_into_another_slot(bundle):
    runner = open_backend("tensorrt", bundle).open_runner(3)
    follow(runner, TOKENS[:, :5])
    saved = runner.read_state(1)
    expected = follow(runner, TOKENS[[1, 1, 1], 5:9])[:, 1]
    runner.write_state(2, saved)
    actual = follow(runner, TOKENS[[0, 0, 1], 5:9])[:, 2]
    assert measure(actual, expected).maximum == 0


def test_runners_of_one_backend_do_not_disturb_each_other(bundle):
    backend = open_backend("tensorrt", bundle)
    alone = follow(backend.open_runner(1), TOKENS[:1])
    first, second = backend.open_runner(1), backend.open_runner(2)
    together = []
    for index, column in enumerate(TOKENS.T):
        first.step(column[:1])
        second.step(column[1:])
        if index == 3:
            second.prefill(TOKENS[1:, :4], np.array([4, 2]))
        together.append(first.logits().copy())
    assert measure(np.array(together), alone).maximum == 0


def test_logits_stay_valid_until_the_next_step(bundle):
    runner = open_backend("tensorrt", bundle).open_runner(1)
    runner.step(TOKENS[:1, 0])
    first = runner.logits()
    kept = first.copy()
    runner.top(2)
    np.testing.assert_array_equal(runner.logits(), kept)
    np.testing.assert_array_equal(first, kept)


def test_where_nothing_can_be_captured_steps_are_enqueued_with_a_warning(bundle, cuda):
    cuda.refuse_capture = True
    runner, reference = (open_backend(name, bundle).open_runner(1) for name in ("tensorrt", "onnxruntime"))
    with pytest.warns(
        RuntimeWarning, match="CUDA graphs do not work here, so each step starts kernel by kernel: cudaStreamEndCapture"
    ):
        actual = follow(runner, TOKENS[:1, :4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        actual = np.concatenate([actual, follow(runner, TOKENS[:1, 4:8])])
    assert measure(actual, follow(reference, TOKENS[:1, :8])).relative < SAME
    assert cuda.launches == 0


def test_all_device_memory_comes_back(bundle, cuda):
    before = len(cuda.device)
    backend = open_backend("tensorrt", bundle)
    runner = backend.open_runner(3)
    follow(runner, TOKENS[:, :6])
    del runner, backend
    gc.collect()
    assert (len(cuda.device), len(cuda.host), len(cuda.graphs)) == (before, 0, 0)


def test_a_batch_that_the_engine_does_not_take_is_refused(bundle):
    with pytest.raises(UserError, match=r"asked for a batch of 4, the engine takes 1 to 3; compile it with max_batch=4"):
        open_backend("tensorrt", bundle).open_runner(4)


def test_without_an_engine_the_error_says_how_to_make_one(tmp_path, cuda):
    bundle = tiny.bundle(tmp_path, tiny.config(), chunk=8)
    with pytest.raises(UserError, match=r"no engine for tensorrt 10\.3\.0 on compute capability 8\.7 \(engines found: none\)"):
        open_backend("tensorrt", bundle)


def test_an_engine_that_does_not_load_is_a_users_fault_with_a_remedy(bundle, monkeypatch):
    monkeypatch.setattr(
        tensorrt_double.pickle, "loads", lambda content: (_ for _ in ()).throw(tensorrt_double.pickle.UnpicklingError)
    )
    with pytest.raises(UserError, match=r"cannot load .*\.engine: not an engine of this version; compile again on this machine"):
        open_backend("tensorrt", bundle)


def test_an_engine_with_other_inputs_than_the_manifest_is_refused(bundle):
    manifest = bundle.manifest
    graph = manifest.graphs["prefill"]
    inputs = tuple(replace(spec, dtype="float16") if spec.name == "state.001" else spec for spec in graph.inputs)
    graphs = {**manifest.graphs, "prefill": replace(graph, inputs=inputs)}
    portable = replace(manifest.variants["portable"], graphs=graphs)
    other = replace(manifest, variants={**manifest.variants, "portable": portable})
    with pytest.raises(UserError, match=r"input 'state\.001' as float16\[-1, 4, 8, 12\], it has float32\[-1, 4, 8, 12\]"):
        open_backend("tensorrt", Bundle(bundle.path, other))


def test_the_error_for_a_full_device_has_the_numbers(bundle, cuda):
    backend = open_backend("tensorrt", bundle)
    cuda.memory -= cuda.cudaMemGetInfo()[1] - 1000
    with pytest.raises(UserError, match=r"the GPU has no memory for [\d,]+ bytes: [\d,]+ of [\d,]+ are free"):
        backend.open_runner(3)


def test_an_old_tensorrt_is_refused_with_the_jetpack_that_has_a_newer_one(monkeypatch):
    tensorrt_double.install(monkeypatch)
    monkeypatch.setattr(load_module("tensorrt"), "__version__", "8.6.2")
    with pytest.raises(UserError, match=r"tensorrt 8\.6\.2 is too old: the graphs need 10\.3.*JetPack 6\.1"):
        load_module("tensorrt")


def test_type_stubs_alone_are_no_tensorrt(monkeypatch):
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(UserError, match="only its type stubs are"):
        load_module("tensorrt")


def test_a_timing_cache_is_kept_between_builds(tmp_path, cuda):
    bundle, cache = tiny.bundle(tmp_path, tiny.config(), chunk=8), tmp_path / "timing.cache"
    compile_bundle(bundle, CompileOptions(timing_cache=cache, workspace_mb=64))
    assert cache.read_bytes() == b"kernels"
    compile_bundle(bundle, CompileOptions(timing_cache=cache))
    cache.write_bytes(b"something else")
    with pytest.raises(UserError, match="not a timing cache of this TensorRT on this GPU; delete it"):
        compile_bundle(bundle, CompileOptions(timing_cache=cache))


def test_what_does_not_fit_the_gpu_is_refused_before_building(tmp_path, cuda):
    bundle = tiny.bundle(tmp_path, tiny.config(vocab_size=4096, hidden_size=512), chunk=8)
    cuda.memory = int(needed_bytes(sizes_of_bundle(bundle.manifest), 1, 8) - 1e6)
    with pytest.raises(
        UserError, match=r"needs 0\.6\d GB at batch 1 .* this GPU has 0\.6\d GB free; export it with precision=fp16"
    ):
        compile_bundle(bundle, CompileOptions())
    assert not (bundle.path / FOLDER).exists()


def test_where_tensorrt_takes_no_empty_graph_the_prefill_graph_plays_both_roles(tmp_path, cuda, monkeypatch):
    """As a release might answer the probe; 10.3 to 11 were not asked."""
    from retnet_export.export import tensorrt

    monkeypatch.setattr(tensorrt, "ask", lambda *arguments, **more: Probe(joined=False, int8_fused=None))
    bundle = tiny.bundle(tmp_path, tiny.config(), chunk=8)
    record = compile_bundle(bundle, CompileOptions(max_batch=3))
    assert (record.form, record.probe.joined, {part.graph for part in record.parts}) == ("prefill", False, {"prefill"})
    ours, reference = (open_backend(name, bundle).open_runner(3) for name in ("tensorrt", "onnxruntime"))
    assert measure(follow(ours, TOKENS[:, :6]), follow(reference, TOKENS[:, :6])).relative < SAME


def test_a_full_chunk_and_the_rest_of_a_prompt_run_in_profiles_of_their_own(bundle):
    runner = open_backend("tensorrt", bundle).open_runner(1)
    for count, profiles in ((8, {1}), (5, {1, 2}), (1, {1, 2})):
        runner.prefill(TOKENS[:1, :count], np.array([count]))
        assert {profile_of(context) for context in CONTEXTS if addresses_of(context)} - {0} == profiles  # 0 is decode's
    assert steps_read(runner) == 14


class TestTheDoubleIsStrict:
    """Each of these the real one may answer with wrong numbers."""

    @pytest.fixture
    def runner(self, bundle):
        runner = open_backend("tensorrt", bundle).open_runner(1)
        runner.step(TOKENS[:1, 0])
        runner.top(1)
        return runner

    @pytest.fixture
    def context(self, runner):
        """Of decode, ready to run once more."""
        return next(context for context in CONTEXTS if profile_of(context) == 0 and addresses_of(context))

    @pytest.fixture
    def run(self, context):
        stream = device_cuda.Stream()
        return lambda: context.execute_async_v3(stream.handle)

    def test_a_shared_address_of_input_and_output(self, context, run):
        context.set_tensor_address("decode.state.000", addresses_of(context)["decode.state.000_out"])
        with pytest.raises(Misuse, match="share memory"):
            run()

    @pytest.mark.parametrize("address", [0, "another empty tensor's", "no memory"])
    def test_an_address_of_an_empty_tensor_that_is_not_its_own(self, context, run, address):
        empty = addresses_of(context)["prefill.tokens"]
        chosen = {"another empty tensor's": empty, "no memory": min(addresses_of(context).values()) - 4096}.get(address, 0)
        context.set_tensor_address("prefill.logits", chosen)
        with pytest.raises(Misuse, match=r"has an address|share memory|not within device memory"):
            run()

    def test_a_graph_whose_inputs_are_not_all_empty(self, context):
        assert not context.set_input_shape("prefill.tokens", (1, 1))

    def test_memory_that_was_freed(self, context, run):
        logits = device_cuda.DeviceBuffer(4 * 50)
        context.set_tensor_address("decode.logits", logits.address)
        run()
        logits.close()
        with pytest.raises(Misuse, match="not within device memory that is allocated now"):
            run()

    def test_a_shape_outside_the_profile(self, context):
        assert not context.set_input_shape("decode.tokens", (1, 9))

    def test_an_unknown_tensor(self, context):
        assert not context.set_tensor_address("state.009", 1)

    def test_an_attribute_that_the_release_does_not_have(self, context):
        with pytest.raises(AttributeError, match="has no all_the_tensors"):
            context.all_the_tensors = 1
        with pytest.raises(AttributeError, match="has no num_compute_capabilities"):
            _ = tensorrt_double.IBuilderConfig().num_compute_capabilities

    def test_a_run_before_anything_is_bound(self, bundle):
        backend = open_backend("tensorrt", bundle)
        engine = backend.engine(backend.record.parts[0])
        context = engine.create_execution_context(tensorrt_double.ExecutionContextAllocationStrategy.USER_MANAGED)
        for complaint, remedy in (
            ("before the optimization profile is set", lambda: context.set_optimization_profile_async(0, backend.stream.handle)),
            ("before device memory is set", lambda: context.set_device_memory(backend.scratch.address, 16)),
            ("too small for the profile", lambda: context.set_device_memory(backend.scratch.address, backend.scratch.bytes)),
            ("before the shapes of", lambda: None),
        ):
            with pytest.raises(Misuse, match=complaint):
                context.execute_async_v3(backend.stream.handle)
            remedy()


def test_the_initial_state_is_the_one_that_the_manifest_gives(bundle):
    runner = open_backend("tensorrt", bundle).open_runner(2)
    for name, value in initial_state(bundle.manifest.state).items():
        np.testing.assert_array_equal(runner.read_state(1)[name], value)
