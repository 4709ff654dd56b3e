"""RMSNorm as the graphs spell it, for rewrites that replace it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from retnet_export.graph.variants.pattern import inputs_of, number, only_user


@dataclass(frozen=True)
class RmsNorm:
    """x / √(mean x² + eps) · weight over the last axis.

    Attributes:
        x: what is normalised.
        weight: the learnt scale (size,), or None.
        eps: the epsilon.
        result: the normalised value.
    """

    x: ir.Value
    weight: ir.Value | None
    eps: float
    result: ir.Value


def match_rms_norm(divide: ir.Node) -> RmsNorm | None:
    """The norm whose Div this is."""
    if divide.op_type != "Div":
        return None
    x, root = divide.inputs
    inside = inputs_of(root, "Sqrt")
    total = inputs_of(inside[0], "Add") if inside else None
    mean = inputs_of(total[0], "ReduceMean") if total else None
    square = inputs_of(mean[0], "Pow") if mean else None
    eps = number(total[1]) if total else None
    if square is None or square[0] is not x or eps is None or x is None:
        return None
    result, weight = divide.outputs[0], None
    scale = only_user(result, "Mul")
    if scale is not None and scale.inputs[1] is not None and scale.inputs[1].const_value is not None:
        result, weight = scale.outputs[0], scale.inputs[1]
    return RmsNorm(x, weight, eps, result)
