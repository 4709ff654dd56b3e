"""TensorRT's forms of the graphs compute what the portable graphs compute; ONNX Runtime, which takes both, is the judge."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tiny

from retnet_export.export.tensorrt_forms import JOINED, tensorrt_forms
from retnet_export.graph.tensorrt.planes import LARGEST, split
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.numerics import TOLERANCES, measure

SAME = TOLERANCES["chunkwise-float32"].relative
SIZES = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "head_key_dim": 16, "head_value_dim": 32, "ffn_size": 128}


def run(path, feeds, prefix=""):
    options = onnxruntime.SessionOptions()
    # As written: fused products with quantized weights round what flows into them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    results = dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))
    return {name.removeprefix(prefix): value for name, value in results.items() if name.startswith(prefix)}


def inputs(bundle, graph, batch, tokens=1):
    """Random inputs of a graph, by name; the state is that of a text."""
    generator = np.random.default_rng(3)
    result = {}
    for spec in bundle.manifest.graphs[graph].inputs:
        shape = [size if size != -1 else batch if axis == 0 else tokens for axis, size in enumerate(spec.shape)]
        if spec.name == "tokens":
            result[spec.name] = generator.integers(0, bundle.manifest.model.vocab_size, shape)
        elif spec.name == "length":
            result[spec.name] = np.full(shape, tokens)
        elif spec.dtype == "int64":
            result[spec.name] = np.full(shape, 9 if spec.name == "position" else 0)
        else:
            result[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
    return {name: value.astype(np.int64) if value.dtype.kind == "i" else value for name, value in result.items()}


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_the_read_out_as_a_sum_reads_what_the_product_reads(tmp_path, family):
    bundle = tiny.bundle(tmp_path, tiny.CONFIGS[family])
    feeds = inputs(bundle, "decode", batch=3)
    expected = run(bundle.path / "decode.onnx", feeds)
    with tensorrt_forms(bundle, join=False, planes=True) as forms:
        operators = {node.op_type for node in ir.load(forms.files["decode"]).graph if "retention.read" in str(node.name)}
        actual = run(copied(forms.files["decode"]), feeds)
    assert "ReduceSum" in operators
    assert "MatMul" not in operators
    check_same(actual, expected)
    assert not (bundle.path / "engines").exists()


def check_same(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        if value.dtype.kind == "i":
            np.testing.assert_array_equal(actual[name], value)
        else:
            assert measure(actual[name], value).relative < SAME, name


def copied(path):
    """The model with its weights inside: ONNX Runtime follows no links."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            with (path.parent / where["location"]).open("rb") as file:
                file.seek(int(where["offset"]))
                tensor.raw_data = file.read(int(where["length"]))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    whole = path.with_suffix(".whole.onnx")
    onnx.save(model, whole)
    return whole


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
def test_planes_multiply_as_the_int8_weights_do(tmp_path, precision, tied):
    source = tiny.bundle(tmp_path, tiny.config(**SIZES, vocab_size=128, tied_embeddings=tied), precision=precision)
    bundle = quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions("int8"))
    feeds = inputs(bundle, "decode", batch=2)
    expected = run(bundle.path / "decode.onnx", feeds)
    with tensorrt_forms(bundle, join=False, planes=True) as forms:
        assert (forms.int8, forms.floats) == ("planes", ())
        types = [value.const_value.dtype for value in ir.load(forms.files["decode"]).graph.initializers.values()]
        actual = run(copied(forms.files["decode"]), feeds)
    assert ir.DataType.INT4 in types
    assert ir.DataType.INT8 not in types
    assert measure(actual["logits"], expected["logits"]).relative < (SAME if precision == "fp32" else 5e-3)


def test_every_weight_up_to_119_is_sixteen_times_one_plane_and_the_other():
    every = np.arange(-128, LARGEST + 1, dtype=np.int8)[:, None]
    planes = split(every)
    assert planes.min() == -8
    assert planes.max() == 7
    np.testing.assert_array_equal(16 * planes[:, 0].astype(int) + planes[:, 1], every[:, 0])


def test_a_matrix_that_two_planes_do_not_hold_stays_and_is_named(tmp_path):
    source = tiny.bundle(tmp_path, tiny.config(**(SIZES | {"hidden_size": 96}), vocab_size=128))
    bundle = quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions("int8"))
    with tensorrt_forms(bundle, join=False, planes=True) as forms:
        assert forms.int8 == "planes"
        assert "head.weight.int8" in forms.floats  # 96 inputs are no multiple of 64
        assert "layers.0.ffn.down.weight.int8" not in forms.floats


@pytest.mark.parametrize("active", ["decode", "prefill"])
def test_in_the_joined_graph_each_graph_runs_while_the_other_is_empty(tmp_path, active):
    bundle = tiny.bundle(tmp_path, tiny.config(), chunk=8)
    sizes = {"decode": (2, 1), "prefill": (2, 5)}
    feeds = {
        f"{name}.{key}": value
        for name, (batch, tokens) in sizes.items()
        for key, value in inputs(bundle, name, batch if name == active else 0, tokens).items()
    }
    own = {name.removeprefix(f"{active}."): value for name, value in feeds.items() if name.startswith(active)}
    expected = run(bundle.path / f"{active}.onnx", own)
    with tensorrt_forms(bundle, join=True, planes=True) as forms:
        path = copied(forms.files[JOINED])
        actual = run(path, feeds, f"{active}.")
        weights = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    check_same(actual, expected)
    assert weights < 1.1 * bundle.manifest.weights_bytes


@pytest.mark.parametrize(
    ("weights", "tied"),
    [(weights, tied) for weights in ("fp32", "int8", "int4") for tied in (False, True)] + [("int4 head", False)],
)
def test_products_with_large_weights_are_cut_and_compute_the_same(tmp_path, weights, tied):
    sizes = {**SIZES, "hidden_size": 256, "ffn_size": 512}
    bundle = tiny.bundle(tmp_path, tiny.config(**sizes, vocab_size=300, tied_embeddings=tied), chunk=4)
    if weights != "fp32":
        options = QuantizeOptions("int4", head="int4") if weights == "int4 head" else QuantizeOptions(weights)
        bundle = quantize_bundle(bundle, tmp_path / "small.retnet", options)
    largest = 12 << 10
    feeds = {graph: inputs(bundle, graph, batch=2, tokens=4) for graph in ("decode", "prefill")}
    with tensorrt_forms(bundle, join=False, planes=False) as forms:
        expected = {name: run(copied(forms.files[name]), values) for name, values in feeds.items()}
    with tensorrt_forms(bundle, join=False, planes=False, largest=largest) as forms:
        graph = ir.load(forms.files["decode"]).graph
        actual = {name: run(copied(forms.files[name]), values) for name, values in feeds.items()}
    cut = [node for node in graph if str(node.name).endswith(".piece1")]
    assert cut
    assert tied or any("head" in str(node.name) for node in cut)
    for node in graph:
        weight = node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] is not None else None
        assert weight is None or weight.nbytes <= max(largest, 128 * 4 * weight.shape[1])
    for name, results in expected.items():
        check_same(actual[name], results)
