"""Ranges of activations: the largest magnitude that flows into each product of the float graph on a calibration text.

Rule: one number a product. Both graphs take it, and the scale follows from it and the format: `largest / 127` for INT8,
`largest / 448` for FP8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.errors import ArgumentError

if TYPE_CHECKING:
    import onnx_ir as ir

ACTIVATIONS = ("int8", "fp8")


class Choices(Protocol):
    """The options of `quantize` for activations."""

    @property
    def activations(self) -> str | None: ...
    @property
    def weights(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def calibration(self) -> Path | None: ...


def check_options(options: Choices) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: with the reason, and what does.
    """
    chosen = options.activations
    if chosen is None:
        for name, value in (("weights", options.weights), ("head", options.head)):
            if value == "fp8":
                raise ArgumentError(name, "is 'fp8', which needs activations=fp8; without it int8 is as small and more exact")
        return
    if chosen not in ACTIVATIONS:
        raise ArgumentError("activations", f"is {chosen!r}, expected {' or '.join(ACTIVATIONS)}")
    if options.weights != chosen:
        raise ArgumentError(
            "activations",
            f"is {chosen!r} and weights={options.weights}: both sides of a product must have one format, TensorRT has no product "
            f"of {chosen} activations and {options.weights} weights; choose weights={chosen}",
        )
    if options.head == "fp8" and chosen != "fp8":
        raise ArgumentError("head", f"is 'fp8', which needs activations=fp8, not {chosen}; choose head=int8")
    if options.group_size is not None:
        raise ArgumentError(
            "group_size",
            f"cannot be combined with activations={chosen}: an 8-bit product takes one scale for each output; omit it",
        )
    if options.method == "awq":
        raise ArgumentError("method", "is 'awq', which changes the activations that are measured before; choose rtn or gptq")
    if options.method == "gptq" and chosen == "fp8":
        raise ArgumentError("method", "is 'gptq', which chooses integers, and weights=fp8 are floats; choose rtn")
    if options.calibration is None:
        raise ArgumentError(
            "activations",
            f"is {chosen!r}, which measures what flows into the products: give it a text of the kind that the model is to "
            "continue, calibration=FILE",
        )


def activation_ranges(source: Bundle, decode: ir.Model, tokens: NDArray[np.int64], products: Mapping[str, str]) -> dict[str, float]:
    """The largest magnitude that flows into products of a float bundle's decode graph, over a text.

    Args:
        source: the bundle.
        decode: its decode graph.
        tokens: (B, T).
        products: the matrix of each, by the name of the node.

    Returns:
        By the name of the node.
    """
    from retnet_export.quantize.calibration import LayerRunner

    runner = LayerRunner(source, decode, tokens)
    largest: dict[str, float] = {}
    for index in range(runner.count):
        weights = {name: decode.graph.initializers[name].const_value.numpy() for name in runner.weight_names(index)}  # type: ignore[union-attr]
        largest |= runner.advance(index, weights, [name for name in weights if name in products.values()])
    return {node: largest[name] if name in largest else runner.largest_input(node) for node, name in products.items()}
