"""Device memory of runs of many rows: activations, what the host says of a run, and what a batch of sequences keeps.

Rule: buffers are made for so many rows, slots and logits, and serve every run that needs no more; `Size.bytes_of` says beforehand
what they take.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.cuda.launches import Addresses, most_parts, padded, projections_width
from retnet_export.runtime.backends.cuda.many_source import DRAFTS, OPERAND_BYTES, OPERANDS, WINDOW, ManySource
from retnet_export.runtime.backends.cuda.pieces import padded_count, padded_rows
from retnet_export.runtime.backends.cuda.structures import Slots
from retnet_export.runtime.device import cuda, kernels

KEPT = 64
"""Largest logits that the device chooses."""
MOST_DRAFTING = 8
"""Slots of a batch up to which keys and values of drafts are kept: 38 MB a slot for 1.5 billion weights."""
MOST_LENT = 32
"""Rows of logits that are given out in memory that is used again; more are seldom asked for, and may be kept for long."""
LEAST_ROWS = 64
"""Rows that buffers are made for at least, so that short prompts and drafts never make new ones."""
FIELDS = (
    ("tokens", np.int64, "rows"), ("lengths", np.int64, "slots"), ("slot_of", np.int32, "rows"), ("index_of", np.int32, "rows"),
    ("needed", np.int32, "slots"), ("starts", np.int32, "slots"), ("kept", np.int32, "slots"), ("picked", np.int32, "wanted"),
    ("places", np.int32, "wanted"),
)  # fmt: skip
"""What the host says of a run: name, type, and of what there is one each."""


@dataclass(frozen=True)
class Tables:
    """Buffers with the model's γ^n (H, powers), ln γ (H,) and phases per token (Dk / 2,)."""

    powers: cuda.DeviceBuffer
    log_gamma: cuda.DeviceBuffer
    phase: cuda.DeviceBuffer


@dataclass(frozen=True)
class Size:
    """What buffers are for: rows, slots, and rows whose logits are wanted."""

    rows: int
    slots: int
    wanted: int

    @classmethod
    def for_runs_of(cls, slots: int) -> Size:
        """What steps and short prompts of so many sequences need."""
        return cls(0, 0, 0).with_room_for(cls(slots, slots, slots))

    def enough_for(self, other: Size) -> bool:
        return self.rows >= other.rows and self.slots >= other.slots and self.wanted >= other.wanted

    def with_room_for(self, other: Size) -> Size:
        """The size to make next, if `other` is asked for."""
        rows = max(self.rows, LEAST_ROWS, padded_rows(other.rows))
        wanted = max(self.wanted, padded_count(other.wanted))
        return Size(rows, max(self.slots, padded_count(other.slots)), wanted)

    def counts(self) -> dict[str, int]:
        return {"rows": self.rows, "slots": self.slots, "wanted": self.wanted}

    def activations(self, source: ManySource) -> dict[str, int]:
        """Float32 numbers of each buffer of activations."""
        c, rows = source.config, self.rows
        return {
            "x": rows * c.hidden_size,
            "angles": rows * c.head_key_dim,
            "projections": rows * projections_width(source),
            "rotated": rows * (c.num_heads + c.num_kv_heads) * c.head_key_dim,
            "weights": self.slots * c.num_heads * WINDOW,
            "o": rows * c.value_size,
            "added": c.hidden_size
            * max(most_parts(count) * count for count in range(1, rows + 1)),  # fewer rows may have more parts
            "hidden": rows * c.ffn_size if c.ffn_inner_norm != "none" else 0,
            "logits": self.wanted * c.vocab_size,
        }

    def operands(self, source: ManySource) -> dict[tuple[int, str], int]:
        """Bytes of the operands of products, by width and type; kept apart, so that their padding stays zero."""
        used: dict[tuple[int, str], int] = {}
        for name, layout in source.layouts.items():
            if name != "embedding.weight" or source.config.tied_embeddings:
                kind = OPERANDS[layout.kind]
                rows = max(self.rows, self.wanted) if layout.columns == source.config.hidden_size else self.rows
                used[layout.columns, kind] = rows * padded(layout.columns) * OPERAND_BYTES[kind]
        return used

    def bytes_of(self, source: ManySource) -> int:
        """Bytes on the device."""
        said = ctypes.sizeof(Slots) + sum(np.dtype(kind).itemsize * self.counts()[of] for _, kind, of in FIELDS)
        return 4 * sum(self.activations(source).values()) + sum(self.operands(source).values()) + said


