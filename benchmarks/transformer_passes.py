"""Rewrites that make the benchmarks' Transformer fast on ONNX Runtime's CUDA provider: fused norms and gates, fewer casts.

Rule: Reshape, Split and Gather of a cast value are the cast of their results; `x + y` and the norm after it are one kernel, which
gives the sum as well, in the format of the products; `swish(x)` is `QuickGelu` with α = 1.
"""

from __future__ import annotations

import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.graph.variants.norms import RmsNorm, match_rms_norm
from retnet_export.graph.variants.pattern import MICROSOFT, constant, inputs_of, narrowed, scope_of, substitute

MOVES_DATA = frozenset({"Reshape", "Split", "Gather"})


class SinkCastsPass(ir.passes.InPlacePass):
    """Move casts to float32 down, as far as they go."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type == "Cast" and node.inputs[0] is not None:
                wide = narrowed(node.inputs[0])
                if wide is not None and wide[1] == node.outputs[0].dtype and not node.outputs[0].is_graph_output():
                    substitute(node.outputs[0], wide[0])
                    modified = True
                continue
            before = narrowed(node.inputs[0]) if node.op_type in MOVES_DATA and node.domain == "" and node.inputs[0] else None
            if before is None:
                continue
            source, dtype = before
            outputs = list(node.outputs)
            moved = ir.node(
                node.op_type,
                [source, *node.inputs[1:]],
                dict(node.attributes.items()),
                num_outputs=len(outputs),
                name=f"{node.name}.narrow",
            )
            graph.insert_before(node, moved)
            for old, new in zip(outputs, moved.outputs, strict=True):
                new.name, new.type = f"{old.name}.narrow", ir.TensorType(dtype)
                cast = ir.node("Cast", [new], {"to": ir.DataType.FLOAT}, name=f"{old.name}.float32")
                cast.outputs[0].name, cast.outputs[0].type = f"{old.name}.float32", ir.TensorType(ir.DataType.FLOAT)
                graph.insert_before(node, cast)
                substitute(old, cast.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)


def swish_input(value: ir.Value) -> ir.Value | None:
    """x of Mul(x, Sigmoid(x))."""
    factors = inputs_of(value, "Mul")
    inner = inputs_of(factors[1], "Sigmoid") if factors else None
    return factors[0] if factors and inner and inner[0] is factors[0] else None


class SwishPass(ir.passes.InPlacePass):
    """Cast(Mul(swish(Cast(gate)), Cast(up))) -> Mul(QuickGelu(gate), up)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            factors = inputs_of(node.inputs[0], "Mul") if node.op_type == "Cast" else None
            wide = swish_input(factors[0]) if factors else None
            gate, up = (None, None) if factors is None or wide is None else (narrowed(wide), narrowed(factors[1]))
            if gate is None or up is None or not gate[1] == up[1] == node.outputs[0].dtype:
                continue
            w = Inserter(graph, node, scope_of(node))
            act = w.op("QuickGelu", gate[0], name="act_narrow", dtype=gate[1], domain=MICROSOFT, alpha=1.0)
            substitute(node.outputs[0], w.op("Mul", act, up[0], name="gated_narrow", dtype=gate[1]))
            modified = True
        return ir.passes.PassResult(model, modified)


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
