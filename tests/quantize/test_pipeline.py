"""A quantized bundle computes what its integers say, is small, and keeps everything that is not a matrix."""

import json
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import oracle
import pytest
import tiny
from random_weights import random_weights

from retnet_export.graph.blocks import rotated_projection_order
from retnet_export.graph.weights import retention_inputs
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.errors import PrecisionWarning, UserError
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import TOLERANCES, measure

# After one token a head's output is v · q·k, of which a norm leaves v and the sign of q·k: no q·k is near 0 at this first token.
TOKENS = np.array([5, 3, 11, 0, 49, 8, 2, 33], np.int64)
GROUP = 16


def tensors_of(bundle, file):
    """The constants of a graph by name."""
    return {name: value.const_value for name, value in ir.load(bundle.file(file)).graph.initializers.items()}


def dequantized_weights(bundle, config, weights):
    """The canonical weights with every quantized matrix as the bundle's file has it."""
    tensors = tensors_of(bundle, "decode.onnx")

    def restored(name):
        values = next(tensors[key].numpy() for key in (f"{name}.int8", f"{name}.int4") if key in tensors).astype(np.float32)
        scales = tensors[f"{name}.scale"].numpy().astype(np.float32)
        if name == "embedding.weight":
            return values * scales[:, None]
        return values * (scales if scales.ndim == 1 else np.repeat(scales, len(values) // len(scales), 0))

    result = dict(weights)
    for layer in (f"layers.{index}" for index in range(config.num_layers)):
        parts = retention_inputs(config)
        joined = np.empty((sum(parts.values()), config.hidden_size), np.float32)
        joined[rotated_projection_order(config)] = restored(f"{layer}.retention.projections.weight").T
        for name, rows in zip(parts, np.split(joined, np.cumsum(list(parts.values()))[:-1]), strict=True):
            result[f"{layer}.retention.{name}.weight"] = rows
        if config.ffn == "glu":
            gate, up = np.split(restored(f"{layer}.ffn.gate_up.weight").T, 2)
            result |= {f"{layer}.ffn.gate.weight": gate, f"{layer}.ffn.up.weight": up}
        else:
            result[f"{layer}.ffn.up.weight"] = restored(f"{layer}.ffn.up.weight").T
        for name in ("retention.out", "ffn.down"):
            result[f"{layer}.{name}.weight"] = restored(f"{layer}.{name}.weight").T
    if config.tied_embeddings:
        result["embedding.weight"] = restored("embedding.weight")
        return result
    result["head.weight"] = restored("head.weight").T
    words = next(tensors[key] for key in tensors if key.startswith("embedding.weight.int")).numpy()[..., 0]
    scales = tensors["embedding.weight.row_scale"].numpy()
    if "embedding.weight.int8_words" in tensors:
        result["embedding.weight"] = words.view(np.int8) * scales
    else:
        nibbles = np.stack([(words >> (4 * lane)) & 15 for lane in range(8)], -1).reshape(len(words), -1)
        values = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)
        result["embedding.weight"] = values * np.repeat(scales[..., 0], values.shape[1] // scales.shape[1], 1)
    return result


def logits_without_fusion(bundle, tokens):
    """Logits (T, V) of the decode graph as it is written: ONNX Runtime with every optimisation off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(bundle.file("decode.onnx")), options, providers=["CPUExecutionProvider"])
    types = {"float32": np.float32, "float16": np.float16, "int64": np.int64}
    state = {spec.input: np.zeros((1, *spec.shape[1:]), types[spec.dtype]) for spec in bundle.manifest.state}
    rows = []
    for token in tokens:
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run(names, {"tokens": [[token]], **state}), strict=True))
        state = {spec.input: results[spec.output] for spec in bundle.manifest.state}
        rows.append(results["logits"][0])
    return np.stack(rows)


def stepped(bundle, tokens):
    """Logits (T, V) through the runtime."""
    session = load(bundle.path).session()
    return np.stack([session.step([token])[0].copy() for token in tokens])


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_graph_computes_what_the_stored_integers_say(tmp_path, name, weights):
    config = tiny.CONFIGS[name]
    tables = "int8" if weights == "int8" or config.tied_embeddings else "int4"
    options = QuantizeOptions(weights, group_size=GROUP, embedding=tables, head=tables)
    quantized = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "small.retnet", options)
    expected = oracle.logits(config, dequantized_weights(quantized, config, random_weights(config)), TOKENS)
    error = measure(logits_without_fusion(quantized, TOKENS), expected)
    assert error.relative <= TOLERANCES["onnxruntime-float32"].relative
    # Through the runtime, where ONNX Runtime rounds the other operand of fused products to eight bits as well.
    assert measure(stepped(quantized, TOKENS), expected).relative <= TOLERANCES["onnxruntime-quantized"].relative


def test_an_embedding_as_wide_as_a_group_has_one_scale_for_each_row(tmp_path):
    config = tiny.config(hidden_size=32, head_value_dim=16, ffn_size=64)
    options = QuantizeOptions("int4", group_size=32, embedding="int4", head="int4")
    quantized = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "small.retnet", options)
    expected = oracle.logits(config, dequantized_weights(quantized, config, random_weights(config)), TOKENS)
    assert measure(logits_without_fusion(quantized, TOKENS), expected).relative <= TOLERANCES["onnxruntime-float32"].relative
    assert measure(stepped(quantized, TOKENS), expected).relative <= TOLERANCES["onnxruntime-quantized"].relative
    session = load(quantized.path).session()
    logits = session.prefill(TOKENS[None], np.array([len(TOKENS)]))[0]
    assert measure(logits, expected[-1]).relative <= TOLERANCES["onnxruntime-quantized"].relative


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_prefill_reads_the_same_weights_as_decode(tmp_path, weights):
    quantized = quantize_bundle(
        tiny.bundle(tmp_path, tiny.config()), tmp_path / "small.retnet", QuantizeOptions(weights, group_size=GROUP)
    )
    session = load(quantized.path).session()
    logits = session.prefill(TOKENS[None], np.array([len(TOKENS)]))[0]
    assert measure(logits, stepped(quantized, TOKENS)[-1]).relative <= TOLERANCES["onnxruntime-quantized"].relative
    places = [
        {tensor.offset for tensor in tensors_of(quantized, file).values() if isinstance(tensor, ir.ExternalTensor)}
        for file in ("decode.onnx", "prefill.onnx")
    ]
    assert places[0] == places[1]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_bundle_with_reduced_products_keeps_them(tmp_path, precision):
    quantized = quantize_bundle(
        tiny.bundle(tmp_path, tiny.config(), precision=precision),
        tmp_path / "small.retnet",
        QuantizeOptions("int4", group_size=GROUP),
    )
    graph = ir.load(quantized.file("decode.onnx")).graph
    scale = graph.initializers["layers.0.ffn.down.weight.scale"].const_value
    assert scale.dtype == {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    assert quantized.manifest.precision.compute == {"fp16": "float16", "bf16": "bfloat16"}[precision]


def test_a_half_precision_state_is_read_and_written_by_both_graphs(tmp_path):
    source = tiny.bundle(tmp_path, tiny.config())
    options = QuantizeOptions("int8", state="fp16")
    quantized = quantize_bundle(source, tmp_path / "small.retnet", options)
    plain = quantize_bundle(source, tmp_path / "plain.retnet", QuantizeOptions("int8"))
    assert quantized.manifest.state_bytes < 0.51 * plain.manifest.state_bytes
    assert measure(stepped(quantized, TOKENS), stepped(plain, TOKENS)).relative < TOLERANCES["onnxruntime-float16"].relative
    session = load(quantized.path).session()
    logits = session.prefill(TOKENS[None], np.array([len(TOKENS)]))[0]
    assert measure(logits, stepped(quantized, TOKENS)[-1]).relative < TOLERANCES["onnxruntime-quantized"].relative


@pytest.mark.parametrize(("heads", "slow"), [(6, 0), (8, 2)])
def test_a_half_precision_state_of_heads_too_slow_for_it_is_warned_of(tmp_path, heads, slow):
    config = tiny.config(num_heads=heads, num_kv_heads=heads, head_value_dim=16)  # they remember 32, 64, … tokens, the eighth 4,096
    source = tiny.bundle(tmp_path, config)

    def messages(make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make()
        return [str(warning.message) for warning in caught if warning.category is PrecisionWarning]

    (tmp_path / "half").mkdir()
    exported = messages(lambda: tiny.bundle(tmp_path / "half", config, state="fp16"))
    quantized = messages(lambda: quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions(group_size=16, state="fp16")))
    assert exported == quantized
    assert messages(lambda: quantize_bundle(source, tmp_path / "int4.retnet", QuantizeOptions(group_size=16))) == []
    assert len(exported) == (slow > 0)
    if slow:
        assert f"state fp16: {slow} of {heads} heads remember more than 1,024 tokens (up to 4,096)" in exported[0]


def test_kept_matrices_stay_as_they_are(tmp_path):
    source = tiny.bundle(tmp_path, tiny.config())
    quantized = quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions("int8", embedding="keep", head="keep"))
    before, after = (ir.load(bundle.file("decode.onnx")).graph.initializers for bundle in (source, quantized))
    for name in ("embedding.weight", "head.weight", "norm.weight"):
        assert (before[name].const_value.numpy() == after[name].const_value.numpy()).all()


def test_a_tied_embedding_is_one_copy_in_the_file(tmp_path):
    config = tiny.config(tied_embeddings=True, vocab_size=4096)
    quantized = quantize_bundle(tiny.bundle(tmp_path, config), tmp_path / "small.retnet", QuantizeOptions("int8"))
    table = config.vocab_size * config.hidden_size
    assert table < quantized.manifest.weights_bytes < 1.5 * table
    initializers = ir.load(quantized.file("decode.onnx")).graph.initializers
    matrix, words = (initializers[f"embedding.weight.int8{suffix}"].const_value for suffix in ("", "_words"))
    assert (matrix.offset, matrix.length) == (words.offset, words.length)


def test_the_manifest_records_what_was_done_and_forgets_the_verification(tmp_path):
    source = tiny.bundle(tmp_path, tiny.config()).with_manifest(verification={"passed": True})
    quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions("int4", group_size=GROUP))
    manifest = open_bundle(tmp_path / "small.retnet").manifest
    record = json.loads((tmp_path / "small.retnet" / "manifest.json").read_text())["quantization"]
    assert (record["weights"], record["group_size"], record["method"], record["head"]) == ("int4", GROUP, "rtn", "int8")
    assert manifest.precision.weights == "int4"
    assert manifest.verification is None
    assert manifest.provenance == source.manifest.provenance


REFUSALS = [
    ({"weights": "int3"}, "weights is 'int3', expected int8, int4 or fp8"),
    ({"group_size": 48}, "group_size is 48, expected 16, 32, 64, 128 or 256"),
    ({"method": "gptq"}, "method is 'gptq', which looks at activations: give a text of the kind that the model will continue"),
    ({"calibration": Path("x.txt")}, "calibration cannot be combined with method=rtn, which looks at no text; choose gptq"),
    ({"state": "int8"}, "state is 'int8', expected fp16"),
    ({"embedding": "fp16"}, "embedding is 'fp16', expected int8, int4 or keep"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=[message[:30] for _, message in REFUSALS])
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError) as refusal:
        QuantizeOptions(**options)
    assert message in str(refusal.value)


UNFIT = [
    (tiny.config(), {"group_size": 32}, "does not divide the inputs of 4 matrices (layers.0.retention.out.weight has 48"),
    (tiny.config(tied_embeddings=True), {"group_size": 16, "head": "keep"}, "embedding is int8 and head=keep, but the head of"),
    (
        tiny.config(tied_embeddings=True),
        {"group_size": 16, "head": "int4", "embedding": "int4"},
        "no four-bit form is fast",
    ),
    (
        tiny.config(hidden_size=30, ffn_size=32, head_value_dim=16),
        {"weights": "int8"},
        "a width that is a multiple of 4",
    ),
]


@pytest.mark.parametrize(("config", "options", "message"), UNFIT, ids=[message[:30] for *_, message in UNFIT])
def test_options_that_do_not_fit_the_model_are_refused_and_leave_nothing(tmp_path, config, options, message):
    source = tiny.bundle(tmp_path, config)
    with pytest.raises(UserError) as refusal:
        quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions(**options))
    assert message in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.retnet"]


def test_a_quantized_bundle_is_not_quantized_again(tmp_path):
    quantized = quantize_bundle(tiny.bundle(tmp_path, tiny.config()), tmp_path / "small.retnet", QuantizeOptions("int8"))
    with pytest.raises(UserError, match=r"already quantized \(int8\); quantizing twice only loses"):
        quantize_bundle(quantized, tmp_path / "smaller.retnet", QuantizeOptions("int4", group_size=GROUP))
    assert not (tmp_path / "smaller.retnet").exists()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_small_weights_behind_large_norms_are_quantized_as_the_same_function_is(tmp_path, weights):
    """Matrices times 2^-20 with norms times 2^20 before them compute the same, and so do their quantized forms, bit for bit."""
    config = tiny.CONFIGS["fla"]
    plain = random_weights(config)
    shifted = {
        name: value * np.float32(2.0**20)
        if name.endswith(("retention_norm.weight", "ffn_norm.weight"))
        else value * np.float32(2.0**-20)
        if name.endswith(("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight"))
        else value
        for name, value in plain.items()
    }
    rows = []
    for name, values in (("plain", plain), ("shifted", shifted)):
        (tmp_path / name).mkdir()
        bundle = tiny.bundle(tmp_path / name, config, values)
        options = QuantizeOptions(weights, group_size=GROUP)
        rows.append(logits_without_fusion(quantize_bundle(bundle, tmp_path / name / "small.retnet", options), TOKENS))
    np.testing.assert_array_equal(rows[1], rows[0])


def test_few_tokens_of_calibration_are_warned_of_with_their_number(example_bundle, tmp_path):
    from retnet_export.export.verify import PASSAGE

    (tmp_path / "short.txt").write_text(PASSAGE)
    options = QuantizeOptions(method="gptq", calibration=tmp_path / "short.txt")
    with pytest.warns(PrecisionWarning, match=r"short\.txt: \d\d\d tokens are few to calibrate on: below 4,096 gptq can be worse"):
        made = quantize_bundle(example_bundle, tmp_path / "small.retnet", options)
    record = made.manifest.quantization["calibration"]
    assert 128 <= record["sequences"] * record["length"] < 1000
