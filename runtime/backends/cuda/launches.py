"""A run of many rows as a list of launches: which kernels, in which order, with which parameters. Nothing here calls CUDA.

A layer is eight launches: norm, q k v gate, retention, head norms and gates, output, norm, gate and up, down. Retention is one of
three: steps of a batch keep the last keys and values in rings (kernels/retention_step.cuh, two launches), a few tokens of a
sequence meet its state together (retention_few.cuh), and longer prompts go chunk by chunk (retention_prompt.cuh, two launches).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from retnet_export.runtime.backends.cuda.layout import MatrixLayout
from retnet_export.runtime.backends.cuda.many_source import (
    OPERANDS,
    WIDTHS,
    ManySource,
    few_bytes,
    prompt_bytes,
    shared_bytes,
    step_bytes,
    tiling,
)
from retnet_export.runtime.backends.cuda.structures import (
    Advance,
    Embed,
    Heads,
    Inner,
    Norm,
    Product,
    RetentionFew,
    RetentionPrompt,
    RetentionStep,
    Ring,
    Rotate,
    Top,
)

ROW_THREADS, TOP_THREADS, RING_THREADS, FEW_THREADS = 256, 1024, 128, 256
PARTS, PART_ROWS = 8, 2048
"""Parts that the inputs of a product with few outputs are cut into, at most; and rows of all parts together, but for one part."""
PADDING = 128
"""Operands of a row are padded to a multiple of this, the inputs of the longest run."""


@dataclass(frozen=True)
class DeviceMatrix:
    """A matrix on the device: its layout, its address, and that of its scales by output (0 without)."""

    layout: MatrixLayout
    address: int
    row_scales: int = 0


@dataclass(frozen=True)
class DeviceModel:
    """A model's weights on the device, by their names in the bundle; vectors are float32, biases in the order of device rows."""

    source: ManySource
    matrices: Mapping[str, DeviceMatrix]
    vectors: Mapping[str, int]


@dataclass(frozen=True)
class Launch:
    """One kernel of a list.

    Attributes:
        kernel: its name.
        width: of the products that it is compiled with; 0 of all that is no product.
        grid, threads, shared: blocks, threads a block, bytes of dynamic shared memory.
        parameters: its structure.
        overlaps: whether it may begin while the kernel in front still runs.
    """

    kernel: str
    width: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: ctypes.Structure
    overlaps: bool = True


@dataclass(frozen=True)
class Run:
    """What a list does; runs that are equal have the same list, as long as the buffers stay where they are.

    Attributes:
        kind: a step of a batch, a few tokens of each slot, or a prompt.
        slots: in use.
        rows: of all slots together, padded; of a step, one a slot.
        wanted: rows whose logits are made.
        choose: whether the largest of these are chosen.
    """

    kind: Literal["step", "few", "prompt"]
    slots: int
    rows: int
    wanted: int
    choose: bool = True


@dataclass(frozen=True)
class Addresses:
    """Where a run's buffers are (buffers.py).

    Attributes:
        slots, tokens, slot_of, index_of, lengths, needed, starts, kept, picked, places: what the host says of the run.
        x, angles, projections, rotated, weights, o, added, hidden: activations, float32; `weights` are the rings' q·k.
        logits: (wanted, V).
        powers, log_gamma, phase: tables of the model.
    """

    slots: int
    tokens: int
    slot_of: int
    index_of: int
    lengths: int
    needed: int
    starts: int
    kept: int
    picked: int
    places: int
    x: int
    angles: int
    projections: int
    rotated: int
    weights: int
    o: int
    added: int
    hidden: int
    logits: int
    powers: int
    log_gamma: int
    phase: int


