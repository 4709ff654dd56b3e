"""INT4 and INT8 weights on a GPU: the kernels for one row and for several compute the same products, from one file."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.base import initial_state
from retnet_export.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from retnet_export.runtime.numerics import measure, tolerance

pytestmark = pytest.mark.usefixtures("onnxruntime_cuda")
# Sizes that the tensor-core kernels take: outputs in multiples of 64.
CONFIG = tiny.config(
    vocab_size=320, hidden_size=128, num_heads=2, num_kv_heads=2, head_key_dim=64, head_value_dim=128, ffn_size=256
)
TOKENS = np.random.default_rng(6).integers(0, CONFIG.vocab_size, (3, 16))
TOLERANCE = tolerance("float16", "onnxruntime-cuda").relative


@pytest.fixture(scope="module", params=["int4", "int8"])
def bundle(request, tmp_path_factory):
    """One quantized fp16 model, with the GPU's variant of its graphs."""
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny.bundle(folder, CONFIG, chunk=16, precision="fp16", variants=("onnxruntime-cuda",))
    return quantize_bundle(source, folder / "portable.retnet", QuantizeOptions(request.param, group_size=32))


@pytest.fixture(scope="module")
def expected(bundle):
    """Logits (B, T, V) of the portable graph on the CPU, weights made floats one by one: nothing is fused or rounded again."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(bundle.file("decode.onnx")), options, providers=["CPUExecutionProvider"])
    state = {name: np.repeat(array, 3, 0) for name, array in initial_state(bundle.manifest.state).items()}
    rows = []
    for column in TOKENS.T:
        logits, *after = session.run(["logits", *(f"{name}_out" for name in state)], {"tokens": column[:, None], **state})
        state = dict(zip(state, after, strict=True))
        rows.append(logits)
    return np.stack(rows, 1)


def steps(stream, tokens):
    rows = []
    for column in tokens.T:
        stream.step(column)
        rows.append(stream.logits().copy())
    return np.stack(rows, 1)


@pytest.mark.parametrize("low_memory", [None, True])
@pytest.mark.parametrize("variant", ["portable", "onnxruntime-cuda"])
def test_steps_agree_with_the_same_integers_made_floats(bundle, expected, variant, low_memory):
    backend = OnnxRuntimeCudaBackend(bundle, low_memory=low_memory, variant=variant)
    for rows in (slice(0, 1), slice(0, 3)):
        logits = steps(backend.open_stream(rows.stop), TOKENS[rows])
        assert measure(logits, expected[rows]).relative < TOLERANCE


@pytest.mark.parametrize("low_memory", [None, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_leave_what_steps_leave(bundles, expected, batch, low_memory):
    backend = OnnxRuntimeCudaBackend(bundles[1], low_memory=low_memory)
    read, stepped = backend.open_stream(batch), backend.open_stream(batch)
    read.prefill(TOKENS[:batch], np.full(batch, 16))
    steps(stepped, TOKENS[:batch])
    assert measure(read.logits(), expected[:batch, -1]).relative < TOLERANCE
    for name, array in stepped.read_state(0).items():
        if array.ndim > 1:
            assert measure(read.read_state(0)[name], array).relative < TOLERANCE


def test_a_batch_opens_the_session_whose_kernels_multiply_several_rows(bundles):
    backend = OnnxRuntimeCudaBackend(bundles[1])
    backend.open_stream(1)
    assert set(backend._decode) == {False}
    backend.open_stream(3)
    assert set(backend._decode) == {False, True}
    sparing = OnnxRuntimeCudaBackend(bundles[1], low_memory=True)
    sparing.open_stream(3)
    assert set(sparing._decode) == {False}
