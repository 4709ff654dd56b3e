"""The RetNet as an ONNX graph: embedding, layers, head. Decode and prefill differ in retention alone, which they bring."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import onnx_ir as ir

from retnet_export.graph.blocks import feed_forward, norm
from retnet_export.graph.builder import Value
from retnet_export.graph.element_types import name_of_type
from retnet_export.graph.states import chunks_in_place, layout_of, steps_in_place
from retnet_export.graph.writer import Writer
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import GraphSpec, TensorSpec
from retnet_export.runtime.errors import PrecisionWarning

OPSET = 20
"""TensorRT 10.3 (JetPack 6.1) parses up to 20; blocked quantization raises it to 21."""

LONGEST_HALF_PRECISION_MEMORY = 1024
"""Tokens that a head may remember, 1/(1 - γ), for a float16 state to hold it within one percent (docs/lab/quantization.md)."""


def warn_of_slow_heads(config: ModelConfig, state: str) -> None:
    """Warn if a float16 state is requested and heads remember longer than it can hold."""
    slow = int((1 / (1 - config.gamma) > LONGEST_HALF_PRECISION_MEMORY).sum())
    if state == "fp16" and slow:
        warnings.warn(
            f"state fp16: {slow} of {config.num_heads} heads remember more than {LONGEST_HALF_PRECISION_MEMORY:,} tokens "
            f"(up to {1 / (1 - config.gamma.max()):,.0f}); in measurements a float16 state of such heads was off by 4 % to "
            "30 %; use fp32 (docs/lab/quantization.md, State)",
            PrecisionWarning,
            stacklevel=3,
        )


def embed(w: Writer, tokens: Value) -> Value:
    """tokens int64 (lead…) -> the residual stream, float32 (lead…, D)."""
    b, config = w.b, w.config
    x = w.cast_up(b.op("Gather", w.table(), tokens, name="embedding", axis=0), "embedding")
    if config.embedding_scale != 1.0:
        x = b.op("Mul", x, b.scalar(config.embedding_scale, "embedding_scale"), name="embedding.scaled")
    return norm(w, x, "embedding_norm", config.norm, config.norm_eps) if config.embedding_norm else x


def residual(w: Writer, x: Value, name: str, block: Callable[[Value], Value]) -> Value:
    """x + block(norm(x)), or norm(α·x + block(x)) with `post_norm`."""
    b, config = w.b, w.config
    norm_name = f"{name}_norm"
    y = block(x if config.post_norm else norm(w, x, norm_name, config.norm, config.norm_eps))
    if config.residual_scale != 1.0:
        x = b.op("Mul", x, b.scalar(config.residual_scale, "residual_scale"), name=f"{name}.residual_scaled")
    total = b.op("Add", x, y, name=f"{name}.residual")
    return norm(w, total, norm_name, config.norm, config.norm_eps) if config.post_norm else total


def layers(w: Writer, x: Value, retain: Callable[[int, Value], Value]) -> Value:
    """All layers; `retain(index, x)` writes one layer's retention in its scope."""
    for index in range(w.config.num_layers):
        with w.b.scope(f"layers.{index}"):

            def retention(y: Value, index: int = index) -> Value:
                with w.b.scope("retention"):
                    return retain(index, y)

            x = residual(w, x, "retention", retention)
            x = residual(w, x, "ffn", lambda y: feed_forward(w, y))
    return x


def logits(w: Writer, x: Value) -> Value:
    """x (lead…, D) -> float32 (lead…, V). A tied head is the embedding itself, stored once, (V, D)."""
    b, config = w.b, w.config
    if config.final_norm:
        x = norm(w, x, "norm", config.norm, config.norm_eps)
    if not config.tied_embeddings:
        return w.linear(x, "head")
    many = len(w.lead) > 1  # a Gemm takes matrices
    rows = b.op("Reshape", x, b.shape(-1, config.hidden_size), name="head.rows") if many else x
    y = w.cast_up(b.op("Gemm", w.cast_down(rows, "head"), w.table(), name="head", transB=1), "head")
    if not many:
        return y
    lead = b.op("Shape", x, name="head.lead", start=0, end=len(w.lead))
    shape = b.op("Concat", lead, b.shape(config.vocab_size), name="head.shape", axis=0)
    return b.op("Reshape", y, shape, name="head.of_rows")


def graph_spec(model: ir.Model, file: str, chunk_size: int) -> GraphSpec:
    """What the manifest says of a graph."""

    def spec(value: Value) -> TensorSpec:
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        return TensorSpec(
            value.name, name_of_type(value.dtype), tuple(size if isinstance(size, int) else -1 for size in value.shape)
        )

    graph = model.graph
    return GraphSpec(
        file=file,
        opset=graph.opset_imports[""],
        inputs=tuple(spec(value) for value in graph.inputs),
        outputs=tuple(spec(value) for value in graph.outputs),
        chunk_size=chunk_size,
        state_layout=layout_of(model),
        steps_in_place=steps_in_place(model),
        chunks_in_place=chunks_in_place(model),
    )
