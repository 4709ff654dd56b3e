"""The random models of the GPU benchmarks are what the commands make: the same graphs, only the numbers are drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import tiny

from retnet_export.graph.variants import ONNXRUNTIME_CUDA
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle


@pytest.fixture
def gpu_models(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import gpu_models

    yield gpu_models
    sys.modules.pop("gpu_models")


def operators(path):
    """Each node's operator and attributes, in order, and each large initializer's type and shape by what reads it."""
    graph = onnx.load(path, load_external_data=False).graph
    nodes = [(node.op_type, sorted(str(attribute) for attribute in node.attribute)) for node in graph.node]
    weights = sorted((tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer if tensor.external_data)
    return nodes, weights


@pytest.mark.parametrize("fmt", ["fp16", "int4"])
def test_a_random_model_has_the_graphs_of_an_exported_quantized_and_converted_one(tmp_path, gpu_models, fmt):
    config = gpu_models.MODELS["tiny"]
    (tmp_path / "random").mkdir()
    random = gpu_models.write_bundle(tmp_path / "random", config, fmt, {"made": ONNXRUNTIME_CUDA})["made"].bundle
    bundle = tiny.bundle(tmp_path, config, precision="fp16", variants=("onnxruntime-cuda",))
    if fmt == "int4":
        options = QuantizeOptions("int4", gpu_models.INT4_BLOCK, embedding="keep", head="int4")
        bundle = quantize_bundle(bundle, tmp_path / "small.retnet", options)
    for graph in ("decode", "prefill"):
        variants = (random.manifest.variants["portable"], bundle.manifest.variants["onnxruntime-cuda"])
        paths = [each.file(variant.graphs[graph].file) for each, variant in zip((random, bundle), variants, strict=True)]
        assert operators(paths[0]) == operators(paths[1])
    assert random.manifest.state == bundle.manifest.state
