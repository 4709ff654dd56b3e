"""Weights on their way into a graph: how they are read, and narrowed to the format of a bundle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.bundle.weights import retention_inputs as retention_inputs
from retnet_export.runtime.bundle.weights import weight_shapes as weight_shapes
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import first_not_finite

Array = NDArray[np.generic]
ReadWeight = Callable[[str], Array]
"""Reads one weight by its canonical name; called once per weight, so that only one need be in memory."""


def narrowed(name: str, array: Array, dtype: np.dtype[np.generic]) -> Array:
    """A weight in the format that the bundle stores, without a copy if it is in it already.

    Raises:
        UserError: a value is too large for the format; the message names the weight, the value and what holds it.
    """
    with np.errstate(over="ignore"):
        stored = array.astype(dtype, copy=False)
    if stored is not array and (first := first_not_finite(stored)) is not None:
        index = [int(position) for position in np.unravel_index(first, array.shape)]
        value = float(array.reshape(-1)[first])
        if np.isfinite(value):
            raise UserError(
                f"{name} holds {value:.6g} at {index}, more than {dtype.name} can hold; export it with "
                + ("precision=fp32 or bf16" if dtype.name == "float16" else "a checkpoint of smaller weights")
            )
    return stored
