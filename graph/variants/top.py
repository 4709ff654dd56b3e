"""The largest logits as outputs of the graph, so that choosing a token moves a few bytes and not the vocabulary.

Rule: outputs `top_logits` and `top_tokens`, (B, k), in prefill (B, R, k), largest first; `logits` stays an output. If any logit of
a row is not finite, all its `top_logits` are NaN: what TopK does with a NaN differs from kernel to kernel, and one that it left out
would go unseen.

    logits (…, V) ─┬─ TopK ──────────────── values ─ Add ─ top_logits (…, k)
                   └─ ReduceSum ─ ·0 (…, 1) ──────────┘
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from retnet_export.graph.inserter import Inserter

TOP = 64
"""How many; a vocabulary smaller than this gives all of it."""


class TopLogitsPass(ir.passes.InPlacePass):
    """Append TopK."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = next(value for value in graph.outputs if value.name == "logits")
        producer = logits.producer()
        assert producer is not None
        assert logits.shape is not None
        *lead, vocab_size = logits.shape
        count = min(TOP, int(vocab_size))  # type: ignore[arg-type]
        w = Inserter(graph, producer, "top")
        k = w.initializer(np.array([count], np.int64), "top_count")
        # Nodes are put in order at the end.
        names, dtypes = ["largest_logits", "tokens"], [ir.DataType.FLOAT, ir.DataType.INT64]
        largest, tokens = w.op_n("TopK", logits, k, names=names, dtypes=dtypes, axis=-1, largest=1, sorted=1)
        last_axis, zero = w.initializer(np.array([-1], np.int64), "top_axis"), w.initializer(np.array(0, np.float32), "top_zero")
        total = w.op("ReduceSum", logits, last_axis, name="sum", dtype=ir.DataType.FLOAT, keepdims=1)
        nothing = w.op("Mul", total, zero, name="zero_if_finite", dtype=ir.DataType.FLOAT)
        values = w.op("Add", largest, nothing, name="logits", dtype=ir.DataType.FLOAT)
        for value, name in ((values, "top_logits"), (tokens, "top_tokens")):
            value.name, value.shape = name, ir.Shape([*lead, count])
            graph.outputs.append(value)
        return ir.passes.PassResult(model, True)
