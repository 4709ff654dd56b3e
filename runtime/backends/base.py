"""The interface of a backend: it holds a bundle's weights once, and runs steps on its own buffers.

A backend belongs to a model and knows nothing of text or sampling; a runner is one set of state buffers in it. The state
stays where the backend keeps it, and so do the logits: each crosses to the host only when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.bundle.layout import StateLayout
from retnet_export.runtime.bundle.manifest import StateSpec

NUMPY_DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int64": np.dtype(np.int64),
}
"""Element types of state tensors."""

State = Mapping[str, NDArray[np.generic]]
"""The state of one sequence: an array for each `StateSpec`, by its input name: (1,) of the position, (1, H, Dk, Dv) of a layer."""


class Runner(Protocol):
    """Steps a batch of sequences together and holds their state; a slot is one sequence's place in it."""

    @property
    def batch(self) -> int:
        """B, the number of slots."""

    def step(self, tokens: NDArray[np.int64]) -> None:
        """Read one token per slot, (B,), and advance the state."""

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Read several tokens per slot and advance the state.

        Args:
            tokens: (B, C), C at most the prefill graph's chunk size, or the backend's (`Chunking`).
            lengths: (B,), how many of a slot's C tokens are real, 0 to C; the rest is padding and leaves no trace. A slot
                of length 0 keeps its state, and its logits are undefined.
        """

    def score(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read several tokens per slot as `prefill` does, and give the logits after any of them.

        A row at or after a slot's length is that of a draft: it sees all tokens of the chunk before it, and neither state nor
        position takes it in. After this `logits` and `top` are undefined until the next step or prefill.

        Args:
            tokens: (B, C), C at most the prefill graph's chunk size: tokens to take in, then drafts, then padding.
            lengths: (B,), how many of a slot's C tokens the state takes in, 0 to C.
            rows: (B, R), of which of the C tokens the logits are wanted, each 0 to C - 1; R at most C.

        Returns:
            float32 (B, R, V), the caller's own; a row of padding is undefined.
        """

    def logits(self) -> NDArray[np.float32]:
        """Logits (B, V) after each slot's last token; valid until the next step."""

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k largest logits of each slot: tokens (B, k) and logits (B, k); chosen where the logits are.

        Largest first, equal ones by token; NaN counts as the largest, so that it is seen.
        """

    def read_state(self, slot: int) -> State:
        """A copy of one slot's state, on the host."""

    def write_state(self, slot: int, state: State) -> None:
        """Replace one slot's state; shapes, axes and dtypes are those of `read_state`, and the same on every backend."""


@runtime_checkable
class Narrowing(Protocol):
    """A runner whose steps cost what the slots in use cost."""

    def narrow(self, slots: int) -> None:
        """From now on `step`, `prefill` and `score` take the first so many slots, (slots,) and (slots, C), and `top` gives theirs.

        The other slots are given up: what they hold is undefined until it is written.
        """


@runtime_checkable
class Copying(Protocol):
    """A runner that copies a slot's state without bringing it to the host and into the common layout."""

    def copy_state(self, source: int, target: int) -> None:
        """Replace one slot's state by another's."""


