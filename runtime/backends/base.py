"""What a backend is: it holds a bundle's weights once, and runs steps on buffers of its own.

A backend belongs to a model and knows nothing of text or sampling; a stream is one set of state buffers in it. The state
stays where the backend keeps it, and so do the logits: each crosses to the host only when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.manifest import StateSpec

NUMPY_DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int64": np.dtype(np.int64),
}
"""Element types of state tensors."""

State = Mapping[str, NDArray[np.generic]]
"""The state of one sequence: an array for each `StateSpec`, by its input name, with a batch axis of 1 in front."""


class Stream(Protocol):
    """State buffers for a batch of sequences that step together; a slot is one sequence's place in them."""

    @property
    def batch(self) -> int:
        """B, the number of slots."""

    def step(self, tokens: NDArray[np.int64]) -> None:
        """Read one token per slot, (B,), and advance the state."""

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Read several tokens per slot and advance the state.

        Args:
            tokens: (B, C), C at most the prefill graph's chunk size.
            lengths: (B,), how many of a slot's C tokens are real, 0 to C; the rest is padding and leaves no trace. A slot
                of length 0 keeps its state, and its logits are undefined.
        """

    def logits(self) -> NDArray[np.float32]:
        """Logits (B, V) after each slot's last token; valid until the next step."""

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k largest logits of each slot, largest first: tokens (B, k) and logits (B, k); chosen where the logits are."""

    def read_state(self, slot: int) -> State:
        """A copy of one slot's state, on the host."""

    def write_state(self, slot: int, state: State) -> None:
        """Replace one slot's state; shapes and dtypes are those of `read_state`."""


class Backend(Protocol):
    """A bundle made ready to run."""

    @property
    def name(self) -> str:
        """As on the command line: "onnxruntime", …"""

    def open_stream(self, batch: int) -> Stream:
        """Allocate buffers for `batch` sequences, at the initial state."""


def initial_state(specs: Sequence[StateSpec]) -> State:
    """The state before the first token."""
    return {spec.input: np.full((1, *spec.shape[1:]), spec.initial).astype(NUMPY_DTYPES[spec.dtype]) for spec in specs}


def top_of(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`Stream.top` for logits (B, V) on the host; equal logits in the order of their tokens."""
    if k == 1:
        tokens = logits.argmax(-1, keepdims=True)
    else:
        kept = (
            np.sort(np.argpartition(-logits, k - 1, axis=-1)[:, :k])
            if k < logits.shape[-1]
            else np.arange(logits.shape[-1])[None].repeat(len(logits), 0)
        )
        order = np.argsort(-np.take_along_axis(logits, kept, -1), axis=-1, kind="stable")
        tokens = np.take_along_axis(kept, order, -1)
    return tokens.astype(np.int64), np.take_along_axis(logits, tokens, -1)
