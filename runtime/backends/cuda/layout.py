"""How a matrix lies on the device: the one definition, which the kernels that write and read it follow and NumPy tests hold.

A matrix W is (N, K): N outputs, K inputs, y = W x. Both are padded, N to whole tiles of 16 rows, K to whole runs; padding is zero.

The unit is a **run** of a **tile**: 16 rows by so many inputs, contiguous; a tile's runs follow each other, then comes the next
tile. A warp fetches whole runs, 2 or 1 KB at once: rows of a plain matrix, 128 bytes here and 128 there, cost a tenth of the
memory's speed (docs/lab/step-h100.md). In a run the bytes lie in the order in which the threads of a warp feed `mma.m16n8k16`, 16
bytes a thread:

**Floats** (float32, float16, bfloat16): 2,048 bytes, 32 inputs of float32, 64 of the others.

    [half 2][i 2][g 8][t 4][16 bytes]                       row of the tile = g + 8 · half; bytes number 4i + t of it

**Integers** (INT8, INT4): 1,024 bytes of values, 64 inputs of INT8, 128 of INT4; then the scales if there are any by group.

    values [half 2][g 8][t 4][16 bytes]                     row of the tile = g + 8 · half
    scales [group][g 8][half 2]                             groups of `granularity` inputs, 16 scales each

Thread t of a row's four holds, of every 32 inputs, two fours: inputs 4t … 4t+3 and 16+4t … 16+4t+3. The first four of all threads
are the 16 inputs of one mma, the second four those of the next. So the 16 bytes of a thread are

    INT8: inputs (4t …, 16+4t …) of the first 32 inputs, then of the second 32; a byte is the value + 128;
    INT4: a word of 32 bits for each of four times 32 inputs; its eight nibbles, from the lowest, are the elements 0 2 4 6 1 3 5 7
          of the eight; a nibble is the value + 8. So (word >> 4i) & 0x000f000f are the elements 2i and 2i + 1.

Activations that meet integers lie in shared memory in the order `place`, in which a thread's eight of 32 are neighbours.

**Scales**: one an output lies in a vector of its own, float32 (padded N); those by group stay in their type beside the values. A
group that does not divide a run has its scale repeated: `granularity` is the largest run of inputs that certainly share one.

**Interleaved rows**: in the product of gate and up, a tile has eight rows of gate and the same eight of up: row g of a tile is
gate, row g + 8 up, so that one tile has all that act(gate) · up needs. Such a matrix has 2F outputs; F is padded to a multiple of
eight.

bfloat16 is kept as its 16 bits (NumPy has no such type).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["float32", "float16", "bfloat16", "int8", "int4"]
FloatKind = Literal["float32", "float16", "bfloat16"]

TILE_ROWS = 16
RUN_COLUMNS: Mapping[Kind, int] = {"float32": 32, "float16": 64, "bfloat16": 64, "int8": 64, "int4": 128}
"""Inputs of a run: 128 bytes of each row of floats, 64 of integers."""
BITS: Mapping[Kind, int] = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
MMA_COLUMNS = 16
"""Inputs of one mma; a group of inputs that share a scale is a multiple of it."""
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a thread's eight elements each nibble of a word holds, from the lowest."""


