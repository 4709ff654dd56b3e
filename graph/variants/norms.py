"""RMSNorm as one operator, with the residual sum in front of it where there is one.

Rule: `x + y` and the norm after it are one kernel, `SkipSimplifiedLayerNormalization`, which gives the sum as well. The
residual stream then has the format of the products, so no cast stands between them; the norm itself is summed in float32
(the backend asks for the provider's strict mode).

    y16 ─ Cast ─ + ─┬─ Pow … Mul ─ Cast ─ n16            x16 ─┬─ SkipSimplifiedLayerNormalization ─┬─ n16
              x ─┘  └─ next residual              ->     y16 ─┘                                    └─ next residual
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.pattern import (
    MICROSOFT,
    constant,
    inputs_of,
    narrowed,
    number,
    only_user,
    scope_of,
    substitute,
)


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


class ResidualNormPass(ir.passes.InPlacePass):
    """Replace norms of the residual stream, and keep the stream in the format of the products."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        narrow: dict[ir.Value, ir.Value] = {}
        widened: list[tuple[ir.Value, ir.Value]] = []
        for node in list(graph):
            norm = match_rms_norm(node)
            if norm is None or norm.weight is None:
                continue
            casts = [user for user in norm.result.consumers() if user.op_type == "Cast"]
            types = {ir.DataType(cast.attributes["to"].as_int()) for cast in casts}
            if len(types) != 1 or len(casts) != len(norm.result.consumers()) or norm.result.is_graph_output():
                continue
            (dtype,) = types
            w = Inserter(graph, node, scope_of(node))
            weight = in_type(w, norm.weight, dtype)
            normed, total = _write(w, norm, weight, dtype, narrow)
            if total is not None:
                narrow[norm.x] = total
                widened.append((norm.x, total))
            for cast in casts:
                substitute(cast.outputs[0], normed)
        for wide, total in widened:
            # What still reads the float32 sum, if anything does; else the cast is dead and goes with the other dead nodes.
            producer = total.producer()
            assert producer is not None
            after = ir.node("Cast", [total], {"to": ir.DataType.FLOAT}, name=f"{total.name}.float32")
            after.outputs[0].name, after.outputs[0].type = f"{total.name}.float32", ir.TensorType(ir.DataType.FLOAT)
            graph.insert_after(producer, after)
            substitute(wide, after.outputs[0])
        return ir.passes.PassResult(model, bool(widened))


def _write(
    w: Inserter, norm: RmsNorm, weight: ir.Value, dtype: ir.DataType, narrow: dict[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value | None]:
    """The new nodes: the normalised value and, after a residual sum, the sum."""

    def stream(value: ir.Value, name: str) -> ir.Value:
        before = narrowed(value)
        if value in narrow:
            return narrow[value]
        return before[0] if before is not None and before[1] == dtype else w.cast(value, dtype, name)

    parts = inputs_of(norm.x, "Add")
    if parts is None or any(part.const_value is not None for part in parts):
        x = stream(norm.x, "norm_input")
        return w.op("SimplifiedLayerNormalization", x, weight, name="normed", dtype=dtype, epsilon=norm.eps, axis=-1), None
    x, y = stream(parts[0], "residual_input"), stream(parts[1], "residual_addend")
    normed, _, _, total = w.op_n(
        "SkipSimplifiedLayerNormalization",
        x,
        y,
        weight,
        names=["normed", "", "", "residual"],
        dtypes=[dtype] * 4,
        domain=MICROSOFT,
        epsilon=norm.eps,
    )
    return normed, total


def in_type(w: Inserter, weight: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A norm's weight in another format, kept inside the ONNX file."""
    array = constant(weight)
    if weight.dtype == dtype or array is None:
        return weight
    return w.initializer(array.astype(dtype.numpy()), f"{weight.name}.{dtype.name.lower()}")
