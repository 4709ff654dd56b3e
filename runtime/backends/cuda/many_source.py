"""Which kernels a model needs for many rows at once, and their source: constants of the model, then instances of kernels/*.cuh.

A row is a token of a sequence: a batch of steps has one a sequence, a prompt has many of one. A product has an instance for each
width, the number of rows that a tile covers, up to the next of `WIDTHS`; more rows are more tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Literal

from retnet_export.runtime.backends.cuda.layout import MatrixLayout
from retnet_export.runtime.bundle.config import ModelConfig

WINDOW = 28
"""Steps between two writings of the state. Of 16, 24 and 28, 28 was the fastest on an H100 at batches of 8 and 64
(docs/lab/gpu-batches.md); with 32 a multiprocessor has room for two blocks of the state's stream instead of three."""
DRAFTS = 16
"""Tokens of a pass beyond what the state takes, whose keys and values are kept for the next pass."""
WIDTHS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Span:
    """How the prompt's retention is cut: tokens and columns of the state that a block takes at a time, spans on the way at once."""

    tokens: int
    columns: int
    buffers: int
    warps: int


SPANS = (Span(32, 32, 2, 16), Span(32, 32, 1, 16), Span(16, 32, 1, 8), Span(16, 16, 1, 8), Span(16, 8, 1, 8))
"""The fastest first."""


@dataclass(frozen=True)
class Few:
    """How the retention of a few tokens is cut: tokens of a sequence, and columns of the state that a block takes, at most."""

    tokens: int
    columns: int


FEWS = (Few(32, 32), Few(16, 32), Few(16, 16), Few(16, 8), Few(8, 8))
"""The widest first."""
STEP_COLUMNS = (32, 16, 8)
ROW_KERNELS = ("norm", "inner", "heads")
Operand = Literal["F32", "F16", "BF16"]
Result = Literal["PLAIN", "GLU", "ACT"]
FORMATS: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "int4": "I4"}
OPERANDS: Mapping[str, Operand] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "F16", "int4": "F16"}
"""What activations are rounded to, by the format of the matrix that they meet. Integers are exact in fp16."""
OPERAND_BYTES: Mapping[Operand, int] = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Limits:
    """What the kernels need to know of a GPU: shared memory that a block may have, and how many multiprocessors there are."""

    shared_bytes: int
    multiprocessors: int


@dataclass(frozen=True)
class Tiling:
    """How a product is shared out (kernels/product.cuh says what the fields are)."""

    warps: tuple[int, int, int]
    tiles: tuple[int, int]
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        a, b, c = self.warps
        return 32 * a * b * c

    @property
    def outputs(self) -> int:
        """Tiles of 16 outputs of a block."""
        return self.warps[0] * self.tiles[0]

    @property
    def rows(self) -> int:
        return 8 * self.warps[1] * self.tiles[1]


