"""Many rows at once: steps of a batch, prompts, and logits at chosen rows, each a list of launches, captured once and replayed.

A row is a token of a slot. A step has one row a slot; a prompt's rows are packed, so that padding costs nothing. The state is
written every `WINDOW` steps: until then the keys and values of the last steps stand in rings, and `fold` brings it up to date
(before prompts, and before the host reads or writes it). All that changes between two runs of the same list lies in device memory,
the places of the batch among it: so all batches of a model share captured runs, constants and workspace.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.cuda.layout import MatrixLayout
from retnet_export.runtime.backends.cuda.many_source import (
    OPERAND_BYTES,
    OPERANDS,
    WIDTHS,
    WINDOW,
    ManySource,
    Operand,
    prompt_bytes,
    shared_bytes,
    step_bytes,
    tiling,
)
from retnet_export.runtime.device import cuda, kernels

KEPT = 64
"""Largest logits that the device chooses."""
ROWS_AT_ONCE = 1024
"""Rows of one run; longer prompts are read in pieces, which changes nothing but rounding."""
LOGITS_AT_ONCE = 256
"""Rows of one run whose logits are asked for."""
ROW_THREADS, TOP_THREADS, RING_THREADS = 256, 1024, 128
GRAPHS_KEPT = 32
PARTS, PART_ROWS = 8, 2048
"""Parts that the inputs of a product with few outputs are cut into, at most; and rows of all parts together, but for one part."""
FEW_ROWS = 128
"""A run of so few rows is captured at once, since its launches take longer than the GPU needs; a larger one when it comes again."""
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


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A kernel's parameters: "p" is an address, "i" an int, in the order of the struct in kernels/*.cuh."""
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kinds[kind]) for field, kind in pairs]})


Product = _struct("Product", "weights:p scales:p bias:p x:p y:p tokens:i outputs:i runs:i x_stride:i y_stride:i parts:i placed:i")
Embed = _struct(
    "Embed", "table:p row_scales:p norm_weight:p norm_bias:p phase:p tokens:p slots:p slot_of:p index_of:p x:p angles:p runs:i"
)
Norm = _struct("Norm", "x:p added:p weight:p bias:p out:p rows:p parts:i total:i stride:i normed:i keep:i placed:i")
Inner = _struct("Inner", "hidden:p weight:p bias:p out:p stride:i placed:i")
Heads = _struct(
    "Heads", "o:p projections:p weight:p bias:p log_gamma:p slots:p slot_of:p index_of:p out:p stride:i total:i placed:i"
)
Advance = _struct("Advance", "slots:p lengths:p count:i")
Ring = _struct("Ring", "projections:p angles:p powers:p queries:p weights:p slots:p layer:i")
RetentionStep = _struct("RetentionStep", "slots:p powers:p queries:p weights:p o:p layer:i count:i")
Rotate = _struct("Rotate", "projections:p angles:p rotated:p")
RetentionPrompt = _struct("RetentionPrompt", "rotated:p projections:p powers:p slots:p o:p lengths:p needed:p starts:p layer:i")
Top = _struct("Top", "logits:p slots:p places:p step:i")
Slots = _struct("Slots", "state:p positions:p keys:p values:p counters:p logits:p found:p tokens:p largest:p batch:i")


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


Launcher = Callable[[Launch], None]


