"""Many rows at once: steps of a batch, prompts, and logits at chosen rows, each a list of launches, captured once and replayed.

A row is a token of a slot. A step has one row a slot; a prompt's rows are packed (pieces.py). The state is written every `WINDOW`
steps: until then the keys and values of the last steps stand in rings, and `fold` brings it up to date (before prompts, and before
the host reads or writes it). All that changes between two runs of the same list lies in device memory, the places of the batch
among it: so all batches of a model share captured runs, constants and buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.cuda.buffers import LEAST_ROWS, ManyBatch, RunBuffers, Size, Tables
from retnet_export.runtime.backends.cuda.launches import DeviceModel, Launch, LaunchList, Run, retention_step
from retnet_export.runtime.backends.cuda.many_source import DRAFTS
from retnet_export.runtime.backends.cuda.pieces import FEW_ROWS, Piece, cut, needed_rows, padded_count, padded_rows, still_right
from retnet_export.runtime.backends.cuda.weights import phase_per_token
from retnet_export.runtime.device import cuda

ROWS_AT_ONCE = 1024
"""Rows of one run at most; longer prompts are read in several, which changes nothing but rounding."""
GRAPHS_KEPT = 32
Launcher = Callable[[Launch], None]


class Many:
    """Runs of many rows with one model's weights; one at a time, and whoever asks holds `cuda.LOCK` until its results are its own.

    Args:
        model: the weights.
        launch: puts a launch on `stream`.
        stream: the CUDA stream.

    Attributes:
        rows_at_once: rows of one run; fewer than `ROWS_AT_ONCE` once memory for so many was not there.
    """

    def __init__(self, model: DeviceModel, launch: Launcher, stream: cuda.Stream) -> None:
        self.source, self.stream, self.rows_at_once = model.source, stream, ROWS_AT_ONCE
        self._model, self._launch = model, launch
        c = self._config = model.source.config
        self._tables = Tables(
            self._upload(np.power(c.gamma[:, None], np.arange(self.source.powers)).astype(np.float32)),
            self._upload(np.log(c.gamma).astype(np.float32)),
            self._upload(phase_per_token(c)),
        )
        self._buffers: RunBuffers | None = None
        self._graphs: OrderedDict[Run, cuda.Graph] = OrderedDict()
        self._seen: set[Run] = set()  # large runs that were made once

    @property
    def size(self) -> Size:
        """What the present buffers are for."""
        return Size(0, 0, 0) if self._buffers is None else self._buffers.size

    def open_batch(self, batch: int, state: int, positions: int, logits: int) -> ManyBatch:
        """What a batch keeps besides its states (B, L, H, Dk, Dv), positions (B,) and logits (B, V), at these addresses."""
        return ManyBatch(self.stream, self.source, batch, state, positions, logits)

    def step(self, batch: ManyBatch, tokens: NDArray[np.int64]) -> None:
        """One token for each of the first slots, (slots,)."""
        slots = len(tokens)
        batch.with_rings()
        batch.drafts = []
        buffers = self._room(Size(slots, slots, slots))
        order = np.arange(slots, dtype=np.int32)
        buffers.say(batch.structure, tokens=np.asarray(tokens, np.int64), slot_of=order, index_of=0, places=order)
        self._run(Run("step", slots, slots, slots), buffers)
        batch.since += 1

    def prefill(self, batch: ManyBatch, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Tokens (S, C) of the first slots, of which the state takes `lengths` (S,); the batch gets the logits after the last."""
        for piece in self._pieces(batch, tokens, lengths, np.where(lengths > 0, lengths - 1, -1)[:, None]):
            self._read(batch, piece, len(piece.picked), choose=True)

    def score(
        self, batch: ManyBatch, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """As `prefill`; logits (S, R, V) at `rows` (S, R) of each slot's tokens, which the state need not take."""
        pieces = self._pieces(batch, tokens, lengths, rows)
        if len(pieces) == len(rows) == 1 and len(pieces[0].picked) == rows.shape[1]:  # in the order in which they are asked for
            wanted = len(pieces[0].picked)
            return self._read(batch, pieces[0], padded_count(wanted), choose=False).logits(wanted)[None]
        scores = np.zeros((*rows.shape, self._config.vocab_size), np.float32)
        for piece in pieces:
            wanted = len(piece.picked)
            buffers = self._read(batch, piece, padded_count(wanted) if wanted else 0, choose=False)
            if wanted:
                scores[piece.places] = buffers.logits(wanted)
        self.stream.synchronize()
        return scores

    def fold(self, batch: ManyBatch) -> None:
        """Bring the state up to date; the rings are empty afterwards."""
        if batch.since:
            buffers = self._room(Size(batch.batch, batch.batch, 0))
            buffers.say(batch.structure)
            for layer in range(self._config.num_layers):
                self._launch(retention_step(self.source, buffers.at, batch.batch, layer, fold=True))
            batch.folded(self.stream)

    def _pieces(
        self, batch: ManyBatch, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> list[Piece]:
        """The runs of a prompt, as large as memory allows; without what the last pass has seen already."""
        self.fold(batch)
        needed = needed_rows(lengths, rows)
        kept = np.zeros_like(lengths)
        if batch.drafts and needed.max() <= self.source.few.tokens:
            first = np.where(rows >= 0, rows, needed[:, None]).min(1, initial=self.source.few.tokens)
            kept = still_right(batch.drafts, tokens, np.minimum(lengths, first))
        total = int((needed - kept).sum())
        while True:
            try:
                self._room(Size(min(padded_rows(total), self.rows_at_once), len(tokens), 0))
                return cut(tokens, lengths, rows, kept, self.rows_at_once)
            except cuda.CudaMemoryError:
                if self.rows_at_once <= LEAST_ROWS or total <= LEAST_ROWS:
                    raise
                self.rows_at_once = max(LEAST_ROWS, min(self.rows_at_once, padded_rows(total)) // 2)

    def _read(self, batch: ManyBatch, piece: Piece, wanted: int, *, choose: bool) -> RunBuffers:
        slots, padded = len(piece.lengths), padded_rows(len(piece.tokens))
        if (piece.kept + piece.needed > piece.lengths).any():
            batch.with_drafts()
        buffers = self._room(Size(padded, slots, wanted))
        buffers.say(
            batch.structure, tokens=piece.tokens, slot_of=piece.slot_of, index_of=piece.index_of, lengths=piece.lengths,
            needed=piece.needed, starts=piece.starts, kept=piece.kept, picked=piece.picked, places=piece.places[0].astype(np.int32),
        )  # fmt: skip
        few = int((piece.kept + piece.needed).max()) <= self.source.few.tokens
        self._run(Run("few" if few else "prompt", slots, padded, wanted, choose), buffers)
        ends = np.cumsum(piece.needed)
        drafts = [
            piece.tokens[end - max(0, kept + count - length) : end][:DRAFTS]
            for end, kept, count, length in zip(ends, piece.kept, piece.needed, piece.lengths, strict=True)
        ]
        batch.looked_at(drafts if few else [])
        return buffers

    def _room(self, size: Size) -> RunBuffers:
        """Buffers for a run of this size. New ones are made if it needs more; captured runs know only the old ones."""
        if self._buffers is not None and self._buffers.size.enough_for(size):
            return self._buffers
        before = self.size
        self.stream.synchronize()
        self._graphs.clear()
        self._buffers = None
        self._buffers = RunBuffers(self.stream, self.source, before.with_room_for(size), self._tables)
        return self._buffers

    def _run(self, run: Run, buffers: RunBuffers) -> None:
        if (captured := self._graphs.get(run)) is not None:
            self._graphs.move_to_end(run)
            self.stream.launch(captured)
            return
        launches = LaunchList(self._model, buffers.at, buffers.operands, run).make()
        for launch in launches:
            self._launch(launch)  # the run itself; what is captured after it does not run
        if run.rows > FEW_ROWS and run not in self._seen:
            self._seen.add(run)
            return
        try:
            with self.stream.capture() as graph:
                for launch in launches:
                    self._launch(launch)
        except cuda.CudaError as error:
            if error.code not in cuda.OUT_OF_MEMORY:
                raise
            return  # without a graph the same run takes longer
        self._graphs[run] = graph
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)

    def _upload(self, array: NDArray[np.generic]) -> cuda.DeviceBuffer:
        buffer = cuda.DeviceBuffer(array.nbytes)
        self.stream.copy_to_device(buffer, np.ascontiguousarray(array))
        self.stream.synchronize()
        return buffer
