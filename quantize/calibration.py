"""The inputs of each matrix on the calibration text: the bundle's own decode graph, run one layer at a time.

Rule: one layer in memory. The graph is cut at the residual stream: a preamble (embedding, rotation), then layer after layer.
A layer runs over the whole text, in a batch of sequences, before the next one is looked at; between layers only the
residual stream is kept. A layer's float weights are inputs of its cut-out graph, so the same graph runs the quantized layer:
what the next layer is calibrated on carries the error of those before it, as GPTQ wants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.layers import LayerCutter, layer_of, residual_streams
from retnet_export.graph.loading import tensor_of
from retnet_export.graph.variants.pattern import name_of
from retnet_export.quantize.gptq import Gram
from retnet_export.quantize.texts import CHUNK, encode
from retnet_export.runtime.backends.base import NUMPY_DTYPES
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.files import read_text
from retnet_export.runtime.bundle.manifest import state_name
from retnet_export.runtime.model import Model

Array = NDArray[np.generic]

SEQUENCES = 16
"""Sequences that run side by side in calibration."""
LONGEST = 512
"""Tokens of a sequence in calibration, at most; 16 × 512 are enough for the Gram matrices of the widths met here."""
CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer's average: a passage of so many characters a token has tokens enough."""


def calibration_tokens(model: Model, path: Path) -> NDArray[np.int64]:
    """Token ids from a text file, (B, T): passages spread evenly over the file.

    Raises:
        UserError: the file cannot be read, is empty, not UTF-8, or shorter than one chunk.
    """
    text = read_text(path)
    passage = LONGEST * CHARACTERS_PER_TOKEN
    if len(text) <= SEQUENCES * passage:
        tokens = encode(model, text, path)
        rows = min(SEQUENCES, len(tokens) // CHUNK)
        return tokens[: rows * (len(tokens) // rows)].reshape(rows, -1)[:, :LONGEST]
    starts = np.linspace(0, len(text) - passage, SEQUENCES).astype(np.int64)
    passages = [encode(model, text, path, slice(start, start + passage))[:LONGEST] for start in starts]
    return np.stack([tokens[: min(map(len, passages))] for tokens in passages])


@dataclass(frozen=True)
class _Layer:
    """The values that cross the boundary of one layer, by name.

    Attributes:
        x_in, x_out: the residual stream before and after it.
        state_in, state_out: its state.
        shared: values that all layers read (rotation, count of tokens).
        weights: its tensors in the weights file.
        inputs_of: for each of its matrices, what it is multiplied with.
    """

    x_in: str
    x_out: str
    state_in: str
    state_out: str
    shared: tuple[str, ...]
    weights: tuple[str, ...]
    inputs_of: Mapping[str, str]


class LayerRunner:
    """Runs the layers of a decode graph one after another over the same text.

    Args:
        tokens: (B, T); a graph for a fixed batch takes as many of the rows, some twice if there are fewer.
    """

    def __init__(self, source: Bundle, model: ir.Model, tokens: NDArray[np.int64]) -> None:
        self._cutter = LayerCutter(model, source.file("weights.bin").resolve().parent, "calibrating")
        model = self._cutter.model
        shape = next(value.shape for value in model.graph.inputs if value.name == "tokens")
        batch = None if shape is None else shape[0]
        self._tokens = np.resize(tokens, (batch, tokens.shape[1])) if isinstance(batch, int) else tokens
        self._state = {spec.input: spec for spec in source.manifest.state}
        self._layers = _layers(model.graph)
        self._x, self._shared = self._run_preamble()

    @property
    def count(self) -> int:
        """How many layers there are."""
        return len(self._layers)

    def weight_names(self, index: int) -> tuple[str, ...]:
        """The tensors of the weights file that a layer reads."""
        return self._layers[index].weights

    def grams(self, index: int, weights: Mapping[str, Array], matrices: Sequence[str]) -> dict[str, Gram]:
        """XᵀX of the inputs of some of a layer's matrices over all tokens, with these weights; the residual stream stays."""
        taps = {name: self._layers[index].inputs_of[name] for name in matrices}
        grams = dict.fromkeys(matrices, np.zeros(()))
        held: dict[str, list[Array]] = {name: [] for name in matrices}
        for step, values in enumerate(self._run(index, weights, taps.values())):
            for name, tap in taps.items():
                held[name].append(values[tap])
            if step % CHUNK == CHUNK - 1 or step == self._tokens.shape[1] - 1:
                for name, parts in held.items():
                    x = np.concatenate(parts).astype(np.float32)
                    grams[name] = grams[name] + (x.T @ x)
                    parts.clear()
        return grams

    def advance(self, index: int, weights: Mapping[str, Array], matrices: Sequence[str] = ()) -> dict[str, float]:
        """Carry the residual stream through a layer; gives the largest magnitude of the inputs of some of its matrices."""
        taps = {name: self._layers[index].inputs_of[name] for name in matrices}
        largest = dict.fromkeys(matrices, 0.0)
        for step, values in enumerate(self._run(index, weights, taps.values())):
            self._x[step] = values[self._layers[index].x_out]
            for name, tap in taps.items():
                largest[name] = max(largest[name], float(np.abs(values[tap]).max()))
        return largest

    def largest_input(self, name: str) -> float:
        """The largest magnitude that flows into a product behind the last layer, to which the stream was carried before."""
        x = self._layers[-1].x_out
        product = next(node for node in self._cutter.model.graph if node.name == name)
        tap = name_of(product.inputs[0])
        if tap == x:
            return max(float(np.abs(values).max()) for values in self._x)
        session = self._cutter.open([x], [tap])
        return max(float(np.abs(session.run([tap], {x: values})[0]).max()) for values in self._x)

    def _run(self, index: int, weights: Mapping[str, Array], taps: Iterable[str]) -> Iterator[Mapping[str, Array]]:
        """Step a layer over the text; yields its residual output and the tapped values, (B, …) each, by name."""
        layer = self._layers[index]
        outputs = list(dict.fromkeys((layer.x_out, layer.state_out, *taps)))
        session = self._cutter.open((layer.x_in, layer.state_in, *layer.shared, *layer.weights), outputs)
        spec = self._state[layer.state_in]
        state: Array = np.zeros((len(self._tokens), *spec.shape[1:]), NUMPY_DTYPES[spec.dtype])
        for x, shared in zip(self._x, self._shared, strict=True):
            read = {name: shared[name] for name in layer.shared}
            feeds = {layer.x_in: x, layer.state_in: state, **read, **weights}
            results = dict(zip(outputs, session.run(outputs, feeds), strict=True))
            state = results[layer.state_out]
            yield results

    def _run_preamble(self) -> tuple[list[Array], list[dict[str, Array]]]:
        """Everything before the first layer: for each step its input, (B, D), and what layers share."""
        first = self._layers[0].x_in
        outputs = [first, *dict.fromkeys(name for layer in self._layers for name in layer.shared)]
        inputs = [value.name for value in self._cutter.model.graph.inputs if value.name in ("tokens", "position")]
        session = self._cutter.open([name for name in inputs if name], outputs)
        steps = []
        for step in range(self._tokens.shape[1]):
            feeds = {"tokens": self._tokens[:, step : step + 1], "position": np.full(len(self._tokens), step, np.int64)}
            steps.append(dict(zip(outputs, session.run(outputs, feeds), strict=True)))
        return [values.pop(first) for values in steps], steps


def activation_ranges(source: Bundle, decode: ir.Model, tokens: NDArray[np.int64], products: Mapping[str, str]) -> dict[str, float]:
    """The largest magnitude that flows into each product of a float bundle's decode graph over tokens (B, T).

    Both graphs take this number, and the scale follows from it and the format. `products` and the result are by the name of the
    node; `products` gives its matrix.
    """
    runner = LayerRunner(source, decode, tokens)
    largest: dict[str, float] = {}
    for index in range(runner.count):
        weights = {name: tensor_of(decode, name).numpy() for name in runner.weight_names(index)}
        largest |= runner.advance(index, weights, [name for name in weights if name in products.values()])
    return {node: largest[name] if name in largest else runner.largest_input(node) for node, name in products.items()}


def _layers(graph: ir.Graph) -> list[_Layer]:
    """Cut a decode graph at the residual stream."""
    nodes: dict[int, list[ir.Node]] = {}
    for node in graph:
        if (layer := layer_of(node)) is not None:
            nodes.setdefault(layer, []).append(node)
    streams = residual_streams(graph, len(nodes))
    found: list[_Layer] = []
    for index in range(len(nodes)):
        inside = set(nodes[index])
        read = dict.fromkeys(value for node in nodes[index] for value in node.inputs if value is not None)
        outside = [value for value in read if value.producer() not in inside]
        flowing = [name_of(value) for value in outside if not value.is_initializer()]
        # Before the first layer stands the embedding: the only thing there that is as wide as the stream.
        x_in = found[-1].x_out if found else _stream_input(nodes[0], flowing)
        state_in = state_name(index)
        found.append(
            _Layer(
                x_in=x_in,
                x_out=name_of(streams[index]),
                state_in=state_in,
                state_out=f"{state_in}_out",
                shared=tuple(name for name in flowing if name not in (x_in, state_in)),
                weights=tuple(name_of(value) for value in outside if isinstance(value.const_value, ir.ExternalTensor)),
                inputs_of={
                    name_of(node.inputs[1]): name_of(node.inputs[0])
                    for node in nodes[index]
                    if node.op_type == "MatMul" and node.inputs[1] in outside
                },
            )
        )
    return found


def _stream_input(nodes: Sequence[ir.Node], flowing: Sequence[str]) -> str:
    """What the first layer adds its first result to, or scales and adds."""
    addition = next(node for node in nodes if name_of(node) == "layers.0.retention.residual")
    value = addition.inputs[0]
    while value is not None and value.name not in flowing:
        producer = value.producer()
        value = None if producer is None else producer.inputs[0]
    return name_of(value)