@dataclass(frozen=True)
class MatrixLayout:
    """Where every weight of a matrix is.

    Attributes:
        rows: N, outputs; of an interleaved matrix 2F.
        columns: K, inputs.
        kind: how a weight is stored.
        group_size: inputs that share a scale; None: all of an output (INT8, INT4), or no scales (floats).
        scale: type of the scales by group.
        interleaved: whether rows alternate by eights between the first and the second half of the outputs.
    """

    rows: int
    columns: int
    kind: Kind
    group_size: int | None = None
    scale: FloatKind = "float32"
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size % MMA_COLUMNS or self.columns % self.group_size):
            raise ValueError(f"groups of {self.group_size} of {self.columns} inputs: expected a multiple of 16 that divides them")
        if self.interleaved and self.rows % 2:
            raise ValueError(f"{self.rows} interleaved outputs: expected an even number")

    @property
    def integer(self) -> bool:
        """Whether weights are integers with scales."""
        return BITS[self.kind] < 16

    @property
    def tiles(self) -> int:
        """Groups of 16 rows."""
        return -(-(self.rows // 2) // 8) if self.interleaved else -(-self.rows // TILE_ROWS)

    @property
    def padded_rows(self) -> int:
        """Rows on the device."""
        return self.tiles * TILE_ROWS

    @property
    def run(self) -> int:
        """Inputs of a run."""
        return RUN_COLUMNS[self.kind]

    @property
    def tile_runs(self) -> int:
        """Runs of a tile."""
        return -(-self.columns // self.run)

    @property
    def padded_columns(self) -> int:
        """The padded K."""
        return self.tile_runs * self.run

    @property
    def granularity(self) -> int:
        """Inputs that share a scale in a run; 0 without scales by group."""
        return 0 if self.group_size is None else math.gcd(self.group_size, self.run)

    @property
    def scales_in_run(self) -> int:
        """Scales of a row in a run."""
        return self.run // self.granularity if self.granularity else 0

    @property
    def run_bytes(self) -> int:
        """Bytes of one run of one tile, scales included."""
        values = TILE_ROWS * self.run * BITS[self.kind] // 8
        return values + self.scales_in_run * TILE_ROWS * BITS[self.scale] // 8

    @property
    def bytes(self) -> int:
        """Bytes of the matrix on the device, without the vector of scales by output."""
        return self.tiles * self.tile_runs * self.run_bytes

    @property
    def has_row_scales(self) -> bool:
        """Whether a float32 vector of scales, one an output, goes with it."""
        return self.integer and self.group_size is None


def source_rows(layout: MatrixLayout) -> NDArray[np.int64]:
    """Which output each row on the device is, (padded N,); -1 for padding."""
    row = np.arange(layout.padded_rows)
    if not layout.interleaved:
        return np.where(row < layout.rows, row, -1)
    half = layout.rows // 2
    within = row // TILE_ROWS * 8 + row % 8
    return np.where(within < half, within + half * (row // 8 % 2), -1)


def place(k: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the activation of input k lies for a matrix of integers: within 32, a thread's two fours become neighbours."""
    return k // 32 * 32 + k // 4 % 4 * 8 + k // 16 % 2 * 4 + k % 4


def device_bytes_from_floats(layout: MatrixLayout, weights: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Lay out a matrix of floats (N, K), of the layout's kind (bfloat16 as uint16): uint8 (layout.bytes,)."""
    padded = np.zeros((layout.padded_rows, layout.padded_columns), weights.dtype)
    rows = source_rows(layout)
    padded[rows >= 0, : layout.columns] = weights[rows[rows >= 0]]
    # (tile, half, g, run, i, t, 16 bytes) -> (tile, run, half, i, g, t, 16 bytes)
    pieces = padded.view(np.uint8).reshape(layout.tiles, 2, 8, layout.tile_runs, 2, 4, 16).transpose(0, 3, 1, 4, 2, 5, 6)
    return np.ascontiguousarray(pieces).reshape(-1)


def device_bytes_from_integers(
    layout: MatrixLayout, values: NDArray[np.int8], scales: NDArray[np.generic] | None = None
) -> NDArray[np.uint8]:
    """Lay out a matrix of integers.

    Args:
        layout: where to.
        values: (N, K), -128 … 127 or -8 … 7.
        scales: (N, K / group_size) of the layout's scale type (bfloat16 as uint16); None without groups.

    Returns:
        uint8 (layout.bytes,).
    """
    bits, rows = BITS[layout.kind], source_rows(layout)
    zero = 1 << (bits - 1)
    padded = np.full((layout.padded_rows, layout.padded_columns), zero, np.uint8)
    padded[rows >= 0, : layout.columns] = (values[rows[rows >= 0]].astype(np.int16) + zero).astype(np.uint8)
    # (tile, half, g, run, 32s, second four, t, four) -> (tile, run, half, g, t, 32s, eight)
    shaped = padded.reshape(layout.tiles, 2, 8, layout.tile_runs, layout.run // 32, 2, 4, 4)
    eights = shaped.transpose(0, 3, 1, 2, 6, 4, 5, 7).reshape(layout.tiles, layout.tile_runs, 2, 8, 4, layout.run // 32, 8)
    if bits == 4:
        nibbles = eights[..., list(NIBBLE_ORDER)]
        eights = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    content = eights.reshape(layout.tiles, layout.tile_runs, -1)
    if scales is not None:
        of_inputs = np.repeat(scales, layout.group_size or 1, axis=1)[:, :: layout.granularity]  # (N, K / granularity)
        every = np.zeros((layout.padded_rows, layout.tile_runs * layout.scales_in_run), scales.dtype)
        every[rows >= 0, : of_inputs.shape[1]] = of_inputs[rows[rows >= 0]]
        by_run = every.reshape(layout.tiles, 2, 8, layout.tile_runs, layout.scales_in_run).transpose(0, 3, 4, 2, 1)
        tail = np.ascontiguousarray(by_run).view(np.uint8).reshape(layout.tiles, layout.tile_runs, -1)
        content = np.concatenate([content, tail], axis=2)
    return np.ascontiguousarray(content).reshape(-1)


def floats_from_device_bytes(
    layout: MatrixLayout, content: NDArray[np.uint8], row_scales: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The weights, (N, K) float32, that a product with these bytes uses: the inverse of the two above.

    Args:
        layout: where they are.
        content: uint8 (layout.bytes,).
        row_scales: (padded N,), of a layout that has them.
    """
    if not layout.integer:
        pieces = content.reshape(layout.tiles, layout.tile_runs, 2, 2, 8, 4, 16).transpose(0, 2, 4, 1, 3, 5, 6)
        padded = _floats(np.ascontiguousarray(pieces).reshape(-1), layout.kind).reshape(layout.padded_rows, -1)
    else:
        runs = content.reshape(layout.tiles, layout.tile_runs, layout.run_bytes)
        values = TILE_ROWS * layout.run * BITS[layout.kind] // 8
        eights = runs[..., :values].reshape(layout.tiles, layout.tile_runs, 2, 8, 4, layout.run // 32, BITS[layout.kind])
        if layout.kind == "int4":
            nibbles = np.stack([eights & 15, eights >> 4], axis=-1).reshape(*eights.shape[:-1], 8)
            eights = nibbles[..., np.argsort(NIBBLE_ORDER)]
        split = eights.reshape(*eights.shape[:-1], 2, 4)  # (tile, run, half, g, t, 32s, second four, four)
        order = split.transpose(0, 2, 3, 1, 5, 6, 4, 7).reshape(layout.padded_rows, layout.padded_columns)
        padded = order.astype(np.float32) - np.float32(1 << (BITS[layout.kind] - 1))
        if layout.granularity:
            scales = _floats(np.ascontiguousarray(runs[..., values:]).reshape(-1), layout.scale)
            by_run = scales.reshape(layout.tiles, layout.tile_runs, layout.scales_in_run, 8, 2).transpose(0, 4, 3, 1, 2)
            padded *= np.repeat(by_run.reshape(layout.padded_rows, -1), layout.granularity, axis=1)
        elif row_scales is not None:
            padded *= row_scales[:, None]
    rows = source_rows(layout)
    weights = np.empty((layout.rows, layout.columns), np.float32)
    weights[rows[rows >= 0]] = padded[rows >= 0, : layout.columns]
    return weights


def _floats(content: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    if kind == "bfloat16":
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return content.view(np.float16 if kind == "float16" else np.float32).astype(np.float32)
