"""What sessions on a GPU share: the right bytes under the right names, once. Shown on the CUDA double, whose memory can be read."""

from __future__ import annotations

import ctypes
import gc

import onnx
import pytest
import tiny
from cuda_double import CudaDouble

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.device_weights import SMALLEST, DeviceWeights
from retnet_export.runtime.bundle.external_data import stored_initializers
from retnet_export.runtime.device import cuda

CONFIG = tiny.config(hidden_size=64, ffn_size=96, vocab_size=70)


@pytest.fixture
def device(monkeypatch):
    double = CudaDouble()
    monkeypatch.setattr(cuda, "_runtime", lambda: double)
    yield double
    gc.collect()  # buffers return to the double that they came from


def held(bundle):
    return DeviceWeights({name: bundle.file(spec.file) for name, spec in bundle.manifest.graphs.items()}, cuda.Stream())


def tensors(bundle, graph):
    """The initializers of a graph that are stored in the weights file, as the package onnx reads them."""
    model = onnx.load(bundle.file(bundle.manifest.graphs[graph].file), load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_large_weight_of_both_graphs_is_on_the_device_once(tmp_path, device, precision):
    bundle = tiny.bundle(tmp_path, CONFIG, precision=precision)
    weights, addresses = held(bundle), {}
    for graph in ("decode", "prefill"):
        for name, tensor in tensors(bundle, graph).items():
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(bundle.path))
            assert (name in weights._values[graph]) == (len(tensor.raw_data) >= SMALLEST)
            if name in weights._values[graph]:
                value = weights._values[graph][name]
                assert (value.device_name(), value.element_type(), value.shape()) == ("cuda", tensor.data_type, list(tensor.dims))
                assert ctypes.string_at(value.data_ptr(), len(tensor.raw_data)) == tensor.raw_data
                assert addresses.setdefault(name, value.data_ptr()) == value.data_ptr()
    assert len(addresses) > 4 * CONFIG.num_layers
    assert weights.bytes < 1.05 * bundle.manifest.weights_bytes


def test_weights_that_a_session_repacks_are_left_to_it(tmp_path, device):
    source = tiny.bundle(tmp_path, CONFIG)
    weights = held(quantize_bundle(source, tmp_path / "small.retnet", QuantizeOptions("int8", embedding="keep", head="keep")))
    assert all(name.startswith(("embedding", "head")) for values in weights._values.values() for name in values)


def test_a_weights_file_that_is_too_short_is_left_to_the_sessions_message(tmp_path, device):
    bundle = tiny.bundle(tmp_path, CONFIG)
    path = bundle.file("weights.bin")
    path.write_bytes(path.read_bytes()[: bundle.manifest.weights_bytes // 2])
    assert 0 < held(bundle).bytes < bundle.manifest.weights_bytes // 2


def test_stored_initializers_are_those_that_the_package_onnx_reads(tmp_path):
    bundle = quantize_bundle(tiny.bundle(tmp_path, CONFIG), tmp_path / "small.retnet", QuantizeOptions("int4", group_size=16))
    for graph in ("decode", "prefill"):
        path = bundle.file(bundle.manifest.graphs[graph].file)
        nodes = onnx.load(path, load_external_data=False).graph.node
        expected = {
            name: (
                tensor.data_type,
                tuple(tensor.dims),
                {entry.key: entry.value for entry in tensor.external_data},
                {node.op_type for node in nodes if name in node.input},
            )
            for name, tensor in tensors(bundle, graph).items()
        }
        found = {
            each.name: (
                each.element_type,
                each.shape,
                {"location": each.location, "offset": str(each.offset), "length": str(each.length)},
                set(each.readers),
            )
            for each in stored_initializers(path.read_bytes())
        }
        assert found == expected
        assert "DequantizeLinear" in {reader for *_, readers in found.values() for reader in readers}


def test_shapes_written_one_by_one_and_packed_are_read_alike(tmp_path):
    """protoc packs repeated integers in proto3, onnx.proto's own writers do not."""
    tensor = b"\x0a\x03\x80\x02\x07" + b"\x10\x01" + b"\x42\x01w" + b"\x6a\x0d\x0a\x08location\x12\x01f"
    loose = b"\x08\x80\x02\x08\x07" + tensor[5:]
    for each in (tensor, loose):
        graph = b"\x2a" + bytes([len(each)]) + each
        found = stored_initializers(b"\x3a" + bytes([len(graph)]) + graph)[0]
        assert (found.name, found.shape, found.location, found.offset, found.length) == ("w", (256, 7), "f", 0, None)
