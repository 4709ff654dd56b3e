"""The matrices of a bundle in their new formats: which get one, and the run that rounds them, one in memory at a time.

Rule: GPTQ rounds layer by layer, so that each layer is calibrated on what the rounded layers before it compute. Embedding and
head are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.loading import tensor_of
from retnet_export.graph.weights_file import WeightsFile
from retnet_export.quantize.calibration import LayerRunner
from retnet_export.quantize.formats import Format, Quantized, round_to_nearest
from retnet_export.quantize.gptq import Gram, gptq
from retnet_export.quantize.options import DEFAULT_INT4_GROUP, GROUP_SIZES, QuantizeOptions, Role
from retnet_export.quantize.rewrite import matrices
from retnet_export.quantize.store import MatrixStore
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.errors import ArgumentError, UserError
from retnet_export.runtime.numerics import first_not_finite
from retnet_export.runtime.progress import Progress

Array = NDArray[np.generic]


@dataclass(frozen=True)
class PlannedMatrix:
    """One matrix and its new format."""

    role: Role
    format: Format


def planned_matrices(source: Bundle, decode: ir.Model, options: QuantizeOptions) -> dict[str, PlannedMatrix]:
    """The matrices of a decode graph that change, by the initializer's name.

    Raises:
        UserError: there are none, or a group size does not divide the inputs of one; the message names the sizes that do.
    """
    plan: dict[str, PlannedMatrix] = {}
    grouped: dict[str, int] = {}
    for name, role in matrices(decode).items():
        tensor = tensor_of(decode, name)
        if (form := options.format_of(role, str(tensor.numpy().dtype))) is None:
            continue
        plan[name] = PlannedMatrix(role, form)
        if form.group_size is not None:
            grouped[name] = int(tensor.shape.numpy()[1 if role in ("embedding", "tied") else 0])
    if not plan:
        raise UserError(f"{source.path}: its graphs have no matrix to quantize")
    group = options.group_size or DEFAULT_INT4_GROUP
    if wrong := [f"{name} has {inputs}" for name, inputs in grouped.items() if inputs % group]:
        fitting = ", ".join(str(size) for size in GROUP_SIZES if all(inputs % size == 0 for inputs in grouped.values()))
        raise ArgumentError(
            "group_size",
            f"{group} does not divide the inputs of {len(wrong)} matrices ({', '.join(wrong[:4])}) of {source.path}; weights are "
            f"not padded: {f'choose {fitting}' if fitting else 'none of 16 to 256 fits, choose weights=int8'}",
        )
    return plan


class MatrixRun:
    """One run over all planned matrices of a bundle.

    Args:
        plan: what `planned_matrices` gave.
        file: the new weights file.

    Attributes:
        store: the quantized matrices.
    """

    def __init__(
        self, source: Bundle, decode: ir.Model, plan: Mapping[str, PlannedMatrix], file: WeightsFile, progress: Progress
    ) -> None:
        self._source, self._decode, self._plan, self._progress = source, decode, plan, progress
        self.store = MatrixStore(file)
        self._errors: dict[str, list[float]] = {}

    @property
    def errors(self) -> dict[str, float]:
        """Relative root mean square error of the weights, the mean over the matrices of each role."""
        return {role: float(np.mean(errors)) for role, errors in self._errors.items()}

    def run(self, tokens: NDArray[np.int64] | None) -> None:
        """Quantize everything: the layers by GPTQ if a calibration text (B, T) is given, the rest to nearest."""
        if tokens is not None:
            runner = LayerRunner(self._source, self._decode, tokens)
            for index in range(runner.count):
                weights = {name: self._weight(name) for name in runner.weight_names(index)}
                grams = runner.grams(index, weights, [name for name in weights if name in self._plan])
                for name, gram in grams.items():
                    weights[name] = self._quantize(name, weights[name], gram).dequantized().astype(weights[name].dtype)
                runner.advance(index, weights)
        for name in self._plan:
            if name not in self.store.stored:
                self._quantize(name, self._weight(name))

    def _quantize(self, name: str, stored: Array, gram: Gram | None = None) -> Quantized:
        role, form = self._plan[name].role, self._plan[name].format
        weight = np.asarray(stored, np.float32)
        if first_not_finite(weight) is not None:
            raise UserError(f"{self._source.path}: {name} holds values that are not finite; export the checkpoint again")
        if role in ("embedding", "tied"):
            weight = np.ascontiguousarray(weight.T)
        quantized = round_to_nearest(weight, form) if gram is None else gptq(weight, form, gram)
        self.store.put(name, role, quantized)
        self._errors.setdefault(role, []).append(quantized.relative_error(weight))
        self._progress("quantizing", len(self.store.stored) / len(self._plan))
        return quantized

    def _weight(self, name: str) -> Array:
        return np.array(tensor_of(self._decode, name).numpy())