class LaunchList:
    """The launches of one run.

    Args:
        model: the weights.
        at: the buffers.
        operands: of products, by width and type: address, and elements from one row to the next.
        run: what to do.
    """

    def __init__(self, model: DeviceModel, at: Addresses, operands: Mapping[tuple[int, str], tuple[int, int]], run: Run) -> None:
        self._model, self._at, self._by_width, self._run = model, at, operands, run
        self._source, self._config = model.source, model.source.config
        self._launches: list[Launch] = []

    def make(self) -> list[Launch]:
        """All of them, in order."""
        c = self._config
        self._embed()
        parts = 0
        for layer in range(c.num_layers):
            parts = self._layer(layer, parts)
        head = "embedding.weight" if c.tied_embeddings else "head.weight"
        if c.post_norm:
            self._norm(f"layers.{c.num_layers - 1}.ffn_norm", parts, head, normed=True, keep=True)
            parts = 0
        if self._run.wanted:
            self._head(head, parts)
        if self._run.kind != "step":
            self._add("advance", (1, 1, 1), 256, Advance(self._at.slots, self._at.lengths, self._run.slots))
        return self._launches

    def _layer(self, layer: int, parts: int) -> int:
        """A layer's launches after `parts` sums that the one in front left to add; how many it leaves itself."""
        c, at, work = self._config, f"layers.{layer}", self._at
        before = f"layers.{layer - 1}.ffn_norm" if c.post_norm else f"{at}.retention_norm"
        first, out = f"{at}.retention.projections.weight", f"{at}.retention.out.weight"
        x = self._norm(before, parts, first, normed=not c.post_norm or layer > 0, keep=layer > 0)
        self._product(first, x, work.projections, projections_width(self._source), self._run.rows)
        self._retention(layer)
        parts = self._product(out, self._heads(layer), work.added, c.hidden_size, self._run.rows, split=True)
        up = f"{at}.ffn.gate_up.weight" if c.ffn == "glu" else f"{at}.ffn.up.weight"
        down = f"{at}.ffn.down.weight"
        x = self._norm(f"{at}.retention_norm" if c.post_norm else f"{at}.ffn_norm", parts, up, normed=True, keep=True)
        hidden, stride = self._operands(c.ffn_size, down)
        integer = self._model.matrices[down].layout.integer
        if c.ffn_inner_norm == "none":
            self._product(up, x, hidden, stride, self._run.rows, placed=integer)
        else:
            self._product(up, x, work.hidden, c.ffn_size, self._run.rows)
            weight, bias = self._vector(f"{at}.ffn.inner_norm.weight"), self._vector(f"{at}.ffn.inner_norm.bias")
            parameters = Inner(work.hidden, weight, bias, hidden, stride, integer)
            self._add(f"inner_{self._operand(down).lower()}", (self._run.rows, 1, 1), ROW_THREADS, parameters)
        return self._product(down, hidden, work.added, c.hidden_size, self._run.rows, split=True)

    def _add(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        parameters: ctypes.Structure,
        shared: int = 0,
        overlaps: bool = True,
    ) -> None:
        self._launches.append(Launch(kernel, 0, grid, threads, shared, parameters, overlaps))

    def _vector(self, name: str) -> int:
        return self._model.vectors.get(name, 0)

    def _operand(self, matrix: str) -> str:
        return OPERANDS[self._model.matrices[matrix].layout.kind]

    def _operands(self, width: int, matrix: str) -> tuple[int, int]:
        """Where the operands of so many inputs of the product with a matrix are, and elements from one row to the next."""
        return self._by_width[width, self._operand(matrix)]

    def _embed(self) -> None:
        at, table = self._at, self._model.matrices["embedding.weight"]
        parameters = Embed(
            table.address, table.row_scales, self._vector("embedding_norm.weight"), self._vector("embedding_norm.bias"), at.phase,
            at.tokens, at.slots, at.slot_of, at.index_of, at.x, at.angles, table.layout.tile_runs,
        )  # fmt: skip
        self._add("embed", (self._run.rows, 1, 1), ROW_THREADS, parameters, overlaps=False)

    def _norm(self, name: str, parts: int, before: str, *, normed: bool, keep: bool, gather: int = 0) -> int:
        """The operand of the product with the matrix `before`, of all rows or of those picked."""
        out, stride = self._operands(self._config.hidden_size, before)
        picked = self._at.picked if gather and self._run.kind != "step" else 0
        parameters = Norm(
            self._at.x, self._at.added, self._vector(f"{name}.weight"), self._vector(f"{name}.bias"), out, picked, parts,
            self._run.rows, stride, normed, keep, self._model.matrices[before].layout.integer,
        )  # fmt: skip
        self._add(f"norm_{self._operand(before).lower()}", (gather or self._run.rows, 1, 1), ROW_THREADS, parameters)
        return out

    def _retention(self, layer: int) -> None:
        c, at, run, source = self._config, self._at, self._run, self._source
        asked = at.slots, at.o, at.lengths, at.needed, at.starts
        if run.kind == "step":
            ring = Ring(at.projections, at.angles, at.powers, at.rotated, at.weights, at.slots, layer)
            self._add("ring_step", (c.num_heads, run.slots, 1), RING_THREADS, ring)
            self._launches.append(retention_step(source, at, run.slots, layer))
        elif run.kind == "few":
            grid = -(-c.head_value_dim // source.few.columns), c.num_heads, run.slots
            few = RetentionFew(at.projections, at.angles, at.powers, *asked, at.kept, layer)
            self._add("retention_few", grid, FEW_THREADS, few, few_bytes(c, source.few))
        else:
            self._add("rotate", (run.rows, 1, 1), ROW_THREADS, Rotate(at.projections, at.angles, at.rotated))
            grid = -(-c.head_value_dim // source.span.columns), c.num_heads, run.slots
            prompt = RetentionPrompt(at.rotated, at.projections, at.powers, *asked, layer)
            self._add("retention_prompt", grid, 32 * source.span.warps, prompt, prompt_bytes(c, source.span))

    def _heads(self, layer: int) -> int:
        """The operand of the output's product: heads normed and gated."""
        c, at, name = self._config, self._at, f"layers.{layer}.retention"
        matrix = f"{name}.out.weight"
        out, stride = self._operands(c.value_size, matrix)
        parameters = Heads(
            at.o, at.projections, self._vector(f"{name}.head_norm.weight"), self._vector(f"{name}.head_norm.bias"), at.log_gamma,
            at.slots, at.slot_of, at.index_of, out, stride, self._run.rows, self._model.matrices[matrix].layout.integer,
        )  # fmt: skip
        blocks = -(-self._run.rows * c.num_heads // 8)
        self._add(f"heads_{self._operand(matrix).lower()}", (blocks, 1, 1), ROW_THREADS, parameters)
        return out

    def _head(self, head: str, parts: int) -> None:
        wanted, at = self._run.wanted, self._at
        x = self._norm("norm", parts, head, normed=self._config.final_norm, keep=False, gather=wanted)
        self._product(head, x, at.logits, self._config.vocab_size, wanted)
        if self._run.choose:
            self._add("top", (wanted, 1, 1), TOP_THREADS, Top(at.logits, at.slots, at.places, self._run.kind == "step"))

    def _product(self, name: str, x: int, y: int, y_stride: int, rows: int, *, split: bool = False, placed: bool = False) -> int:
        """Add a product; how many parts its inputs were cut into, whose sums stand one after another."""
        matrix, limits = self._model.matrices[name], self._source.limits
        layout = matrix.layout
        width = self._width(layout, rows)
        tile = tiling(layout, width, limits)
        blocks = -(-layout.tiles // tile.outputs) * -(-rows // tile.rows)
        stages = -(-layout.tile_runs // tile.warps[2])
        most = min(most_parts(rows), stages // 2, round(tile.blocks * limits.multiprocessors / blocks))
        parts = max(1, most) if split else 1
        bias = self._vector(name.removesuffix("weight") + "bias")
        parameters = Product(
            matrix.address, matrix.row_scales, bias, x, y, rows, layout.rows, layout.tile_runs, padded(layout.columns), y_stride,
            parts, placed,
        )  # fmt: skip
        grid = -(-rows // tile.rows), -(-layout.tiles // tile.outputs), parts
        kernel, shared = self._source.product_name(name, width), shared_bytes(layout, tile)
        self._launches.append(Launch(kernel, width, grid, tile.threads, shared, parameters))
        return parts

    def _width(self, layout: MatrixLayout, rows: int) -> int:
        """Rows that a product's tile covers; the largest only where there are blocks enough for it."""
        if rows <= WIDTHS[-2]:
            return next(width for width in WIDTHS if rows <= width)
        tile = tiling(layout, WIDTHS[-1], self._source.limits)
        blocks = -(-layout.tiles // tile.outputs) * -(-rows // tile.rows)
        return WIDTHS[-1] if blocks >= 2 * self._source.limits.multiprocessors else WIDTHS[-2]


def retention_step(source: ManySource, at: Addresses, slots: int, layer: int, *, fold: bool = False) -> Launch:
    """A layer's retention of a step, or only bringing its state up to date."""
    parameters = RetentionStep(at.slots, at.powers, at.rotated, at.weights, at.o, layer, slots)
    units = -(-source.config.head_value_dim // source.step_columns) * source.config.num_heads * slots
    blocks = min(units, source.limits.multiprocessors * source.step_blocks)
    shared = step_bytes(source.config, source.step_columns)
    return Launch("retention_fold" if fold else "retention_step", 0, (blocks, 1, 1), 256, shared, parameters, overlaps=not fold)


def projections_width(source: ManySource) -> int:
    """Outputs of the joined product of q, k, v and gate."""
    return source.layouts["layers.0.retention.projections.weight"].rows


def most_parts(rows: int) -> int:
    """Parts that the inputs of a product may be cut into."""
    return max(1, min(PARTS, PART_ROWS // rows))


def padded(columns: int) -> int:
    """Elements from one row of operands to the next."""
    return -(-columns // PADDING) * PADDING
