"""Ways to store the state between two steps, as rewrites of a bundle's own graphs, and a backend that runs them.

    before   state.i ─ ·γ ─ + k·v ─┬─ state.i_out          after   part in ─ decode ─ ·γ ─ + k·v ─┬─ encode ─ part out
                                   └─ read                         (for each part of the heads)   └─ read ── side by side

A format cuts the heads, ordered from the fastest decay to the slowest, into parts, and says how each is stored. The update is
float32 in all formats; only what is kept from one step to the next differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from retnet_export.graph.inserter import Inserter
from retnet_export.runtime.backends.base import State, top_of
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import state_name

GOLDEN = 0.6180339887498949
"""The fraction whose multiples fill [0, 1) most evenly."""
Stored = Mapping[str, NDArray[np.generic]]
"""What one part of a layer's state is stored as, by role."""


@dataclass(frozen=True)
class Numbers:
    """An element type.

    Attributes:
        onnx: its ONNX type.
        numpy: the NumPy type of the same bytes.
        largest: what the largest element of a row is scaled to; None: stored as it is.
    """

    onnx: ir.DataType
    numpy: np.dtype[Any]
    largest: float | None = None


FLOAT32 = Numbers(ir.DataType.FLOAT, np.dtype(np.float32))
FLOAT16 = Numbers(ir.DataType.FLOAT16, np.dtype(np.float16))
BFLOAT16 = Numbers(ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16))
INT8 = Numbers(ir.DataType.INT8, np.dtype(np.int8), 127)
INT16 = Numbers(ir.DataType.INT16, np.dtype(np.int16), 32767)
FLOAT8 = Numbers(ir.DataType.FLOAT8E4M3FN, np.dtype(ml_dtypes.float8_e4m3fn), 448)


@dataclass(frozen=True)
class Codec:
    """How the states (B, h, Dk, Dv) of some heads are stored.

    Attributes:
        numbers: the element type; if it needs scales they are float32.
        axis: the axis along which elements share a scale: 3 gives one a row (Dk of them), 2 one a column (Dv); 0 gives both, a
            row of what is left when each column is divided by its largest element.
        rounding: of integers: "nearest"; "random", up or down with the odds of the remainder; "dithered", the same with a
            fixed pattern that moves on by the golden ratio every token, in place of random numbers.
    """

    numbers: Numbers
    axis: int = 3
    rounding: str = "nearest"

    def shapes(self, states: Sequence[int]) -> dict[str, tuple[Numbers, tuple[int, ...]]]:
        """The tensors to keep for states of shape (h, Dk, Dv), without the batch axis."""
        shapes = {"values": (self.numbers, tuple(states))}
        heads, rows, columns = states
        if self.numbers.largest is not None and self.axis in (3, 0):
            shapes["row_scales"] = (FLOAT32, (heads, rows, 1))
        if self.numbers.largest is not None and self.axis in (2, 0):
            shapes["column_scales"] = (FLOAT32, (heads, 1, columns))
        return shapes

    def floats(self, stored: Stored) -> NDArray[np.float32]:
        """The states that stored tensors stand for."""
        values: NDArray[np.float32] = stored["values"].astype(np.float32)
        for role in ("row_scales", "column_scales"):
            values = values * stored[role].astype(np.float32) if role in stored else values
        return values

    def decode(self, g: Inserter, stored: Mapping[str, ir.Value]) -> ir.Value:
        """The same in the graph."""
        if self.numbers is FLOAT32:
            return stored["values"]
        values = g.op("Cast", stored["values"], name="float32", to=ir.DataType.FLOAT)
        for role in ("row_scales", "column_scales"):
            values = g.op("Mul", values, stored[role], name=f"times_{role}") if role in stored else values
        return values

    def encode(self, g: Inserter, state: ir.Value, dither: ir.Value | None) -> dict[str, ir.Value]:
        """The tensors to keep for a new state."""
        largest = self.numbers.largest
        if self.numbers is FLOAT32:
            return {"values": state}
        if largest is None:
            return {"values": g.op("Cast", state, name="stored", to=self.numbers.onnx)}
        if self.rounding != "nearest":
            largest -= 0.1  # so that a largest element that is rounded up still fits
        steps, scales = state, {}
        if self.axis in (2, 0):
            # With scales for rows as well, those of columns only bring their largest elements to 1.
            scales["column_scales"] = self._scale(g, steps, 2, 1.0 if self.axis == 0 else largest)
            steps = g.op("Div", steps, scales["column_scales"], name="over_columns")
        if self.axis in (3, 0):
            scales["row_scales"] = self._scale(g, steps, 3, largest)
            steps = g.op("Div", steps, scales["row_scales"], name="over_rows")
        if self.numbers is not FLOAT8:
            steps = self._rounded(g, steps, dither)
        return {"values": g.op("Cast", steps, name="stored", to=self.numbers.onnx), **scales}

    def _scale(self, g: Inserter, state: ir.Value, axis: int, largest: float) -> ir.Value:
        name = f"axis_{axis}"
        peak = g.op(
            "ReduceMax", g.op("Abs", state, name=f"{name}.size"), constant(g, np.array([axis])), name=f"{name}.peak", keepdims=1
        )
        peak = g.op("Max", peak, constant(g, np.array(1e-30, np.float32)), name=f"{name}.peak_or_tiny")
        return g.op("Mul", peak, constant(g, np.array(1 / largest, np.float32)), name=f"{name}.scales")

    def _rounded(self, g: Inserter, steps: ir.Value, dither: ir.Value | None) -> ir.Value:
        if self.rounding == "nearest":
            return g.op("Round", steps, name="rounded")
        chance = g.op("RandomUniformLike", steps, name="chance", seed=1.0) if self.rounding == "random" else dither
        assert chance is not None
        return g.op("Floor", g.op("Add", steps, chance, name="lifted"), name="rounded")


