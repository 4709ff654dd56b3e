"""The largest logits as outputs of the graph, so that choosing a token moves a few bytes and not the vocabulary.

Rule: outputs `top_logits` and `top_tokens`, (B, k), largest first; `logits` stays an output.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from retnet_export.graph.dialects.pattern import Writer

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
        if len(logits.shape) != 2:  # logits after every token are for evaluation
            return ir.passes.PassResult(model, False)
        batch, vocab_size = logits.shape
        count = min(TOP, int(vocab_size))  # type: ignore[arg-type]
        w = Writer(graph, producer, "top")
        k = w.initializer(np.array([count], np.int64), "top_count")
        values, tokens = w.op_n(
            "TopK",
            logits,
            k,
            names=["logits", "tokens"],
            dtypes=[ir.DataType.FLOAT, ir.DataType.INT64],
            axis=-1,
            largest=1,
            sorted=1,
        )
        node = values.producer()
        assert node is not None
        graph.remove(node)
        graph.insert_after(producer, node)
        for value, name in ((values, "top_logits"), (tokens, "top_tokens")):
            value.name, value.shape = name, ir.Shape([batch, count])
            graph.outputs.append(value)
        return ir.passes.PassResult(model, True)