@runtime_checkable
class Undoing(Protocol):
    """A runner that can keep the state before a pass, so that drafts may enter the state on trial."""

    def score_on_trial(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`Runner.score` that can be undone, as long as nothing else is read or written."""

    def undo(self) -> None:
        """Put back the state before a `score_on_trial`; `logits` and `top` stay undefined."""


@dataclass(frozen=True)
class PassCost:
    """What `Runner.score` of n tokens takes for one sequence: 1 + fixed + token · (n - 1) steps.

    Attributes:
        fixed, token: as above.
        again: whether drafts that came true are among the n of the next pass, which lets the state take them in; False if the
            runner keeps what that needs of them.
    """

    fixed: float
    token: float
    again: bool = True

    def surplus(self, sequences: int, tokens: float) -> float:
        """What `score` of so many tokens of each of so many sequences takes beyond a step of these, in such steps."""
        return (self.fixed + self.token * sequences * (tokens - 1)) / (1 + self.token * (sequences - 1))


@runtime_checkable
class Checking(Protocol):
    """A backend that checks several tokens for little more than the price of a step, so that drafts pay (speculation.py)."""

    @property
    def pass_cost(self) -> PassCost:
        """As measured with models of some size (docs/lab/speculation.md)."""


@runtime_checkable
class Chunking(Protocol):
    """A backend whose prompts are not run by the prefill graph, so that its chunk size does not limit them."""

    @property
    def chunk_tokens(self) -> int:
        """The most tokens per sequence of one `Runner.prefill` or `Runner.score`."""


def chunk_tokens(backend: Backend, graph_chunk: int) -> int:
    """The most tokens per sequence that a backend reads at once, of a bundle whose prefill graph takes `graph_chunk`."""
    return backend.chunk_tokens if isinstance(backend, Chunking) else graph_chunk


class Backend(Protocol):
    """A bundle made ready to run."""

    @property
    def name(self) -> str:
        """As on the command line: "onnxruntime", …"""

    @property
    def variant(self) -> str:
        """Which of the bundle's variants it runs, or was made from."""

    def open_runner(self, batch: int) -> Runner:
        """Allocate buffers for `batch` sequences, at the initial state."""


def last_rows(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows (B, 1) of each slot's last real token, lengths (B,); of a slot of no tokens the first, which is undefined."""
    rows: NDArray[np.int64] = np.maximum(lengths - 1, 0)[:, None]
    return rows


def state_to_graph(specs: Sequence[StateSpec], layout: StateLayout, state: State) -> dict[str, NDArray[np.generic]]:
    """A state as a graph takes it: contiguous, in the graph's layout and the manifest's element types."""
    return {
        spec.input: np.ascontiguousarray(
            state[spec.input] if spec.layer is None else layout.to_graph(state[spec.input]), NUMPY_DTYPES[spec.dtype]
        )
        for spec in specs
    }


def state_from_graph(specs: Sequence[StateSpec], layout: StateLayout, arrays: State) -> State:
    """A copy of a graph's state in the canonical layout, (1, H, Dk, Dv)."""
    copies = {}
    for spec in specs:
        given = arrays[spec.input]
        own = given if spec.layer is None else layout.from_graph(given)
        copies[spec.input] = own.copy() if np.may_share_memory(own, given) else own
    return copies


def initial_state(specs: Sequence[StateSpec]) -> State:
    """The state before the first token."""
    return {spec.input: np.full((1, *spec.shape[1:]), spec.initial).astype(NUMPY_DTYPES[spec.dtype]) for spec in specs}


GROUP = 32
"""Logits in one block of the search for the largest; the block's maximum represents them."""


def top_of(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`Runner.top` for logits (B, V) on the host."""
    if k == 1:
        tokens = logits.argmax(-1, keepdims=True)
    else:
        tokens = np.stack([_largest(row, k) for row in logits])
    return tokens.astype(np.int64, copy=False), logits[np.arange(len(logits))[:, None], tokens]


def _largest(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices (k,) of the largest of a row (V,), largest first, NaN before all, equal ones by index."""
    if np.isnan(row.max()):
        row = np.nan_to_num(row, nan=np.inf)
    # Those equal to the k-th largest are all looked at.
    kept = np.flatnonzero(row >= _reached(row, k)) if k < len(row) else np.arange(len(row))
    return kept[np.argsort(-row[kept], kind="stable")][:k]


def _reached(row: NDArray[np.float32], k: int) -> np.float32:
    """What at least k of a row (V,) reach, and few more: the k-th largest of the maxima of groups; of all where k is large.

    To partition a vocabulary takes ten times as long as to take the maxima.
    """
    groups = len(row) // GROUP
    if groups >= 2 * k:
        row = row[: GROUP * groups].reshape(GROUP, groups).max(0)  # a group's tokens lie apart, so that maxima are of whole rows
    reached: np.float32 = np.partition(row, len(row) - k)[len(row) - k]
    return reached