class RunBuffers:
    """Buffers of one size.

    Args:
        stream: what copies run on.
        source: of the kernels.
        size: what they are for.
        tables: of the model.

    Attributes:
        at: their addresses.
        operands: those of products, by width and type: address, and elements from one row to the next.

    Raises:
        CudaMemoryError: they do not fit.
    """

    def __init__(self, stream: cuda.Stream, source: ManySource, size: Size, tables: Tables) -> None:
        self.size, self._stream, self._source = size, stream, source
        self._buffers: list[cuda.DeviceBuffer] = []
        offsets, end = {}, ctypes.sizeof(Slots)
        for name, kind, of in FIELDS:
            offsets[name] = end
            end += np.dtype(kind).itemsize * size.counts()[of]
        self._said, self._copied = cuda.pinned((end,), np.uint8), cuda.Event()
        self._views = {
            name: self._said[offsets[name] :][: np.dtype(kind).itemsize * size.counts()[of]].view(kind) for name, kind, of in FIELDS
        }
        self._entry = self._buffer(end)
        entry = self._entry.address
        self._numbers = {name: self._buffer(4 * count) for name, count in size.activations(source).items()}
        self.at = Addresses(
            slots=entry,
            **{name: entry + offset for name, offset in offsets.items()},
            **{name: buffer.address for name, buffer in self._numbers.items()},
            powers=tables.powers.address,
            log_gamma=tables.log_gamma.address,
            phase=tables.phase.address,
        )
        self.operands = {key: (self._buffer(count).address, padded(key[0])) for key, count in size.operands(source).items()}
        self._lent = Lent()
        stream.synchronize()

    def _buffer(self, size: int) -> cuda.DeviceBuffer:
        buffer = cuda.DeviceBuffer(size)
        self._stream.fill(buffer, 0)
        self._buffers.append(buffer)
        return buffer

    def say(self, slots: ctypes.Structure, **fields: NDArray[np.generic] | int) -> None:
        """Tell the kernels of the next run what it is: of which batch, and the first entries of fields."""
        self._copied.synchronize()  # what was said last has arrived
        self._said[: ctypes.sizeof(slots)] = np.frombuffer(bytes(slots), np.uint8)
        for name, values in fields.items():
            self._views[name][: None if isinstance(values, int) else len(values)] = values
        self._stream.copy_to_device(self._entry, self._said)
        self._stream.record(self._copied)

    def logits(self, count: int) -> NDArray[np.float32]:
        """The first rows of logits (count, V), for the caller to keep."""
        shape = count, self._source.config.vocab_size
        rows = self._lent.array(shape) if count <= MOST_LENT else np.empty(shape, np.float32)
        self._stream.copy_to_host(rows, self._numbers["logits"])
        self._stream.synchronize()
        return rows


class Lent:
    """Float32 arrays that the GPU writes without a detour, and that are used again when nobody holds them any more.

    A new array of a megabyte costs more than the copy into it.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def array(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        size = 4 * math.prod(shape)
        fitting = next((index for index, each in enumerate(self._free) if each.nbytes >= size), None)
        memory = cuda.pinned((size,), np.uint8) if fitting is None else self._free.pop(fitting)
        holder = (ctypes.c_byte * size).from_address(memory.ctypes.data)  # lives as long as any view of the array
        weakref.finalize(holder, self._free.append, memory).atexit = False
        return np.frombuffer(memoryview(holder), np.float32, math.prod(shape)).reshape(shape)


class ManyBatch:
    """A batch of sequences, as the kernels know it.

    Args:
        stream: what copies run on.
        source: of the kernels.
        batch: B, slots.
        state: address of the states (B, L, H, Dk, Dv), float32.
        positions: address of (B,) int64.
        logits: address of (B, V).

    Attributes:
        found, tokens, largest: of the last step or prompt: how many of the largest logits were found (-1: look at all), and
            these, (B,), (B, KEPT), (B, KEPT); on the host, once the stream has got there.
        structure: all of this, as kernels read it.
        since: steps that the state does not have yet.
        drafts: of each slot, tokens of the last pass that the state did not take, whose keys and values are kept.
    """

    def __init__(self, stream: cuda.Stream, source: ManySource, batch: int, state: int, positions: int, logits: int) -> None:
        self.found, found = kernels.mapped((batch,), np.int32)
        self.tokens, tokens = kernels.mapped((batch, KEPT), np.int32)
        self.largest, largest = kernels.mapped((batch, KEPT), np.float32)
        self._counters = cuda.DeviceBuffer(8)
        stream.fill(self._counters, 0)
        self._rings: tuple[cuda.DeviceBuffer, cuda.DeviceBuffer] | None = None
        self._ring_bytes = ring_bytes(source, batch)
        self._drafts: tuple[cuda.DeviceBuffer, cuda.DeviceBuffer] | None = None
        self._draft_bytes = draft_bytes(source, batch)
        self.batch, self.since = batch, 0
        self.drafts: list[NDArray[np.int64]] = []
        self.structure = Slots(state, positions, 0, 0, self._counters.address, logits, found, tokens, largest, 0, 0, batch, 0)

    def with_rings(self) -> None:
        """Room for the last steps; before the first one, since prompts need none."""
        if self._rings is None:
            keys, values = (cuda.DeviceBuffer(count) for count in self._ring_bytes)
            self._rings, self.structure.keys, self.structure.values = (keys, values), keys.address, values.address

    def with_drafts(self) -> None:
        """Room for keys and values of drafts, unless the batch is large or memory is short: then all tokens have rows."""
        if self._drafts is None and self.batch <= MOST_DRAFTING:
            with contextlib.suppress(cuda.CudaMemoryError):
                keys, values = (cuda.DeviceBuffer(count) for count in self._draft_bytes)
                self._drafts, self.structure.draft_keys, self.structure.draft_values = (keys, values), keys.address, values.address

    def looked_at(self, drafts: list[NDArray[np.int64]]) -> None:
        """A pass has written keys and values of these drafts, by slot."""
        self.structure.side ^= 1
        self.drafts = drafts if self._drafts is not None else []

    def folded(self, stream: cuda.Stream) -> None:
        """The state has all steps."""
        stream.fill(self._counters, 0, 4, 4)
        self.since = 0


def draft_bytes(source: ManySource, batch: int) -> tuple[int, int]:
    """Bytes of the keys and of the values of drafts, both sides."""
    c = source.config
    rows = 4 * math.prod((2, c.num_layers, batch, c.num_kv_heads, DRAFTS))
    return rows * c.head_key_dim, rows * c.head_value_dim


def ring_bytes(source: ManySource, batch: int) -> tuple[int, int]:
    """Bytes of the keys and of the values of the last steps of a batch."""
    c = source.config
    rows = 4 * math.prod((c.num_layers, batch, c.num_kv_heads, WINDOW))
    return rows * c.head_key_dim, rows * c.head_value_dim
