"""Dialects: a graph rewritten for one runtime, where that runtime has operators of its own that are faster.

Rule: a dialect is a list of rewrites over the portable graph, each a module that names its pattern. A rewrite that does not
find its pattern (a LayerNorm, a family's bias) leaves that part portable, so every model has every dialect.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from retnet_export.graph.dialects.casts import SinkCastsPass
from retnet_export.graph.dialects.element_types import InferElementTypes
from retnet_export.graph.dialects.gates import GatedNormPass, SwishPass
from retnet_export.graph.dialects.linear_attention import LinearAttentionPass, StatePiecesPass
from retnet_export.graph.dialects.norms import ResidualNormPass
from retnet_export.graph.dialects.products import MatMulNBitsPass
from retnet_export.graph.dialects.retention import GatedDeltaNetPass, RotaryEmbeddingPass, ValueMajorStatePass
from retnet_export.graph.dialects.skip_norms import SkipNormPass
from retnet_export.graph.dialects.splits import SplitRowsPass
from retnet_export.graph.dialects.sums import SumAsAddPass
from retnet_export.graph.dialects.top import TopLogitsPass

ONNXRUNTIME_CUDA: Sequence[type[ir.passes.InPlacePass]] = (
    SumAsAddPass,
    SinkCastsPass,
    RotaryEmbeddingPass,
    SinkCastsPass,
    ValueMajorStatePass,
    GatedDeltaNetPass,
    GatedNormPass,
    SinkCastsPass,
    ResidualNormPass,
    SwishPass,
    SplitRowsPass,
    MatMulNBitsPass,
    TopLogitsPass,
)
"""In this order: casts are moved out of the way first, and the head norm is gated before the other norms are looked for."""

ONNXRUNTIME_CPU: Sequence[type[ir.passes.InPlacePass]] = (RotaryEmbeddingPass, StatePiecesPass, LinearAttentionPass, SkipNormPass)
"""What was measured to help (docs/quantization.md): of these operators, those for gates and GatedDeltaNet are slow on a CPU."""

DIALECTS: dict[str, Sequence[type[ir.passes.InPlacePass]]] = {
    "portable": (),
    "onnxruntime-cpu": ONNXRUNTIME_CPU,
    "onnxruntime-cuda": ONNXRUNTIME_CUDA,
}


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
