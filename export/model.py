"""RetNet in torch: one set of weights, three forms of the same function, by the forms of retention in `retention.py`.

The state has the position, so the three forms agree for every cut of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retnet_export.export.retention import Norm, Retention
from retnet_export.graph.weights import ReadWeight, weight_shapes
from retnet_export.runtime.bundle.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": lambda x: F.gelu(x), "relu": F.relu}


@dataclass(frozen=True)
class State:
    """The state of a sequence.

    Attributes:
        position: tokens read so far, int64 (B,).
        layers: S of each layer, (B, H, Dk, Dv).
    """

    position: Tensor
    layers: tuple[Tensor, ...]


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.ffn_size, config.ffn_bias
        self.act: Callable[[Tensor], Tensor] = ACTIVATIONS[config.ffn_activation]
        self.gate = nn.Linear(width, size, bias=bias) if config.ffn == "glu" else None
        self.up = nn.Linear(width, size, bias=bias)
        inner = config.ffn_inner_norm
        self.inner_norm = None if inner == "none" else Norm(inner, size, config.norm_eps)
        self.down = nn.Linear(size, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        if self.inner_norm is not None:
            inner = self.inner_norm(inner)
        return cast(Tensor, self.down(inner))


class RetNetLayer(nn.Module):
    """Retention and feed-forward, each with its norm and residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.retention_norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.retention = Retention(config)
        self.ffn_norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.ffn = FeedForward(config)


class RetNet(nn.Module):
    """A RetNet language model.

    Args:
        dropout: applied to the embedding and to each block's output while training; a training detail, so not part of `config`.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = Norm(config.norm, config.hidden_size, config.norm_eps) if config.embedding_norm else None
        self.layers = nn.ModuleList(RetNetLayer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.norm, config.hidden_size, config.norm_eps) if config.final_norm else None
        self.head = None if config.tied_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_weights(cls, config: ModelConfig, read: ReadWeight, dtype: torch.dtype = torch.float32) -> RetNet:
        """Build the model in `dtype` from canonical weights (`weight_shapes`), reading one at a time."""
        with torch.device("meta"):
            model = cls(config)
        state = {name: torch.from_numpy(np.asarray(read(name), np.float64)).to(dtype) for name in weight_shapes(config)}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros, at position 0."""
        weight, config = self.embedding.weight, self.config
        shape = (batch, config.num_heads, config.head_key_dim, config.head_value_dim)
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        return State(
            position=torch.zeros(batch, dtype=torch.int64, device=weight.device),
            layers=tuple(torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(config.num_layers)),
        )

    def parallel(self, tokens: Tensor, clamp_rows: bool = True) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), as in training.

        Args:
            tokens: int64 (B, T).
            clamp_rows: with `score_norm`, apply the row clamp that only the parallel form has; False gives exactly what the
                other two forms compute.
        """
        position = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        angles = self._angles(position, tokens.shape[1])
        x = self._embed(tokens)
        for layer in self._layers():
            x = self._layer(layer, x, angles, clamp_rows)
        return self._logits(x)

    def _layer(self, layer: RetNetLayer, x: Tensor, angles: Tensor, clamp_rows: bool) -> Tensor:
        """One layer in parallel form, x (B, T, D)."""
        retention = partial(layer.retention.parallel, angles=angles, clamp_rows=clamp_rows)
        x = self._residual(x, layer.retention_norm, retention)
        return self._residual(x, layer.ffn_norm, layer.ffn)

    def chunk(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one chunk: logits (B, T, V) of tokens (B, T) after `state`, and the state after them."""
        angles = self._angles(state.position, tokens.shape[1])
        x = self._embed(tokens)
        after: list[Tensor] = []

        def retention(y: Tensor, module: Retention, before: Tensor) -> Tensor:
            o, left = module.chunkwise(y, angles, state.position, before)
            after.append(left)
            return o

        for layer, before in zip(self._layers(), state.layers, strict=True):
            x = self._residual(x, layer.retention_norm, partial(retention, module=layer.retention, before=before))
            x = self._residual(x, layer.ffn_norm, layer.ffn)
        return self._logits(x), State(state.position + tokens.shape[1], tuple(after))

    def chunkwise(self, tokens: Tensor, chunk_size: int, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) of tokens (B, T), read `chunk_size` at a time (the last chunk may be shorter)."""
        state = self.initial_state(tokens.shape[0]) if state is None else state
        logits: list[Tensor] = []
        for part in torch.split(tokens, chunk_size, 1):
            out, state = self.chunk(part, state)
            logits.append(out)
        return torch.cat(logits, 1), state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token: logits (B, V) of tokens (B,), and the state after it."""
        logits, state = self.chunk(tokens[:, None], state)
        return logits[:, 0], state

    def recurrent(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) of tokens (B, T), read one at a time."""
        return self.chunkwise(tokens, 1, state)

    def _layers(self) -> list[RetNetLayer]:
        return cast("list[RetNetLayer]", list(self.layers))

    def _angles(self, position: Tensor, length: int) -> Tensor:
        """Rotation of each token, float64 (B, T, Dk/2)."""
        theta = torch.from_numpy(self.config.theta).to(position.device)
        n = position[:, None] + torch.arange(length, device=position.device)
        return n[..., None].double() * theta

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return cast(Tensor, self.dropout(x))

    def _residual(self, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
        if self.config.post_norm:
            return cast(Tensor, norm(x * self.config.residual_scale + self.dropout(block(x))))
        return x * self.config.residual_scale + cast(Tensor, self.dropout(block(norm(x))))

    def _logits(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(x, weight)


def parallel_by_layer(
    config: ModelConfig,
    read: ReadWeight,
    tokens: Tensor,
    clamps: Sequence[bool] = (True,),
    progress: Callable[[float], None] = lambda share: None,
) -> list[Tensor]:
    """`RetNet.parallel` of a checkpoint in float32, with the weights of one layer in memory at a time.

    The parallel form lends itself to this: each layer sees the whole text at once, and is not needed again.

    Args:
        tokens: int64 (B, T).
        clamps: values of `clamp_rows`; all are computed in one pass over the weights.

    Returns:
        Logits (B, T, V), one for each of `clamps`.
    """
    with torch.device("meta"):
        model = RetNet(replace(config, num_layers=1)).eval()
    (layer,) = model._layers()

    def load(*prefixes: str) -> None:
        """Bring in the weights of these names; those of any layer go into the only one."""
        names = [name for name in weight_shapes(config) if name.startswith(prefixes)]
        weights = {re.sub(r"^layers\.\d+", "layers.0", name): np.asarray(read(name), np.float32) for name in names}
        model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False, assign=True)

    with torch.no_grad():
        load("embedding")
        angles = model._angles(torch.zeros(1, dtype=torch.int64), tokens.shape[1])
        streams = [model._embed(tokens)] * len(clamps)
        model.embedding.to("meta")
        for index in range(config.num_layers):
            load(f"layers.{index}.")
            streams = [model._layer(layer, x, angles, clamp) for x, clamp in zip(streams, clamps, strict=True)]
            progress((index + 1) / config.num_layers)
        layer.to("meta")
        load("norm.", "embedding.weight" if config.tied_embeddings else "head.")
        return [model._logits(x) for x in streams]
