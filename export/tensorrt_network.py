"""From a graph of the bundle to TensorRT's network: what is parsed, what is added to it, and what a refusal means.

Rule: the graph is taken as it is. Added is only what a host wants of the logits, and how large the sizes left open may be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import TOP_LOGITS, TOP_TOKENS, Role
from retnet_export.runtime.bundle.manifest import GraphSpec
from retnet_export.runtime.errors import MissingExtraError

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class Profile:
    """One optimization profile: the role it plays and how many tokens per sequence it takes."""

    role: Role
    typical_tokens: int
    max_tokens: int


def parse(parser: trt.OnnxParser, bundle: Bundle, path: Path) -> bool:
    """Parse a graph.

    A quantized embedding that is the output head as well stands in the file once and is read as bytes and as words. TensorRT
    knows weights by their address and refuses one address with two sizes, so there the second reading gets a copy of its own.
    """
    record = bundle.manifest.quantization
    if not (bundle.manifest.model.tied_embeddings and record and record.get("embedding") != "keep"):
        return bool(parser.parse_from_file(str(path)))
    try:
        import onnx
        from onnx.external_data_helper import load_external_data_for_tensor
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "compiling a quantized bundle whose embedding is its output head") from error
    model, seen = onnx.load(str(path), load_external_data=False), set()
    for tensor in model.graph.initializer:
        offset = next((entry.value for entry in tensor.external_data if entry.key == "offset"), None)
        if offset is not None and offset in seen:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.ClearField("external_data")
        seen.add(offset)
    return bool(parser.parse(model.SerializeToString(), str(path)))


def parser_message(path: Path, parser: trt.OnnxParser, target: str, version: str) -> str:
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    shown = [
        f"node {fault.node_name() or fault.node()} ({fault.node_operator() or 'no operator'}): {fault.desc()}"
        for fault in faults[:3]
    ]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    operators = {fault.node_operator() for fault in faults}
    if operators & {"MatMulNBits", "LinearAttention", "GatedDeltaNet"}:
        mend = "the bundle is in a dialect of ONNX Runtime; give the portable bundle, as export writes it without --dialect"
    elif "DequantizeLinear" in operators or "QuantizeLinear" in operators:
        mend = "quantize again with symmetric weights and a group size of 64 or 128"
    else:
        mend = "export the checkpoint again with this version of retnet-export, or install a newer TensorRT"
    return f"{path}: {target} {version} does not take the graph: {'; '.join(shown)}{more}. What to do: {mend}"


def optimization_profile(builder: trt.Builder, graph: GraphSpec, profile: Profile, max_batch: int) -> trt.IOptimizationProfile:
    """Sizes left open in the graph are the batch, on the first axis, and the tokens or the rows of `rows`, on the second.

    A step and a chunk of a prompt want logits of one row; `Stream.score` up to as many as the chunk has tokens. As with the tokens,
    one row alone in a profile would make TensorRT lay the head out a second time.
    """
    result = builder.create_optimization_profile()
    typical_batch = max_batch if profile.role == "decode" else 1

    def shape(sizes: tuple[int, ...], batch: int, tokens: int) -> Any:  # a tuple is taken as a Dims
        return tuple(size if size != -1 else batch if axis == 0 else tokens for axis, size in enumerate(sizes))

    for spec in graph.inputs:
        typical, most = profile.typical_tokens, profile.max_tokens
        if spec.name == "rows":
            typical = 1
        result.set_shape(
            spec.name, shape(spec.shape, 1, 1), shape(spec.shape, typical_batch, typical), shape(spec.shape, max_batch, most)
        )
    return result


def add_candidates(module: Any, network: trt.INetworkDefinition, count: int) -> None:
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    logits = next(tensor for tensor in outputs if tensor.name == "logits")
    layer = network.add_topk(logits, module.TopKOperation.MAX, count, 1 << (len(logits.shape) - 1))  # (B, V), or (B, R, V)
    layer.name = "candidates"
    for index, name in enumerate((TOP_LOGITS, TOP_TOKENS)):
        tensor = layer.get_output(index)
        tensor.name = name
        network.mark_output(tensor)
