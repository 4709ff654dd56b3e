"""From a graph to TensorRT's network: what is added to it, how large its open sizes may be, and what a refusal means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_export.runtime.bundle.engines import TOP_LOGITS, TOP_TOKENS, GraphRole, open_shape
from retnet_export.runtime.bundle.manifest import GraphSpec

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class Profile:
    """One optimization profile: the role it plays and how many tokens per sequence it takes."""

    role: GraphRole
    min_tokens: int
    typical_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class NetworkGraph:
    """A graph of the bundle in a network.

    Attributes:
        role: what it is for; None if it serves every profile.
        spec: its inputs and outputs.
        prefix: stands before the names of its tensors.
    """

    role: GraphRole | None
    spec: GraphSpec
    prefix: str = ""


def parser_message(path: Path, parser: trt.OnnxParser, target: str, version: str) -> str:
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    shown = [
        f"node {fault.node_name() or fault.node()} ({fault.node_operator() or 'no operator'}): {fault.desc()}"
        for fault in faults[:3]
    ]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    operators = {fault.node_operator() for fault in faults}
    if "DequantizeLinear" in operators or "QuantizeLinear" in operators:
        remedy = "quantize again with symmetric weights and a group size of 64 or 128"
    else:
        remedy = "export the checkpoint again with this version of retnet-export, or install a newer TensorRT"
    return f"{path}: {target} {version} does not take the graph: {'; '.join(shown)}{more}. What to do: {remedy}"


def builder_config(module: Any, builder: trt.Builder, capabilities: Sequence[str], compute: str) -> trt.IBuilderConfig:
    """What every build has in common.

    TF32 lets tensor cores multiply float32 operands rounded to 11 bits. In a float32 bundle that would cost precision everywhere.
    In others the products are narrower already. What is left in float32 is retention in a chunk of prompt, which without TF32 runs
    at a small share of the speed, and with it is off by 1e-7 of mean KL divergence (docs/lab/tensorrt.md).
    A step has no such product.
    """
    config = builder.create_builder_config()
    if compute == "float32":
        config.clear_flag(module.BuilderFlag.TF32)
    else:
        config.set_flag(module.BuilderFlag.TF32)
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # so that the layers are listed with their tensors
    if hasattr(config, "set_compute_capability"):
        rtx_config: Any = config  # which has these two members more
        rtx_config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            rtx_config.set_compute_capability(getattr(module.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
    return config


def optimization_profile(
    builder: trt.Builder, graphs: Sequence[NetworkGraph], profile: Profile, max_batch: int
) -> trt.IOptimizationProfile:
    """Sizes left open in a graph are the batch, on the first axis, and the tokens or the rows of `rows`, on the second.

    A step and a chunk of a prompt want logits of one row; `Runner.score` up to as many as the chunk has tokens. A graph that this
    profile is not for has a batch of 0. A batch that is never more than 1 gets the range 1…2 where no other size is open: a profile
    without a free size makes TensorRT lay the weights out for it alone, and write INT8 weights out as floats at every step.
    """
    result = builder.create_optimization_profile()
    typical_batch = max_batch if profile.role == "decode" else 1

    for graph in graphs:
        idle = graph.role not in (None, profile.role)
        for spec in graph.spec.inputs:
            if idle:
                shapes = [open_shape(spec, 0, 1)] * 3
            else:
                shapes = [
                    open_shape(spec, 1, profile.min_tokens, 1),
                    open_shape(spec, typical_batch, profile.typical_tokens, 1),
                    open_shape(spec, largest_batch(graph.spec, max_batch), profile.max_tokens, profile.max_tokens),
                ]
            result.set_shape(graph.prefix + spec.name, *shapes)
    return result


def largest_batch(spec: GraphSpec, max_batch: int) -> int:
    """The end of a profile's range of batches; beyond 1 unless the rows whose logits are wanted are an open size."""
    return max(max_batch, 1 if any(tensor.name == "rows" for tensor in spec.inputs) else 2)


def add_candidates(module: Any, network: trt.INetworkDefinition, count: int) -> None:
    """Mark the largest of each graph's logits, and their tokens, as outputs beside them."""
    for tensor in [network.get_output(index) for index in range(network.num_outputs)]:
        if not tensor.name.endswith("logits"):
            continue
        prefix = tensor.name.removesuffix("logits")
        layer = network.add_topk(tensor, module.TopKOperation.MAX, count, 1 << (len(tensor.shape) - 1))
        layer.name = f"{prefix}candidates"
        for index, name in enumerate((TOP_LOGITS, TOP_TOKENS)):
            output = layer.get_output(index)
            output.name = prefix + name
            network.mark_output(output)