def tiling(layout: MatrixLayout, width: int, limits: Limits) -> Tiling:
    """The tiling of a product for rows up to `width`, with as many stages as fit, four at most."""
    warps, tiles, blocks = _shape(layout, width, limits)
    a, b, c = warps
    stage = stage_bytes(layout, a * tiles[0], 8 * b * tiles[1], c)
    target = limits.shared_bytes if blocks == 1 else min(limits.shared_bytes, 112 << 10)
    return Tiling(warps, tiles, max(2, min(4, target // stage)), blocks)


def _shape(layout: MatrixLayout, width: int, limits: Limits) -> tuple[tuple[int, int, int], tuple[int, int], int]:
    """Warps over outputs, rows and inputs; tiles of a warp; blocks a multiprocessor."""
    if width == 16 and layout.integer:
        return (2, 1, 4), (1, 2), 2  # an H100's 16 rows of 1.5B in INT4: 1.48 ms instead of 1.64 (fp16: no difference)
    if width <= 16:
        return (1, 1, 4), (2, width // 8), 2
    if width == 32:
        return (2, 1, 2), (2, 4), 2
    if width == 64 or layout.kind == "float32":
        # Outputs of a block: 64, or 32 where there would be too few blocks to keep the memory busy.
        return (2, 1, 2), (2 if layout.tiles >= 4 * 1.3 * limits.multiprocessors else 1, 8), 2
    if width == 128 or layout.integer:
        return (2, 2, 1), (4, 8), 2
    return (2, 4, 1), (4, 8), 1  # the larger a tile, the less is fetched twice: fp16 is bound by the second-level cache otherwise


def stage_bytes(layout: MatrixLayout, tiles: int, rows: int, runs: int) -> int:
    """Shared memory of one stage of a product."""
    operand = OPERAND_BYTES[OPERANDS[layout.kind]]
    return runs * (tiles * layout.run_bytes + rows * layout.run * operand)


def shared_bytes(layout: MatrixLayout, tile: Tiling) -> int:
    a, b, c = tile.warps
    ring = tile.stages * stage_bytes(layout, tile.outputs, tile.rows, c)
    return max(ring, (c - 1) * a * b * tile.tiles[0] * tile.tiles[1] * 4 * 32 * 4)


@dataclass(frozen=True)
class Format:
    """What a kernel must know of a matrix: its format, the inputs that share a scale, the type of the scales."""

    kind: str
    grain: int
    scale: Operand

    @property
    def arguments(self) -> str:
        return f"{FORMATS[self.kind]}, {self.grain}, {self.scale}"

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.grain}_{self.scale}".lower()


def format_of(layout: MatrixLayout) -> Format:
    grain = layout.granularity
    return Format(layout.kind, grain, OPERANDS[layout.scale] if grain else "F16")


def prompt_bytes(config: ModelConfig, span: Span) -> int:
    """Shared memory of the prompt's retention; as PromptShared of kernels/retention_prompt.cuh."""
    rows = -(-config.head_key_dim // 16) * 16
    row, wide = rows + (40 - rows % 32) % 32, span.columns + (36 - span.columns % 32) % 32
    tokens = 2 * span.tokens * row + span.tokens * wide
    return 4 * (span.buffers * tokens + span.tokens * (span.tokens + (40 - span.tokens % 32) % 32) + rows * wide)


def few_bytes(config: ModelConfig, few: Few) -> int:
    """Shared memory of the retention of a few tokens; as FewShared of kernels/retention_few.cuh."""
    rows = -(-config.head_key_dim // 4) * 4
    key = rows if rows // 4 % 2 else rows + 4
    return 4 * (rows * few.columns + few.tokens * (rows + key + few.columns))


def step_bytes(config: ModelConfig, columns: int) -> int:
    """Shared memory of the step's retention; as StepShared of kernels/retention_step.cuh."""
    vector = 1 if config.head_value_dim % 4 else 4
    groups = 256 * vector // columns
    rows = -(-config.head_key_dim // (4 * groups)) * 4 * groups
    return 2 * 4 * (rows * columns + rows + WINDOW + WINDOW * columns)


@dataclass(frozen=True)
class ManySource:
    """The source for one model.

    Attributes:
        config: the architecture.
        layouts: of every matrix, by its name in the bundle.
        limits: of the GPU.
    """

    config: ModelConfig
    layouts: Mapping[str, MatrixLayout]
    limits: Limits

    def result_of(self, name: str) -> Result:
        """What the product with this matrix gives."""
        if name.endswith("ffn.gate_up.weight"):
            return "GLU"
        return "ACT" if name.endswith("ffn.up.weight") else "PLAIN"

    def operand_after(self, name: str) -> Operand:
        """Type of the result of a feed-forward's first product: the operand of its second, unless a norm stands between."""
        if self.result_of(name) == "PLAIN" or self.config.ffn_inner_norm != "none":
            return "F32"
        return OPERANDS[self.layouts[name.rsplit(".", 2)[0] + ".down.weight"].kind]

    def product_name(self, name: str, width: int) -> str:
        form = format_of(self.layouts[name])
        tile = tiling(self.layouts[name], width, self.limits)
        shape = "x".join(map(str, (*tile.warps, *tile.tiles)))
        return f"product_{form.name}_{self.result_of(name)}_{self.operand_after(name)}_{shape}".lower()

    @cached_property
    def span(self) -> Span:
        return next(span for span in SPANS if prompt_bytes(self.config, span) <= self.limits.shared_bytes)

    @cached_property
    def few(self) -> Few:
        return next(few for few in FEWS if few_bytes(self.config, few) <= self.limits.shared_bytes)

    @cached_property
    def step_columns(self) -> int:
        return next(columns for columns in STEP_COLUMNS if step_bytes(self.config, columns) <= self.limits.shared_bytes)

    @property
    def step_blocks(self) -> int:
        """Blocks of the step's retention that a multiprocessor holds: what shared memory and registers allow."""
        return max(1, min(3, (self.limits.shared_bytes + 2048) // (step_bytes(self.config, self.step_columns) + 2048)))

    @property
    def powers(self) -> int:
        """γ's powers that the kernels read, from the zeroth."""
        return max(WINDOW, self.span.tokens, self.few.tokens) + 1

    @property
    def exact(self) -> bool:
        """Whether retention's products are as good as float32's: then projections are, too."""
        return self.layouts["layers.0.retention.projections.weight"].kind == "float32"

    def text(self, width: int) -> str:
        """The source, for NVRTC: of the products of a width, or for width 0 of everything else."""
        parts = ("common", "product") if width else ("common", "rows", "retention_step", "retention_few", "retention_prompt", "top")
        headers = [_without_includes(files(__package__).joinpath("kernels").joinpath(f"{name}.cuh").read_text()) for name in parts]
        instances = self._products(width) if width else self._others()
        return "\n".join(
            ["#pragma nv_diag_suppress 177  // a module uses some of the constants", *self._constants(), *headers, *instances, ""]
        )

    def _products(self, width: int) -> list[str]:
        products = set()
        for name, layout in self.layouts.items():
            if name == "embedding.weight" and not self.config.tied_embeddings:
                continue
            tile = tiling(layout, width, self.limits)
            shape = ", ".join(map(str, (*tile.warps, *tile.tiles)))
            products.add(
                f"PRODUCT({self.product_name(name, width)}, {format_of(layout).arguments}, {shape}, 1, "
                f"{tile.stages}, {tile.blocks}, {self.result_of(name)}, {self.operand_after(name)})"
            )
        return sorted(products)

    def _others(self) -> list[str]:
        operands = sorted({OPERANDS[layout.kind] for layout in self.layouts.values()})
        exact, span = "true" if self.exact else "false", self.span
        return [
            *(f"{kernel.upper()}({kernel}_{operand.lower()}, {operand})" for kernel in ROW_KERNELS for operand in operands),
            f"EMBED(embed, {format_of(self.layouts['embedding.weight']).arguments})",
            f"ROTATE(rotate, {'false' if self.exact else 'true'})",
            f"RETENTION_FEW(retention_few, {self.few.tokens}, {self.few.columns})",
            f"RETENTION_PROMPT(retention_prompt, {span.tokens}, {span.columns}, {span.buffers}, {span.warps}, {exact})",
        ]

    def _constants(self) -> list[str]:
        c = self.config
        integers = {
            "D": c.hidden_size,
            "H": c.num_heads,
            "G": c.num_kv_heads,
            "DK": c.head_key_dim,
            "DV": c.head_value_dim,
            "F": c.ffn_size,
            "V": c.vocab_size,
            "LAYERS": c.num_layers,
            "GATED": int(c.output_gate),
            "ACTIVATION": ("silu", "gelu", "relu").index(c.ffn_activation),
            "NORM_LAYER": int(c.norm == "layer"),
            "EMBEDDING_NORM": int(c.embedding_norm),
            "POST_NORM": int(c.post_norm),
            "INNER_NORM": ("none", "rms", "layer").index(c.ffn_inner_norm),
            "HEAD_LAYER": int(c.head_norm == "layer"),
            "HEAD_AFFINE": ("none", "shared", "per_head").index(c.head_norm_affine),
            "SCORE_NORM": int(c.score_norm),
            "WINDOW": WINDOW,
            "DRAFTS": DRAFTS,
            "POWERS": self.powers,
            "STEP_COLUMNS": self.step_columns,
            "STEP_BLOCKS": self.step_blocks,
        }
        floats = {
            "NORM_EPS": c.norm_eps,
            "HEAD_EPS": c.head_norm_eps / c.score_scale**2,
            "EMBEDDING_SCALE": c.embedding_scale,
            "RESIDUAL_SCALE": c.residual_scale,
        }
        return [f"constexpr int {name} = {value};" for name, value in integers.items()] + [
            f"constexpr float {name} = {value!r}f;"
            if "." in repr(value) or "e" in repr(value)
            else f"constexpr float {name} = {value}.f;"
            for name, value in floats.items()
        ]


def _without_includes(text: str) -> str:
    """A header as part of one text: NVRTC finds no files."""
    return "\n".join(line for line in text.splitlines() if not line.startswith(("#include", "#pragma once")))
