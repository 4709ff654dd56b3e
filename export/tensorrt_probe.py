"""What the installed TensorRT does with two things that not every release does, asked by building a network of a few megabytes.

Rule: no table of versions. Whether a network of two graphs builds when one of them is empty in each profile, and whether a product
with INT8 weights is one kernel or writes the weights out as floats, is seen in the build itself, which takes less than a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retnet_export.export.tensorrt_layers import NO_KERNEL, Layer, UnreadableLayersError, layers_of_inspector, layers_of_log
from retnet_export.export.tensorrt_network import NetworkGraph, Profile, builder_config, optimization_profile
from retnet_export.runtime.backends.tensorrt_api import make_logger
from retnet_export.runtime.bundle.engines import Probe
from retnet_export.runtime.bundle.manifest import GraphSpec, TensorSpec
from retnet_export.runtime.element_types import ELEMENT_TYPES
from retnet_export.runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from onnx import ModelProto

INPUTS, OUTPUTS, CHUNK = 1024, 1536, 8


def ask(module: Any, capabilities: Sequence[str], on_this_gpu: bool, compute: str = "float16") -> Probe:
    """Build a product with INT8 weights for one row and for a chunk of rows, in one network.

    Args:
        module: TensorRT's.
        capabilities: to build for.
        on_this_gpu: whether the engine loads here, so that its inspector can be asked.
        compute: element type of products.
    """
    logger = make_logger(module)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    if not parser.parse(network_of_two(compute).SerializeToString()):
        return Probe(joined=False, int8_fused=None)
    config = builder_config(module, builder, capabilities, compute)
    for profile in (Profile("decode", 1, 1, 1), Profile("prefill", CHUNK, CHUNK, CHUNK), Profile("prefill", 1, 2, CHUNK)):
        config.add_optimization_profile(optimization_profile(builder, GRAPHS, profile, 1))
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return Probe(joined=False, int8_fused=None)
    try:
        layers = layers_of_log(logger.layers)
    except UnreadableLayersError:
        if not on_this_gpu:
            return Probe(joined=True, int8_fused=None)
        try:
            engine = module.Runtime(logger).deserialize_cuda_engine(serialized)
            inspector = engine.create_engine_inspector()
            layers = layers_of_inspector(inspector.get_engine_information(module.LayerInformationFormat.JSON))
        except (UnreadableLayersError, AttributeError):
            return Probe(joined=True, int8_fused=None)
    return Probe(joined=True, int8_fused=not _writes_the_matrix(layers))


def _writes_the_matrix(layers: Sequence[Layer]) -> bool:
    return any(
        tensor.elements(1) >= INPUTS * OUTPUTS for layer in layers if layer.kind not in NO_KERNEL for tensor in layer.outputs
    )


GRAPHS = tuple(
    NetworkGraph(
        role,  # type: ignore[arg-type]
        GraphSpec(f"{role}.onnx", 20, (TensorSpec("x", "float32", (-1, *middle, INPUTS)),), (), CHUNK),
        f"{role}.",
    )
    for role, middle in (("decode", ()), ("prefill", (-1,)))
)


def network_of_two(compute: str) -> ModelProto:
    """y = x · W for rows (B, K) and for chunks of rows (B, C, K), W the same INT8 matrix."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "compiling") from error
    kind = TensorProto.DataType.Value(ELEMENT_TYPES[compute].onnx)
    values = np.random.default_rng(0).integers(-128, 120, (INPUTS, OUTPUTS)).astype(np.int8)
    scale = helper.make_tensor("scale", kind, [OUTPUTS], np.full(OUTPUTS, 2.0**-6, np.float32))
    nodes, inputs, outputs = [], [], []
    for graph in GRAPHS:
        lead = [f"{graph.prefix}size{axis}" for axis in range(len(graph.spec.inputs[0].shape) - 1)]
        names = {part: f"{graph.prefix}{part}" for part in ("x", "low", "w", "product", "y")}
        nodes += [
            helper.make_node("Cast", [names["x"]], [names["low"]], to=kind),
            helper.make_node("DequantizeLinear", ["values", "scale"], [names["w"]], axis=1),
            helper.make_node("MatMul", [names["low"], names["w"]], [names["product"]]),
            helper.make_node("Cast", [names["product"]], [names["y"]], to=TensorProto.FLOAT),
        ]
        inputs.append(helper.make_tensor_value_info(names["x"], TensorProto.FLOAT, [*lead, INPUTS]))
        outputs.append(helper.make_tensor_value_info(names["y"], TensorProto.FLOAT, [*lead, OUTPUTS]))
    initializers = [numpy_helper.from_array(values, "values"), scale]
    model = helper.make_graph(nodes, "probe", inputs, outputs, initializers)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
