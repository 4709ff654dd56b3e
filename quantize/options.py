"""The options of `retnet-export quantize`, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retnet_export.quantize.formats import Bits, Format
from retnet_export.runtime.errors import ArgumentError, one_of

WEIGHTS: Mapping[str, Bits] = {"int8": 8, "int4": 4, "fp8": 8}
METHODS = ("rtn", "gptq")
TABLES = ("int8", "int4", "keep")
"""Formats of embedding and head; "keep" leaves the matrix as it is."""
GROUP_SIZES = (16, 32, 64, 128, 256)
DEFAULT_INT4_GROUP = 64
Role = Literal["weights", "head", "embedding", "tied"]
"""What a matrix is for; "tied" is an embedding that is the head, too."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How a bundle is quantized.

    Attributes:
        weights: int8, int4 or fp8, of all matrices but embedding and head.
        group_size: inputs that share a scale; None: all of an output for int8, 64 for int4.
        method: rtn or gptq, for the same matrices; embedding and head are rounded to nearest.
        embedding, head: int8, int4 or keep; one and the same if the head is the embedding. The head also fp8.
        calibration: the text that gptq and activations need.
        state: fp16, or None to leave it.
        activations: int8 or fp8, of what flows into the products with such weights; None to leave it.
    """

    weights: str = "int4"
    group_size: int | None = None
    method: str = "rtn"
    embedding: str = "int8"
    head: str = "int8"
    calibration: Path | None = None
    state: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, object, Iterable[object]], ...] = (
            ("weights", self.weights, WEIGHTS),
            ("method", self.method, METHODS),
            ("embedding", self.embedding, TABLES),
            ("head", self.head, (*TABLES, "fp8")),
            ("state", self.state, (None, "fp16")),
            ("activations", self.activations, (None, "int8", "fp8")),
            ("group_size", self.group_size, (None, *GROUP_SIZES)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ArgumentError(name, f"is {value!r}, expected {one_of(str(each) for each in allowed if each is not None)}")
        if self.activations is None:
            for name, value in (("weights", self.weights), ("head", self.head)):
                if value == "fp8":
                    raise ArgumentError(name, "is 'fp8', which needs activations=fp8; without it int8 is as small and more exact")
        else:
            self._check_activations(self.activations)
        if self.method == "gptq" and self.calibration is None:
            raise ArgumentError(
                "method",
                "is 'gptq', which looks at activations: give a text of the kind that the model will continue, calibration=FILE",
            )
        if self.method == "rtn" and self.calibration is not None and self.activations is None:
            raise ArgumentError("calibration", "cannot be combined with method=rtn, which looks at no text; choose gptq")

    def _check_activations(self, chosen: str) -> None:
        if self.weights != chosen:
            raise ArgumentError(
                "activations",
                f"is {chosen!r} and weights={self.weights}: both sides of a product must have one format, TensorRT has no product "
                f"of {chosen} activations and {self.weights} weights; choose weights={chosen}",
            )
        if self.head == "fp8" and chosen != "fp8":
            raise ArgumentError("head", f"is 'fp8', which needs activations=fp8, not {chosen}; choose head=int8")
        if self.group_size is not None:
            raise ArgumentError(
                "group_size",
                f"cannot be combined with activations={chosen}: an 8-bit product takes one scale for each output; omit it",
            )
        if self.method == "gptq" and chosen == "fp8":
            raise ArgumentError("method", "is 'gptq', which chooses integers, and weights=fp8 are floats; choose rtn")
        if self.calibration is None:
            raise ArgumentError(
                "activations",
                f"is {chosen!r}, which measures what flows into the products: give a text of the kind that the model will "
                "continue, calibration=FILE",
            )

    def format_of(self, role: Role, scale: str) -> Format | None:
        """The format of a matrix by what it is for; None: it stays as it is."""
        chosen = {"weights": self.weights, "head": self.head}.get(role, self.embedding)
        if chosen == "keep":
            return None
        if chosen == "fp8":
            return Format(8, None, scale, floating=True)
        by_group = chosen == "int4" or role == "weights"
        default = DEFAULT_INT4_GROUP if chosen == "int4" else None
        return Format(WEIGHTS[chosen], (self.group_size or default) if by_group else None, scale)
