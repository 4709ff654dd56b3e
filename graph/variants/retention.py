"""How the retention of a layer is found in the portable graphs, of a step and of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.variants.pattern import constant, inputs_of, only_user


@dataclass(frozen=True)
class Step:
    """One layer's retention in the decode graph.

    Attributes:
        q, k: (B, H, Dk).
        v: (B, H, Dv).
        state, state_after: the graph's input and output.
        o: the read, (B, H, Dv).
        gamma: the decay of each head, (H,).
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    state: ir.Value
    state_after: ir.Value
    o: ir.Value
    gamma: NDArray[np.generic]


@dataclass(frozen=True)
class Chunk(Step):
    """The same in the prefill graph: q, k, v and o have an axis of tokens, (B, C, H, …).

    Attributes:
        within, since_state, to_end, whole: the powers of γ that all layers share (`graph/prefill.py`).
    """

    within: ir.Value
    since_state: ir.Value
    to_end: ir.Value
    whole: ir.Value


def match_step(state: ir.Value, after: ir.Value) -> Step | None:
    """after = Add(Mul(state, γ), Mul(k, v)) and o = Squeeze(MatMul(q, after))."""
    terms = inputs_of(after, "Add")
    decayed, outer = (inputs_of(terms[0], "Mul"), inputs_of(terms[1], "Mul")) if terms else (None, None)
    reads = [user for user in after.consumers() if user.op_type == "MatMul"]
    if decayed is None or outer is None or decayed[0] is not state or len(reads) != 1:
        return None
    squeeze = only_user(reads[0].outputs[0], "Squeeze")
    lines = [inputs_of(value, "Unsqueeze") for value in (reads[0].inputs[0], *outer)]
    gamma = constant(decayed[1])
    if squeeze is None or any(each is None for each in lines) or gamma is None or gamma.ndim != 3:
        return None
    # γ is written once a row of the state: it is the head's.
    if (gamma != gamma[:, :1, :1]).any():
        return None
    q, k, v = (each[0] for each in lines if each is not None)
    return Step(q, k, v, state, after, squeeze.outputs[0], gamma[:, 0, 0])


def match_chunk(state: ir.Value, after: ir.Value) -> Chunk | None:
    """after = Add(Mul(state, γⁿ), MatMul(Mul(kᵀ, ζ), v)) and o = Transpose(Add(MatMul(scores, v), MatMul(Mul(q, ξ), state)))."""
    terms = inputs_of(after, "Add")
    decayed, update = (inputs_of(terms[0], "Mul"), inputs_of(terms[1], "MatMul")) if terms else (None, None)
    power = inputs_of(decayed[1], "Exp") if decayed else None
    log = inputs_of(power[0], "Mul") if power else None
    log_gamma = constant(log[1]) if log else None
    key = inputs_of(_at(update, 0), "Mul")
    k, v = inputs_of(_at(key, 0), "Transpose"), inputs_of(_at(update, 1), "Transpose")
    reads = [user for user in state.consumers() if user.op_type == "MatMul"]
    query = inputs_of(reads[0].inputs[0], "Mul") if len(reads) == 1 else None
    q = inputs_of(_at(query, 0), "Transpose")
    total = only_user(reads[0].outputs[0], "Add") if len(reads) == 1 else None
    o = None if total is None else only_user(total.outputs[0], "Transpose")
    inner = inputs_of(total.inputs[0], "MatMul") if total is not None else None
    scores = inputs_of(_at(inner, 0), "Mul")
    if not (decayed and key and query and scores and q and k and v) or o is None or log_gamma is None or decayed[0] is not state:
        return None
    gamma = np.exp(log_gamma.astype(np.float64)).astype(np.float32).reshape(-1)
    return Chunk(
        q=q[0],
        k=k[0],
        v=v[0],
        state=state,
        state_after=after,
        o=o.outputs[0],
        gamma=gamma,
        within=scores[1],
        since_state=query[1],
        to_end=key[1],
        whole=decayed[1],
    )


def _at(values: Sequence[ir.Value] | None, index: int) -> ir.Value | None:
    return values[index] if values else None
