"""The memory traffic of one run of an engine: the record that `compile` writes beside an engine and `plan` predicts from.

Memory limits a decode step, so its kernels and the bytes they move give its cost, also on a machine without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Excess:
    """Bytes moved beyond what a run needs.

    Attributes:
        what: the operators of the graph that cause it, layers joined: "layers.*.retention.read".
        bytes: read and written in one run, over all layers.
    """

    what: str
    bytes: int


@dataclass(frozen=True)
class Anatomy:
    """One run of decode or prefill, one sequence.

    Attributes:
        role: which of the two.
        tokens: read in this run.
        kernels: launched.
        layers: of the model.
        weight_bytes: constants read: matrices, scales, norms, rows of the embedding.
        state_bytes: tensors of the size of a layer's state, whatever they are called.
        other_bytes: everything else that one kernel writes or reads.
        state_passes: `state_bytes` over the state of all layers: 2 if each is read once and written once.
        floor_bytes: what no engine can do without: matrices as the bundle stores them, the state read and written, logits.
        excess: the largest things above the floor.
        source: what it was read from.
    """

    role: Literal["decode", "prefill"]
    tokens: int
    kernels: int
    layers: int
    weight_bytes: int
    state_bytes: int
    other_bytes: int
    state_passes: float
    floor_bytes: int
    excess: tuple[Excess, ...]
    source: Literal["builder's log", "engine inspector"]

    @property
    def bytes(self) -> int:
        """Bytes of one run."""
        return self.weight_bytes + self.state_bytes + self.other_bytes

    @property
    def over_floor(self) -> float:
        """Bytes moved over bytes needed."""
        return self.bytes / self.floor_bytes

    @property
    def kernels_per_layer(self) -> float:
        return self.kernels / self.layers
