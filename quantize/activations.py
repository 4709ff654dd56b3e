"""Ranges of activations: the largest magnitude that flows into each product on a calibration text, by nvidia-modelopt.

Rule: one number a product. Both graphs take it, and the scale follows from it and the format: `largest / 127` for INT8,
`largest / 448` for FP8. The quantizer's own FP8 mode is not used: its scales are 448/127 times those of INT8 instead of
127/448 times, which leaves the range from ±36 to ±448 empty (modelopt 0.47; its issue 215).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.quantize.modelopt import GRAPH, JOB, SCALES, TOKENS
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.errors import ArgumentError, MissingExtraError, UserError

ACTIVATIONS = ("int8", "fp8")
RANGE = "max"
"""How the range is chosen: the largest magnitude met, or "entropy" (docs/lab/quantization.md has both measured)."""
PACKAGES: Mapping[str, str] = {
    "modelopt": "nvidia-modelopt",
    "onnx_graphsurgeon": "onnx-graphsurgeon",
    "onnxscript": "onnxscript",
    "onnxslim": "onnxslim",
    "lief": "lief",
}
"""What its quantizer imports, and the packages that have it."""


class Choices(Protocol):
    """The options of `quantize` that have to do with activations."""

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


@dataclass(frozen=True)
class ActivationRanges:
    """What flows into the products of a graph.

    Attributes:
        largest: the largest magnitude, by the product's name.
        by: what measured it, "nvidia-modelopt 0.47.0, max".
    """

    largest: Mapping[str, float]
    by: str


def check_options(options: Choices) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: with the reason, and what does.
    """
    chosen = options.activations
    if chosen is None:
        for name, value in (("weights", options.weights), ("head", options.head)):
            if value == "fp8":
                raise ArgumentError(name, "is 'fp8', which needs activations=fp8; alone, int8 is as small and more exact")
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
            "group_size", f"goes without activations={chosen}: an 8-bit product takes one scale for each output; leave it out"
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


def has_extra() -> bool:
    """Whether everything that measures activations is installed."""
    return all(importlib.util.find_spec(module) is not None for module in PACKAGES)


def check_installed() -> None:
    """Refuse before the work what would fail in it.

    Raises:
        MissingExtraError: a package of the extra is missing.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "cpu", "--activations")
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "activations", "--activations")


def activation_ranges(source: Bundle, products: Sequence[str], tokens: NDArray[np.int64], folder: Path) -> ActivationRanges:
    """Step a bundle's decode graph over a text and take the range of what flows into products.

    Args:
        source: a float bundle.
        products: names of the nodes.
        tokens: (B, T).
        folder: where there is room for several copies of the model; nothing is left there.

    Raises:
        UserError: the quantizer failed or left a product out.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="ranges-") as name:
        aside = Path(name).resolve()
        shutil.copyfile(source.file(source.manifest.graphs["decode"].file), aside / GRAPH)
        for file in source.manifest.files:
            if file.endswith(".bin"):
                shutil.copyfile(source.file(file), aside / file)
        np.save(aside / TOKENS, tokens)
        (aside / JOB).write_text(json.dumps({"range": RANGE, "products": list(products)}))
        command = [sys.executable, "-m", "retnet_export.quantize.modelopt", str(aside)]
        # Its temporary files, too, go where everything is removed.
        done = subprocess.run(command, cwd=aside, env={**os.environ, "TMPDIR": str(aside)}, capture_output=True, check=False)
        if done.returncode != 0 or not (aside / SCALES).is_file():
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(
                f"{source.path}: nvidia-modelopt could not measure the activations: {said[-1]}; "
                "quantize without --activations, or install the version that this package was tried with (docs/lab/quantization.md)"
            )
        result = json.loads((aside / SCALES).read_text())
    missing = [product for product in products if product not in result["largest"]]
    if missing:
        raise UserError(
            f"{source.path}: nvidia-modelopt {result['version']} measured no activations of {len(missing)} products "
            f"({', '.join(missing[:4])}); quantize without --activations"
        )
    return ActivationRanges(result["largest"], f"nvidia-modelopt {result['version']}, {RANGE}")