@dataclass(frozen=True)
class Part:
    """Heads first to last (exclusive) and how they are stored."""

    first: int
    last: int
    codec: Codec

    @property
    def suffix(self) -> str:
        return f"heads_{self.first}_{self.last}"


Format = tuple[Part, ...]


def whole(config: ModelConfig, codec: Codec) -> Format:
    """All heads alike."""
    return (Part(0, config.num_heads, codec),)


def mixed(config: ModelConfig, fast: Codec, slow: Codec, slow_heads: int) -> Format:
    """The slowest heads apart."""
    first = config.num_heads - slow_heads
    return Part(0, first, fast), Part(first, config.num_heads, slow)


def state_bytes(config: ModelConfig, form: Format) -> int:
    """Bytes of the state of one sequence, scales included."""
    size = 0
    for part in form:
        shapes = part.codec.shapes((part.last - part.first, config.head_key_dim, config.head_value_dim))
        size += sum(numbers.numpy.itemsize * int(np.prod(shape)) for numbers, shape in shapes.values())
    return config.num_layers * size


def constant(g: Inserter, array: NDArray[np.generic]) -> ir.Value:
    """A constant of the graph, numbered."""
    return g.initializer(array, f"{g.scope}.constant_{len(g.graph.initializers)}")


def store_state(model: ir.Model, config: ModelConfig, form: Format) -> None:
    """Let a decode or prefill graph with a float32 state store it in another format; in place."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    dither = _dither(graph, config) if any(part.codec.rounding == "dithered" for part in form) else None
    for layer in range(config.num_layers):
        _store_layer(graph, nodes, config, form, layer, dither)


def _store_layer(
    graph: ir.Graph, nodes: Mapping[str | None, ir.Node], config: ModelConfig, form: Format, layer: int, dither: ir.Value | None
) -> None:
    place = f"layers.{layer}.retention"
    old = next(value for value in graph.inputs if value.name == state_name(layer))
    inputs = {part: _declare(graph, config, part, layer) for part in form}
    outputs: dict[str, ir.Value] = {}
    after = nodes[f"{place}.state_after"]

    def encode(g: Inserter, part: Part, state: ir.Value) -> None:
        for role, value in part.codec.encode(g, state, dither).items():
            outputs[f"{inputs[part][role].name}_out"] = value

    is_prefill = f"{place}.read_state" in nodes
    if is_prefill:
        # The parts are joined before and cut after, once a chunk.
        first = graph.node(0)
        states = [part.codec.decode(Inserter(graph, first, f"{state_name(layer)}.{part.suffix}"), inputs[part]) for part in form]
        old.replace_all_uses_with(Inserter(graph, first, state_name(layer)).op("Concat", *states, name="joined", axis=1))
        cut = _split(Inserter(graph, None, place), after.outputs[0], form, "state")
        for part, state in zip(form, cut, strict=True):
            encode(Inserter(graph, None, f"{place}.{part.suffix}"), part, state)
    else:
        # Each part is updated and read by itself, so that only the heads' outputs are joined.
        decayed, key_value, read = (nodes[f"{place}.{name}"] for name in ("decayed", "key_value", "read"))
        g = Inserter(graph, read, place)
        gamma = decayed.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        parts = [
            _split(g, node.inputs[index], form, name)
            for node, index, name in ((read, 0, "q"), (key_value, 0, "k"), (key_value, 1, "v"))
        ]
        reads = []
        for part, q, k, v in zip(form, *parts, strict=True):
            p = Inserter(graph, read, f"{place}.{part.suffix}")
            kept = p.op("Mul", part.codec.decode(p, inputs[part]), constant(p, gamma[part.first : part.last]), name="decayed")
            new = p.op("Add", kept, p.op("Mul", k, v, name="key_value"), name="state_after")
            reads.append(p.op("MatMul", q, new, name="read"))
            encode(p, part, new)
        joined = reads[0] if len(reads) == 1 else g.op("Concat", *reads, name="reads", axis=1)
        read.outputs[0].replace_all_uses_with(joined)
    position = next(index for index, value in enumerate(graph.outputs) if value.name == f"{state_name(layer)}_out")
    graph.outputs.pop(position)
    if not is_prefill:
        graph.remove([read, after, decayed, key_value], safe=True)
    graph.inputs.remove(old)
    for name, value in outputs.items():
        numbers, shape = _type_of(config, form, name.removesuffix("_out"))
        value.name, value.type, value.shape = name, ir.TensorType(numbers.onnx), ir.Shape(["batch", *shape])
        graph.outputs.append(value)


def _split(g: Inserter, value: ir.Value | None, form: Format, name: str) -> Sequence[ir.Value]:
    assert value is not None
    if len(form) == 1:
        return [value]
    sizes = constant(g, np.array([part.last - part.first for part in form]))
    return g.op_n("Split", value, sizes, names=[f"{name}.{part.suffix}" for part in form], dtypes=[None] * len(form), axis=1)


def _declare(graph: ir.Graph, config: ModelConfig, part: Part, layer: int) -> dict[str, ir.Value]:
    """New graph inputs for one part of one layer, by role."""
    found = {}
    for role, (numbers, shape) in _shapes(config, part).items():
        name = f"{state_name(layer)}.{part.suffix}.{role}"
        found[role] = ir.Value(name=name, type=ir.TensorType(numbers.onnx), shape=ir.Shape(["batch", *shape]))
        graph.inputs.append(found[role])
    return found


def _shapes(config: ModelConfig, part: Part) -> dict[str, tuple[Numbers, tuple[int, ...]]]:
    return part.codec.shapes((part.last - part.first, config.head_key_dim, config.head_value_dim))


def _type_of(config: ModelConfig, form: Format, name: str) -> tuple[Numbers, tuple[int, ...]]:
    _, _, suffix, role = name.split(".")
    return next(_shapes(config, part)[role] for part in form if part.suffix == suffix)


def _dither(graph: ir.Graph, config: ModelConfig) -> ir.Value:
    """A number in [0, 1) for each place of a state, (B, 1, Dk, Dv): a fixed pattern plus golden ratio times position."""
    position = next(value for value in graph.inputs if value.name == "position")
    g = Inserter(graph, graph.node(0), "dither")
    turn = constant(g, np.array(1 << 32))
    reduced = g.op("Mod", position, turn, name="position")
    phase = g.op("Mod", g.op("Mul", reduced, constant(g, np.array(round(GOLDEN * 2**32))), name="advance"), turn, name="phase")
    share = g.op(
        "Mul",
        g.op("Cast", phase, name="phase_float", to=ir.DataType.FLOAT),
        constant(g, np.array(2.0**-32, np.float32)),
        name="share",
    )
    share = g.op("Unsqueeze", share, constant(g, np.array([1, 2, 3])), name="share_of_sequence")
    pattern = np.random.default_rng(0).random((config.head_key_dim, config.head_value_dim), np.float32)
    moved = g.op("Add", share, constant(g, pattern), name="moved")
    return g.op("Sub", moved, g.op("Floor", moved, name="turns"), name="pattern")


class StateBackend:
    """A backend over rewritten graphs, for measurements.

    Args:
        config: the architecture.
        form: how the graphs store the state.
        decode: the rewritten decode graph.
        prefill: a rewritten prefill graph, or None.
        threads: threads an operator.
    """

    name = "onnxruntime"

    def __init__(self, config: ModelConfig, form: Format, decode: Path, prefill: Path | None = None, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._config, self._form = config, form
        self._sessions = [
            None if path is None else onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for path in (decode, prefill)
        ]

    def open_runner(self, batch: int) -> StateRunner:
        if batch != 1:
            raise ValueError("measurements run one sequence")
        return StateRunner(self._config, self._form, *self._sessions)


class StateRunner:
    """One sequence; the state is written where it was read, as the CPU backend does."""

    batch = 1

    def __init__(
        self,
        config: ModelConfig,
        form: Format,
        decode: onnxruntime.InferenceSession,
        prefill: onnxruntime.InferenceSession | None,
    ) -> None:
        self._config, self._form, self._decode, self._prefill = config, form, decode, prefill
        self._tokens, self._logits = np.zeros((1, 1), np.int64), np.zeros((1, config.vocab_size), np.float32)
        self._position, self._position_after = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._state: dict[str, tuple[Numbers, NDArray[np.generic]]] = {
            f"{state_name(layer)}.{part.suffix}.{role}": (numbers, np.zeros((1, *shape), numbers.numpy))
            for layer in range(config.num_layers)
            for part in form
            for role, (numbers, shape) in _shapes(config, part).items()
        }
        self._after = {name: np.zeros_like(array) for name, (_, array) in self._state.items()}
        self._binding = self._bind(decode, self._tokens, self._logits, {name: array for name, (_, array) in self._state.items()})

    def step(self, tokens: NDArray[np.int64]) -> None:
        self._tokens[:, 0] = tokens
        self._decode.run_with_iobinding(self._binding)
        self._position[:] = self._position_after

    def read(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (T, V) after each of T tokens read as one chunk by prefill."""
        assert self._prefill is not None
        logits: NDArray[np.float32] = np.empty((1, len(tokens), self._config.vocab_size), np.float32)
        row, length = np.ascontiguousarray(tokens[None]), np.array([len(tokens)])
        binding = self._bind(self._prefill, row, logits, self._after)
        rows = np.arange(len(tokens))[None]
        for name, array in (("length", length), ("rows", rows)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        self._prefill.run_with_iobinding(binding)
        self._position[:] = self._position_after
        for name, (_, array) in self._state.items():
            array[:] = self._after[name]  # prefill reads the state several times, so it cannot write it in place
        return logits.reshape(-1, self._config.vocab_size)

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._logits[:] = self.read(tokens[0, : lengths[0]])[-1:]

    def score(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.read(tokens[0, : lengths[0]])[rows[0]][None]
        return logits

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return top_of(self._logits, k)

    def read_state(self, slot: int) -> State:
        """The state as float32, under the names of an ordinary bundle."""
        state: dict[str, NDArray[np.generic]] = {"position": self._position.copy()}
        for layer in range(self._config.num_layers):
            parts = [
                part.codec.floats(
                    {role: self._state[f"{state_name(layer)}.{part.suffix}.{role}"][1] for role in _shapes(self._config, part)}
                )
                for part in self._form
            ]
            state[state_name(layer)] = np.concatenate(parts, 1)
        return state

    def write_state(self, slot: int, state: State) -> None:
        raise NotImplementedError("measurements start from the beginning")

    def _bind(
        self,
        session: onnxruntime.InferenceSession,
        tokens: NDArray[np.int64],
        logits: NDArray[np.float32],
        after: Mapping[str, NDArray[np.generic]],
    ) -> onnxruntime.IOBinding:
        binding = session.io_binding()
        binding.bind_input("tokens", "cpu", 0, np.int64, tokens.shape, tokens.ctypes.data)
        binding.bind_input("position", "cpu", 0, np.int64, (1,), self._position.ctypes.data)
        binding.bind_output("position_out", "cpu", 0, np.int64, (1,), self._position_after.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for name, (numbers, array) in self._state.items():
            binding.bind_input(name, "cpu", 0, int(numbers.onnx), array.shape, array.ctypes.data)
            binding.bind_output(f"{name}_out", "cpu", 0, int(numbers.onnx), array.shape, after[name].ctypes.data)
        return binding
