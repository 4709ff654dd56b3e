"""How a graph keeps the state of a layer, and the one place that converts it.

Rule: outside a graph, the state of a layer is (B, H, Dk, Dv), the axes of `AXES`. A graph whose operators want it
otherwise declares that with a `StateLayout`, which stands in the manifest beside the graph; nothing is concluded from a shape,
because Dk and Dv may be equal, or from a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Axis = Literal["batch", "head", "key", "value"]
Array = NDArray[np.generic]
AXES: tuple[Axis, ...] = ("batch", "head", "key", "value")
"""Of a layer's state, everywhere: B, H, Dk, Dv."""


@dataclass(frozen=True)
class StateLayout:
    """What a graph takes and gives as the state of a layer.

    Attributes:
        axes: their order; batch and head come first.
        pieces: into how many blocks of columns each head is cut, one after another: the axis of heads then has H·pieces entries,
            that of values Dv/pieces. 1 where the axes are not `AXES`.
    """

    axes: tuple[Axis, ...] = AXES
    pieces: int = 1

    @property
    def is_valid(self) -> bool:
        """Whether the fields are consistent."""
        ordered = self.axes[:2] == AXES[:2] and sorted(self.axes) == sorted(AXES)
        return ordered and (self.pieces >= 1 if self.axes == AXES else self.pieces == 1)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The graph's shape for a state (B, H, Dk, Dv)."""
        batch, heads, key_dim, value_dim = shape
        cut = {"batch": batch, "head": heads * self.pieces, "key": key_dim, "value": value_dim // self.pieces}
        return tuple(cut[axis] for axis in self.axes)

    def to_graph(self, state: Array) -> Array:
        """(B, H, Dk, Dv) as the graph takes it; a view where it can be one."""
        if self.axes != AXES:
            return np.transpose(state, [AXES.index(axis) for axis in self.axes])
        batch, heads, key_dim, value_dim = state.shape
        blocks = state.reshape(batch, heads, key_dim, self.pieces, value_dim // self.pieces)
        result: Array = blocks.swapaxes(2, 3).reshape(self.shape(state.shape))
        return result

    def write(self, state: Array, target: Array) -> None:
        """Write (B, H, Dk, Dv) where a graph reads it: a contiguous array of its shape."""
        if self.axes != AXES:
            target[...] = self.to_graph(state)
            return
        batch, heads, key_dim, value_dim = state.shape
        blocks = state.reshape(batch, heads, key_dim, self.pieces, value_dim // self.pieces)
        target.reshape(batch, heads, self.pieces, key_dim, value_dim // self.pieces)[...] = blocks.swapaxes(2, 3)

    def from_graph(self, state: Array) -> Array:
        """What the graph gave as (B, H, Dk, Dv); a view where it can be one."""
        if self.axes != AXES:
            return np.transpose(state, [self.axes.index(axis) for axis in AXES])
        batch, heads, key_dim, value_dim = state.shape
        blocks = state.reshape(batch, heads // self.pieces, self.pieces, key_dim, value_dim)
        result: Array = blocks.swapaxes(2, 3).reshape(batch, heads // self.pieces, key_dim, value_dim * self.pieces)
        return result
