"""Real TensorRT (TensorRT for RTX, which compiles without a GPU) parses decode.onnx and builds engines from it."""

from __future__ import annotations

import pytest
import tiny

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx-cu13 is not installed here")

COMPUTE_CAPABILITIES = [(8, 6), (8, 9), (12, 0)]


def build(path, capability: tuple[int, int], batch: int) -> int:
    """Bytes of the engine built from an ONNX file for one compute capability."""
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt_rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(tensorrt_rtx.ComputeCapability(capability[0] * 10 + capability[1]), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        smallest = [1 if size == -1 else size for size in tensor.shape]
        profile.set_shape(tensor.name, smallest, smallest, [batch, *smallest[1:]])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return engine.nbytes


@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES, ids=lambda pair: f"{pair[0]}.{pair[1]}")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_bundled_models_graph_builds(tmp_path, capability, precision):
    from conftest import EXAMPLE

    from retnet_export.export.checkpoints import open_checkpoint
    from retnet_export.export.pipeline import ExportOptions, export_bundle

    bundle = export_bundle(open_checkpoint(EXAMPLE), tmp_path / "b.retnet", ExportOptions(precision=precision))
    weights = bundle.manifest.weights_bytes
    assert build(bundle.path / "decode.onnx", capability, batch=4) > 0.9 * weights


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_familys_graph_builds(tmp_path, name):
    bundle = tiny.bundle(tmp_path, tiny.CONFIGS[name])
    assert build(bundle.path / "decode.onnx", (8, 6), batch=2) > 0
