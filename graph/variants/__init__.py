"""Variants: a graph rewritten for one runtime, where that runtime has operators of its own that are faster.

Rule: a variant is a list of rewrites over the portable graph, each a module that names its pattern. A rewrite that does not
find its pattern (a LayerNorm, a family's bias) leaves that part portable, so every model has every variant. A bundle holds its
variants side by side (writing.py), and the runtime takes the best that works where it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from retnet_export.graph.variants.chunks import ChunkFormsPass
from retnet_export.graph.variants.element_types import InferElementTypes
from retnet_export.graph.variants.integers import IntegerProductsPass
from retnet_export.graph.variants.linear_attention import LinearAttentionPass
from retnet_export.graph.variants.norms import UnitScalePass
from retnet_export.graph.variants.rotation import RotationPass
from retnet_export.graph.variants.skip_norms import SkipNormPass

ONNXRUNTIME_CPU: Sequence[type[ir.passes.InPlacePass]] = (
    RotationPass,
    LinearAttentionPass,
    ChunkFormsPass,
    UnitScalePass,
    SkipNormPass,
)
"""What was measured to help (docs/lab/quantization.md, cpu-step.md). Operators for gates and GatedDeltaNet are slow on a CPU."""

ONNXRUNTIME_CPU_INTEGERS: Sequence[type[ir.passes.InPlacePass]] = (
    IntegerProductsPass,
    RotationPass,
    UnitScalePass,
    SkipNormPass,
)
"""For versions without fused INT8 weights and without LinearAttention: those that Python 3.10, and so JetPack 6, can install."""

FIRST_VERSIONS: Mapping[str, str] = {
    "com.microsoft::LinearAttention": "1.25",
}
"""The first ONNX Runtime with an operator, where that is not the oldest that we support."""
OLDEST_VERSION = "1.20"


@dataclass(frozen=True)
class Form:
    """How a variant is made.

    Attributes:
        passes: the rewrites, in order.
        only_with: an operator without which the variant is not worth writing; None if it always is.
    """

    passes: Sequence[type[ir.passes.InPlacePass]]
    only_with: str | None = None

    def first_version(self, operators: Collection[str]) -> str:
        """The first version of ONNX Runtime that has all operators."""
        versions = [OLDEST_VERSION, *(FIRST_VERSIONS[name] for name in operators if name in FIRST_VERSIONS)]
        return max(versions, key=lambda version: tuple(map(int, version.split("."))))


FORMS: Mapping[str, Form] = {
    "onnxruntime-cpu": Form(ONNXRUNTIME_CPU),
    "onnxruntime-cpu-integers": Form(ONNXRUNTIME_CPU_INTEGERS, only_with="MatMulInteger"),
}
ALWAYS = ("portable", "onnxruntime-cpu", "onnxruntime-cpu-integers")
"""The variants of every bundle that they are worth it for, the best one first."""


def rewrite(model: ir.Model, passes: Sequence[type[ir.passes.InPlacePass]]) -> ir.Model:
    """Apply rewrites in order, and drop what no output needs any more. The model is changed in place."""
    if not passes:
        return model
    InferElementTypes()(model)
    for each in passes:
        each()(model)
        RemoveUnusedNodesPass()(model)  # so that a value's users are those that count
    TopologicalSortPass()(model)
    return model