class Workspace:
    """Buffers for so many rows; operands are kept apart by width and type, so that their padding stays zero."""

    def __init__(self, stream: cuda.Stream, source: ManySource, rows: int) -> None:
        c = source.config
        self.rows, self._stream = rows, stream
        projections = 2 * (c.num_heads + c.num_kv_heads) * (c.head_key_dim // 2) + c.num_kv_heads * c.head_value_dim
        projections += c.value_size if c.output_gate else 0
        self._buffers: dict[str, cuda.DeviceBuffer] = {}
        self.projections_width = projections
        self.x = self._floats("x", rows * c.hidden_size)
        self.angles = self._floats("angles", rows * c.head_key_dim)
        self.projections = self._floats("projections", rows * projections)
        self.rotated = self._floats("rotated", rows * (c.num_heads + c.num_kv_heads) * c.head_key_dim)
        self.weights = self._floats("weights", rows * c.num_heads * WINDOW)
        self.o = self._floats("o", rows * c.value_size)
        self.added = self._floats("added", most_parts(rows) * rows * c.hidden_size)
        self.hidden = self._floats("hidden", rows * c.ffn_size) if c.ffn_inner_norm != "none" else 0
        self.tokens = self._bytes("tokens", rows * 8)
        self.slot_of = self._bytes("slot_of", rows * 4)
        self.index_of = self._bytes("index_of", rows * 4)

    def operands(self, width: int, kind: Operand) -> tuple[int, int]:
        """Address of operands (rows, width) of a type, and elements from one row to the next."""
        stride = -(-width // PADDING) * PADDING
        return self._bytes(f"{width} {kind}", self.rows * stride * OPERAND_BYTES[kind]), stride

    def _floats(self, name: str, count: int) -> int:
        return self._bytes(name, 4 * count)

    def _bytes(self, name: str, size: int) -> int:
        if name not in self._buffers:
            self._buffers[name] = cuda.DeviceBuffer(size)
            self._stream.fill(self._buffers[name], 0)
        return self._buffers[name].address

    def copy_in(self, name: str, array: NDArray[np.generic]) -> None:
        self._stream.copy_to_device(self._buffers[name], np.ascontiguousarray(array))


class ManyBatch:
    """A batch of sequences, as the kernels know it.

    Args:
        many: what runs it.
        batch: B, slots.
        state: address of the states (B, L, H, Dk, Dv), float32.
        positions: address of (B,) int64.

    Attributes:
        found, tokens, largest: of the last step or prompt: how many of the largest logits were found (-1: look at all), and
            these, (B,), (B, KEPT), (B, KEPT); on the host, once the stream has got there.
        logits: on the device, (B, V).
        since: steps that the state does not have yet.
    """

    def __init__(self, many: Many, batch: int, state: int, positions: int, logits: int) -> None:
        c = many.source.config
        self.found, found = kernels.mapped((batch,), np.int32)
        self.tokens, tokens = kernels.mapped((batch, KEPT), np.int32)
        self.largest, largest = kernels.mapped((batch, KEPT), np.float32)
        self._counters = cuda.DeviceBuffer(8)
        many.stream.fill(self._counters, 0)
        self._rings: tuple[cuda.DeviceBuffer, cuda.DeviceBuffer] | None = None
        self._ring_bytes = (
            4 * c.num_layers * batch * c.num_kv_heads * WINDOW * c.head_key_dim,
            4 * c.num_layers * batch * (c.num_kv_heads * WINDOW * c.head_value_dim),
        )
        self.batch, self.since = batch, 0
        self.structure = Slots(state, positions, 0, 0, self._counters.address, logits, found, tokens, largest, batch)

    def with_rings(self) -> None:
        """Room for the last steps; before the first one, since prompts need none."""
        if self._rings is None:
            self._rings = cuda.DeviceBuffer(self._ring_bytes[0]), cuda.DeviceBuffer(self._ring_bytes[1])
            self.structure.keys, self.structure.values = self._rings[0].address, self._rings[1].address

    def folded(self, stream: cuda.Stream) -> None:
        """The state has all steps."""
        stream.fill(self._counters, 0, 4, 4)
        self.since = 0


class Many:
    """Runs of many rows with one model's weights; one at a time, and whoever asks holds `cuda.LOCK` until its results are its own.

    Args:
        model: the weights.
        launch: puts a launch on `stream`.
        stream: the CUDA stream.
    """

    def __init__(self, model: DeviceModel, launch: Launcher, stream: cuda.Stream) -> None:
        self.source, self.stream = model.source, stream
        self._model, self._launch = model, launch
        c = self._config = model.source.config
        self._powers = self._upload(np.power(c.gamma[:, None], np.arange(self.source.powers)).astype(np.float32))
        self._log_gamma = self._upload(np.log(c.gamma).astype(np.float32))
        self._phase = self._upload(np.rint(c.theta / (2 * np.pi) * 2.0**32).astype(np.int64).astype(np.uint32))
        self._slots = cuda.DeviceBuffer(ctypes.sizeof(Slots))
        self._works: dict[bool, Workspace] = {}
        self._graphs: OrderedDict[tuple[int, ...], cuda.Graph] = OrderedDict()
        self._seen: set[tuple[int, ...]] = set()  # large runs that were made once
        self._room = 0

    def step(self, batch: ManyBatch, tokens: NDArray[np.int64]) -> None:
        """One token for each of the first slots, (slots,)."""
        slots = len(tokens)
        batch.with_rings()
        work = self._work(slots, prompt=False)
        self._enter(batch, slots, slots)
        work.copy_in("tokens", np.asarray(tokens, np.int64))
        self._run((0, slots, slots), lambda: self._list(work, slots, slots, 0, slots))
        batch.since += 1

    def prefill(self, batch: ManyBatch, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Tokens (S, C) of the first slots, of which the state takes `lengths` (S,); the batch gets the logits after the last."""
        rows = np.where(lengths > 0, lengths - 1, -1)[:, None]
        self._read(batch, tokens, lengths, rows, None)

    def score(
        self, batch: ManyBatch, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """As `prefill`; logits (S, R, V) at `rows` (S, R) of each slot's tokens, which the state need not take."""
        scores = np.zeros((*rows.shape, self._config.vocab_size), np.float32)
        self._read(batch, tokens, lengths, rows, scores)
        return scores

    def fold(self, batch: ManyBatch) -> None:
        """Bring the state up to date; the rings are empty afterwards."""
        if batch.since:
            self._enter(batch, batch.batch, 0)
            work = self._work(batch.batch, prompt=False)
            for layer in range(self._config.num_layers):
                self._launch(self._retention_step(work, batch.batch, layer, fold=True))
            batch.folded(self.stream)

    def _read(
        self,
        batch: ManyBatch,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: NDArray[np.int64],
        scores: NDArray[np.float32] | None,
    ) -> None:
        needed = np.maximum(lengths, rows.max(1, initial=-1) + 1)
        self.fold(batch)
        begun = np.zeros(len(tokens), np.int64)
        for take in pieces(lengths, needed, rows.shape[1]):
            ends = begun + take
            slot, place = np.nonzero((rows >= begun[:, None]) & (rows < ends[:, None]))
            starts = np.cumsum(take) - take
            picked = (starts[slot] + rows[slot, place] - begun[slot]).astype(np.int32)
            order = np.argsort(picked, kind="stable") if scores is None else np.arange(len(picked))
            piece = Piece(
                tokens=np.concatenate([row[first:end] for row, first, end in zip(tokens, begun, ends, strict=True)]),
                slot_of=np.repeat(np.arange(len(tokens), dtype=np.int32), take),
                index_of=np.concatenate([np.arange(count, dtype=np.int32) for count in take]),
                lengths=np.clip(lengths - begun, 0, take),
                needed=take.astype(np.int32),
                starts=starts.astype(np.int32),
                picked=picked[order],
                places=slot[order].astype(np.int32),
            )
            logits = self._piece(batch, piece, choose=scores is None)
            if scores is not None and len(picked):
                host = np.empty((len(picked), self._config.vocab_size), np.float32)
                self.stream.copy_to_host(host, logits)
                self.stream.synchronize()
                scores[slot, place] = host
            begun = ends
        self.stream.synchronize()  # the host arrays go with this call

    def _piece(self, batch: ManyBatch, piece: Piece, *, choose: bool) -> cuda.DeviceBuffer:
        rows, slots, wanted = len(piece.tokens), len(piece.lengths), len(piece.picked)
        padded = padded_rows(rows)
        work = self._work(padded, prompt=True)
        self._enter(batch, slots, wanted)
        for name, array in (("tokens", piece.tokens), ("slot_of", piece.slot_of), ("index_of", piece.index_of)):
            work.copy_in(name, np.concatenate([array, np.zeros(padded - rows, array.dtype)]))
        for buffer, values in ((self._lengths, piece.lengths), (self._needed, piece.needed), (self._starts, piece.starts)):
            self.stream.copy_to_device(buffer, values)
        if wanted:
            self.stream.copy_to_device(self._wanted, piece.picked)
            self.stream.copy_to_device(self._places, piece.places)
        kind = 2 if int(piece.needed.max()) <= self.source.short_span.tokens else 1
        key = (kind, slots, padded, wanted, choose)
        self._run(key, lambda: self._list(work, slots, padded, kind, wanted, choose=choose))
        return self._logits

    def _enter(self, batch: ManyBatch, slots: int, wanted: int) -> None:
        """From now on the kernels work on this batch."""
        self._make_room(max(slots, wanted))
        self.stream.copy_to_device(self._slots, np.frombuffer(bytes(batch.structure), np.uint8))

    def _make_room(self, rows: int) -> None:
        """Buffers for so many slots and rows of logits; captured runs know the old ones."""
        if rows <= self._room:
            return
        self.stream.synchronize()
        self._graphs.clear()
        self._room = rows = max(8, 1 << (rows - 1).bit_length())
        self._wanted, self._places = cuda.DeviceBuffer(4 * rows), cuda.DeviceBuffer(4 * rows)
        self._identity = self._upload(np.arange(rows, dtype=np.int32))
        self._lengths, self._needed, self._starts = (cuda.DeviceBuffer(size * rows) for size in (8, 4, 4))
        self._logits = cuda.DeviceBuffer(4 * rows * self._config.vocab_size)

    def _work(self, rows: int, *, prompt: bool) -> Workspace:
        """The workspace of steps or of prompts, for at least so many rows."""
        if prompt not in self._works or self._works[prompt].rows < rows:
            self.stream.synchronize()
            self._graphs.clear()
            self._works.pop(prompt, None)
            work = self._works[prompt] = Workspace(self.stream, self.source, rows)
            if not prompt:
                work.copy_in("slot_of", np.arange(rows, dtype=np.int32))
            self.stream.synchronize()
        return self._works[prompt]

    def _run(self, key: tuple[int, ...], make: Callable[[], list[Launch]]) -> None:
        if (captured := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            self.stream.launch(captured)
            return
        launches = make()
        for launch in launches:
            self._launch(launch)  # the run itself; what is captured after it does not run
        if key[2] > FEW_ROWS and key not in self._seen:
            self._seen.add(key)
            return
        with self.stream.capture() as graph:
            for launch in launches:
                self._launch(launch)
        self._graphs[key] = graph
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)

    def _list(self, work: Workspace, slots: int, rows: int, prompt: int, wanted: int, *, choose: bool = True) -> list[Launch]:
        """Launches of a run: prompt 0 is a step, 1 a prompt, 2 a prompt of few tokens a slot."""
        c, vectors = self._config, self._model.vectors
        launches: list[Launch] = []
        add = launches.append

        def vector(name: str) -> int:
            return vectors.get(name, 0)

        embedding = self._model.matrices["embedding.weight"]
        add(
            Launch("embed", 0, (rows, 1, 1), ROW_THREADS, 0,
                Embed(embedding.address, embedding.row_scales, vector("embedding_norm.weight"), vector("embedding_norm.bias"),
                    self._phase.address, work.tokens, self._slots.address, work.slot_of, work.index_of, work.x, work.angles,
                    embedding.layout.tile_runs), overlaps=False)
        )  # fmt: skip

        def norm(name: str, parts: int, before: str, *, normed: bool, keep: bool, gather: int = 0) -> int:
            """The operand of the product with the matrix `before`."""
            kind = OPERANDS[self._model.matrices[before].layout.kind]
            out, stride = work.operands(c.hidden_size, kind)
            add(
                Launch(f"norm_{kind.lower()}", 0, (gather or rows, 1, 1), ROW_THREADS, 0,
                    Norm(work.x, work.added, vector(f"{name}.weight"), vector(f"{name}.bias"), out,
                        self._wanted.address if gather and prompt else 0, parts, rows, stride, normed, keep,
                        self._model.matrices[before].layout.integer))
            )  # fmt: skip
            return out

        head = "embedding.weight" if c.tied_embeddings else "head.weight"
        parts = 0
        for layer in range(c.num_layers):
            at = f"layers.{layer}"
            first = f"{at}.retention.projections.weight"
            before = f"layers.{layer - 1}.ffn_norm" if c.post_norm else f"{at}.retention_norm"
            x = norm(before, parts, first, normed=not c.post_norm or layer > 0, keep=layer > 0)
            self._product(add, first, x, work.projections, work.projections_width, rows)
            if prompt:
                span = self.source.short_span if prompt == 2 else self.source.span
                add(Launch("rotate", 0, (rows, 1, 1), ROW_THREADS, 0, Rotate(work.projections, work.angles, work.rotated)))
                add(
                    Launch("retention_short" if prompt == 2 else "retention_prompt", 0,
                        (-(-c.head_value_dim // span.columns), c.num_heads, slots), 32 * span.warps, prompt_bytes(c, span),
                        RetentionPrompt(work.rotated, work.projections, self._powers.address, self._slots.address, work.o,
                            self._lengths.address, self._needed.address, self._starts.address, layer))
                )  # fmt: skip
            else:
                add(
                    Launch("ring_step", 0, (c.num_heads, slots, 1), RING_THREADS, 0,
                        Ring(work.projections, work.angles, self._powers.address, work.rotated, work.weights, self._slots.address,
                            layer))
                )  # fmt: skip
                add(self._retention_step(work, slots, layer))
            out = f"{at}.retention.out.weight"
            kind = OPERANDS[self._model.matrices[out].layout.kind]
            y, _ = work.operands(c.value_size, kind)
            heads = self._heads(work, layer, rows)
            add(Launch(f"heads_{kind.lower()}", 0, (-(-rows * c.num_heads // 8), 1, 1), ROW_THREADS, 0, heads))
            parts = self._product(add, out, y, work.added, c.hidden_size, rows, split=True)
            up = f"{at}.ffn.gate_up.weight" if c.ffn == "glu" else f"{at}.ffn.up.weight"
            down = f"{at}.ffn.down.weight"
            x = norm(f"{at}.retention_norm" if c.post_norm else f"{at}.ffn_norm", parts, up, normed=True, keep=True)
            kind, integer = OPERANDS[self._model.matrices[down].layout.kind], self._model.matrices[down].layout.integer
            hidden, stride = work.operands(c.ffn_size, kind)
            if c.ffn_inner_norm == "none":
                self._product(add, up, x, hidden, stride, rows, placed=integer)
            else:
                self._product(add, up, x, work.hidden, c.ffn_size, rows)
                add(
                    Launch(f"inner_{kind.lower()}", 0, (rows, 1, 1), ROW_THREADS, 0,
                        Inner(work.hidden, vector(f"{at}.ffn.inner_norm.weight"), vector(f"{at}.ffn.inner_norm.bias"), hidden,
                            stride, integer))
                )  # fmt: skip
            parts = self._product(add, down, hidden, work.added, c.hidden_size, rows, split=True)
        if c.post_norm:
            norm(f"layers.{c.num_layers - 1}.ffn_norm", parts, head, normed=True, keep=True)
            parts = 0
        if wanted:
            x = norm("norm", parts, head, normed=c.final_norm, keep=False, gather=wanted)
            self._product(add, head, x, self._logits.address, c.vocab_size, wanted)
            if choose:
                add(
                    Launch(
                        "top",
                        0,
                        (wanted, 1, 1),
                        TOP_THREADS,
                        0,
                        Top(
                            self._logits.address,
                            self._slots.address,
                            (self._places if prompt else self._identity).address,
                            not prompt,
                        ),
                    )
                )
        if prompt:
            add(Launch("advance", 0, (1, 1, 1), 256, 0, Advance(self._slots.address, self._lengths.address, slots)))
        return launches

    def _product(
        self,
        add: Callable[[Launch], None],
        name: str,
        x: int,
        y: int,
        y_stride: int,
        rows: int,
        *,
        split: bool = False,
        placed: bool = False,
    ) -> int:
        """Add a product; how many parts its inputs were cut into, whose sums stand one after another."""
        matrix = self._model.matrices[name]
        layout = matrix.layout
        width = self._width(layout, rows)
        tile = tiling(layout, width, self.source.limits)
        blocks = -(-layout.tiles // tile.outputs) * -(-rows // tile.rows)
        stages = -(-layout.tile_runs // tile.warps[2])
        parts = (
            max(1, min(most_parts(rows), stages // 2, round(tile.blocks * self.source.limits.multiprocessors / blocks)))
            if split
            else 1
        )
        stride = -(-layout.columns // PADDING) * PADDING
        bias = self._model.vectors.get(name.removesuffix("weight") + "bias", 0)
        parameters = Product(
            matrix.address, matrix.row_scales, bias, x, y, rows, layout.rows, layout.tile_runs, stride, y_stride, parts, placed
        )
        grid = (-(-rows // tile.rows), -(-layout.tiles // tile.outputs), parts)
        add(Launch(self.source.product_name(name, width), width, grid, tile.threads, shared_bytes(layout, tile), parameters))
        return parts

    def _width(self, layout: MatrixLayout, rows: int) -> int:
        """Rows that a product's tile covers; the largest only where there are blocks enough for it."""
        if rows <= WIDTHS[-2]:
            return next(width for width in WIDTHS if rows <= width)
        tile = tiling(layout, WIDTHS[-1], self.source.limits)
        blocks = -(-layout.tiles // tile.outputs) * -(-rows // tile.rows)
        return WIDTHS[-1] if blocks >= 2 * self.source.limits.multiprocessors else WIDTHS[-2]

    def _heads(self, work: Workspace, layer: int, rows: int) -> ctypes.Structure:
        """Parameters of the norm and gate of a layer's heads."""
        c, vectors, at = self._config, self._model.vectors, f"layers.{layer}.retention"
        layout = self._model.matrices[f"{at}.out.weight"].layout
        y, stride = work.operands(c.value_size, OPERANDS[layout.kind])
        return Heads(
            work.o, work.projections, vectors.get(f"{at}.head_norm.weight", 0), vectors.get(f"{at}.head_norm.bias", 0),
            self._log_gamma.address, self._slots.address, work.slot_of, work.index_of, y, stride, rows, layout.integer,
        )  # fmt: skip

    def _retention_step(self, work: Workspace, slots: int, layer: int, *, fold: bool = False) -> Launch:
        c, columns = self._config, self.source.step_columns
        parameters = RetentionStep(self._slots.address, self._powers.address, work.rotated, work.weights, work.o, layer, slots)
        kernel = "retention_fold" if fold else "retention_step"
        blocks = self.source.limits.multiprocessors * self.source.step_blocks
        units = -(-c.head_value_dim // columns) * c.num_heads * slots
        return Launch(kernel, 0, (min(units, blocks), 1, 1), 256, step_bytes(c, columns), parameters, overlaps=not fold)

    def _upload(self, array: NDArray[np.generic]) -> cuda.DeviceBuffer:
        buffer = cuda.DeviceBuffer(array.nbytes)
        self.stream.copy_to_device(buffer, np.ascontiguousarray(array))
        self.stream.synchronize()
        return buffer


def most_parts(rows: int) -> int:
    """Parts that the inputs of a product may be cut into."""
    return max(1, min(PARTS, PART_ROWS // rows))


def padded_rows(rows: int) -> int:
    """Rows that a run is padded to: few different numbers where runs are captured."""
    if rows <= FEW_ROWS:
        return max(8, 1 << (rows - 1).bit_length())
    return -(-rows // 64) * 64


@dataclass(frozen=True)
class Piece:
    """Rows of one run, packed slot by slot.

    Attributes:
        tokens, slot_of, index_of: of each row, its token, its slot, and which of the slot's tokens in this piece it is.
        lengths, needed, starts: of each slot, how many of its rows the state takes, how many it has, and where they begin.
        picked, places: the rows whose logits are wanted, and whose logits they are.
    """

    tokens: NDArray[np.int64]
    slot_of: NDArray[np.int32]
    index_of: NDArray[np.int32]
    lengths: NDArray[np.int64]
    needed: NDArray[np.int32]
    starts: NDArray[np.int32]
    picked: NDArray[np.int32]
    places: NDArray[np.int32]


def pieces(lengths: NDArray[np.int64], needed: NDArray[np.int64], wanted: int) -> list[NDArray[np.int64]]:
    """How many rows of each slot go into each run.

    A slot with drafts goes whole, since drafts leave nothing for a later run to go on from; others are cut where a run is full.

    Args:
        lengths: (S,), tokens that the state takes.
        needed: (S,), rows of a slot; more than its length with drafts.
        wanted: logits asked for of a slot, at most.
    """
    done, found = np.zeros_like(needed), []
    while (done < needed).any():
        take, room, logits = np.zeros_like(needed), ROWS_AT_ONCE, LOGITS_AT_ONCE
        for slot in np.flatnonzero(done < needed):
            left, drafts = int(needed[slot] - done[slot]), needed[slot] > lengths[slot]
            if take.any() and (logits < wanted or (drafts and left > room)):
                continue
            take[slot] = left if drafts else min(left, room)
            room -= int(take[slot])
            logits -= wanted
            if room <= 0:
                break
        found.append(take)
        done += take
    return found
