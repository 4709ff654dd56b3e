"""ONNX Runtime on the CPU: the best variant of the graphs that its version runs, over buffers that are bound once.

Rule: a step copies neither weights nor state. Buffers are bound when a runner is opened.

A step may write a layer's state where it read it, if its graph says so (`GraphSpec.steps_in_place`): one operator reads it, a
later one writes it, and ONNX Runtime runs operators one after another. That spares a third of the memory traffic of the state. Only
the position, which is read again after it was advanced, has a place of its own. Where chunks may do the same (`chunks_in_place`),
there is one set of buffers; else a chunk reads the state from one set and writes it to another, and the next run goes on
from there.

ONNX Runtime packs the weights of every session for itself, so decode.onnx and prefill.onnx side by side would hold them
twice. They are therefore held by one session, of prefill.onnx, which reads one token as well as many. Of the variant for CPUs that
costs a step 1 % more than decode.onnx. Of the portable graphs, which older versions run, it is a sixth; that is worth it for float
weights, but quantized ones are small and steps over them short, so there they get a session a graph, unless memory matters more
(docs/lab/prefill.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import NUMPY_DTYPES, PassCost, State, last_rows, state_from_graph, top_of
from retnet_export.runtime.backends.onnxruntime_api import (
    ACTIVATION_ENTRY,
    best_variant,
    check_computes,
    check_session,
    return_free_memory,
    slow_when_quantized,
)
from retnet_export.runtime.backends.registration import Registration
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.layout import StateLayout
from retnet_export.runtime.bundle.manifest import GraphSpec, Manifest, StateSpec
from retnet_export.runtime.errors import MissingExtraError, UserError, what_is_missing

if TYPE_CHECKING:
    import onnxruntime


class OnnxRuntimeBackend:
    """A bundle loaded into ONNX Runtime's CPU provider.

    Args:
        bundle: the bundle.
        threads: threads per operator; ONNX Runtime's choice (one per physical core) when None.
        low_memory: True holds the weights once, float weights as the mapped file itself instead of a packed copy, and keeps no
            memory between runs; False gives each graph a session of its own; None weighs speed against memory as above.
        variant: of the bundle's graphs; the best that this ONNX Runtime runs when None.

    Raises:
        UserError: ONNX Runtime is missing or refuses the graph.
    """

    name = "onnxruntime"

    def __init__(
        self, bundle: Bundle, threads: int | None = None, low_memory: bool | None = None, variant: str | None = None
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "cpu", "running a bundle on the CPU") from error
        check_computes(bundle.manifest, bundle.path)
        self._bundle = bundle
        self.variant = best_variant(bundle.manifest, "cpu") if variant is None else variant
        self._graphs = bundle.manifest.variants[self.variant].graphs
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        quantized = bundle.manifest.quantization is not None
        if low_memory and not quantized:
            # Products with quantized weights are twenty times slower unpacked, those with floats a tenth.
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(*ACTIVATION_ENTRY)
        self._tidy = bool(low_memory)
        options.enable_cpu_mem_arena = not self._tidy
        self._options = options
        self._prefill = self._load("prefill")
        share = (not quantized or self._graphs["prefill"].steps_in_place) if low_memory is None else low_memory
        self._decode = self._prefill if share else self._load("decode")
        return_free_memory()  # what packing the weights took

    def _load(self, graph: str) -> onnxruntime.InferenceSession:
        import onnxruntime

        path = self._bundle.file(self._graphs[graph].file)
        try:
            session = onnxruntime.InferenceSession(str(path), self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no narrower base class
            raise UserError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load the graph: {error}") from error
        check_session(path, self._graphs[graph], session)
        return session

    @property
    def pass_cost(self) -> PassCost:
        """Float products of several rows cost a step more where the weights lie in the cache, and little where they do not: the
        former is stated. Those of quantized weights take tokens in pairs, each nearly as dear as one (docs/lab/cpu-step.md)."""
        return PassCost(1.0, 0.1) if self._bundle.manifest.quantization is None else PassCost(0.0, 0.25)

    def open_runner(self, batch: int) -> OnnxRuntimeRunner:
        manifest = self._bundle.manifest
        fixed = manifest.graphs["decode"].inputs[0].shape[0]
        if fixed not in (-1, batch):
            raise UserError(f"{self._bundle.path}: exported for batch {fixed}, asked for {batch}; export it without a fixed batch")
        return OnnxRuntimeRunner(self._decode, self._prefill, manifest, self._graphs, batch, self._tidy)


_Bindings: TypeAlias = "tuple[onnxruntime.IOBinding, ...]"


class OnnxRuntimeRunner:
    """Buffers and bindings of one batch of sequences."""

    def __init__(
        self,
        decode: onnxruntime.InferenceSession,
        prefill: onnxruntime.InferenceSession,
        manifest: Manifest,
        graphs: Mapping[str, GraphSpec],
        batch: int,
        tidy: bool = False,
    ) -> None:
        self._decode, self._prefill, self.batch, self._tidy = decode, prefill, batch, tidy
        self._specs = manifest.state
        self._layout = graphs["decode"].state_layout
        self._tokens = np.zeros((batch, 1), np.int64)
        self._one_token, self._first_row = np.ones(batch, np.int64), np.zeros((batch, 1), np.int64)
        self._logits = np.zeros((batch, manifest.model.vocab_size), np.float32)
        self._shared = decode is prefill
        self._steps_in_place = graphs["prefill" if self._shared else "decode"].steps_in_place
        self._chunks_in_place = graphs["prefill"].chunks_in_place
        sides = 1 if self._steps_in_place and self._chunks_in_place else 2
        self._buffers = tuple({spec.input: _filled(spec, self._layout, batch) for spec in manifest.state} for _ in range(sides))
        self._position_after = np.zeros(batch, np.int64)
        self._side = 0
        self._bindings: dict[int, tuple[_Bindings, _Bindings, _Bindings]] = {}
        self.narrow(batch)

    def narrow(self, slots: int) -> None:
        self._slots = slots
        if slots not in self._bindings:
            self._bindings[slots] = self._bind(slots)
        self._decode_bindings, self._prefill_bindings, self._trial_bindings = self._bindings[slots]

    def _bind(self, slots: int) -> tuple[_Bindings, _Bindings, _Bindings]:
        """Bindings of decode, of prefill, and of prefill from one side to the other over the first so many slots, for each side."""
        sides = [{name: buffer[:slots] for name, buffer in buffers.items()} for buffers in self._buffers]
        swapping = list(zip(sides, reversed(sides), strict=True))
        in_place = [(side, {**side, "position": self._position_after[:slots]}) for side in sides]
        decode, prefill, trial = (
            tuple(self._bind_state(session, before, after) for before, after in (in_place if stays else swapping))
            for session, stays in (
                (self._decode, self._steps_in_place),
                (self._prefill, self._chunks_in_place),
                (self._prefill, len(sides) == 1),
            )
        )
        for binding in decode:
            _bind_input(binding, "tokens", self._tokens[:slots])
            if self._shared:
                _bind_input(binding, "length", self._one_token[:slots])
                _bind_input(binding, "rows", self._first_row[:slots])
        return decode, prefill, trial

    def step(self, tokens: NDArray[np.int64]) -> None:
        self._tokens[: self._slots, 0] = tokens
        self._decode.run_with_iobinding(self._decode_bindings[self._side])
        self._advance(self._steps_in_place)

    def _advance(self, in_place: bool) -> None:
        """Go on from where a run wrote the state."""
        if in_place:
            self._buffers[self._side]["position"][: self._slots] = self._position_after[: self._slots]
        else:
            self._side = 1 - self._side

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        # Columns that are padding in every slot are not computed at all.
        tokens, logits = tokens[:, : max(lengths.max(), 1)], self._logits[: self._slots, None]
        self._read(tokens, lengths, last_rows(lengths), logits, self._chunks_in_place)

    def score(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = np.empty((*rows.shape, self._logits.shape[1]), np.float32)
        self._read(tokens, lengths, rows, logits, self._chunks_in_place)
        return logits

    def score_on_trial(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if len(self._buffers) == 1:  # the state before is kept on a side of its own, made for the first trial
            self._buffers = (*self._buffers, {spec.input: _filled(spec, self._layout, self.batch) for spec in self._specs})
            self._bindings.clear()
            self.narrow(self._slots)
        logits = np.empty((*rows.shape, self._logits.shape[1]), np.float32)
        self._read(tokens, lengths, rows, logits, False)
        return logits

    def undo(self) -> None:
        self._side = 1 - self._side

    def _read(
        self,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: NDArray[np.int64],
        logits: NDArray[np.float32],
        in_place: bool,
    ) -> None:
        """Run the prefill graph; logits of `rows` (B, R) go to `logits` (B, R, V)."""
        binding = (self._prefill_bindings if in_place else self._trial_bindings)[self._side]
        inputs = {"tokens": tokens, "length": lengths, "rows": rows}
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}  # until the run is over
        for name, array in held.items():
            _bind_input(binding, name, array)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        self._prefill.run_with_iobinding(binding)
        self._advance(in_place)
        if self._tidy:
            return_free_memory()

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return top_of(self._logits[: self._slots], k)

    def read_state(self, slot: int) -> State:
        slots = {name: buffer[slot : slot + 1] for name, buffer in self._buffers[self._side].items()}
        return state_from_graph(self._specs, self._layout, slots)

    def write_state(self, slot: int, state: State) -> None:
        for spec in self._specs:
            target = self._buffers[self._side][spec.input][slot : slot + 1]
            if spec.layer is None:
                target[...] = state[spec.input]
            else:
                self._layout.write(state[spec.input], target)

    def copy_state(self, source: int, target: int) -> None:
        for buffer in self._buffers[self._side].values():
            buffer[target] = buffer[source]

    def _bind_state(self, session: onnxruntime.InferenceSession, before: State, after: State) -> onnxruntime.IOBinding:
        binding = session.io_binding()
        for name, array in before.items():
            _bind_input(binding, name, array)
        outputs = {spec.output: after[spec.input] for spec in self._specs}
        logits = self._logits[: len(before["position"])]
        if session is self._prefill:
            logits = logits[:, None]  # of one row
        for name, array in {"logits": logits, **outputs}.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding


def _filled(spec: StateSpec, layout: StateLayout, batch: int) -> NDArray[np.generic]:
    """A buffer at the initial state, as the graph takes it; zeros take no memory before a slot is used."""
    whole, dtype = (batch, *spec.shape[1:]), NUMPY_DTYPES[spec.dtype]
    shape = whole if spec.layer is None else layout.shape(whole)
    return np.zeros(shape, dtype) if spec.initial == 0 else np.full(shape, spec.initial, dtype)


def _bind_input(binding: onnxruntime.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    """Bind a contiguous array, which must outlive the run."""
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def unavailable() -> str | None:
    """Why the backend cannot work here, or None if it can."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return what_is_missing(("onnxruntime",)) or str(error)
    return None


def _slow() -> str | None:
    """Why quantized bundles are slow here, or cannot run."""
    if (reason := unavailable()) is not None:
        return reason
    import onnxruntime

    return slow_when_quantized(onnxruntime.__version__)


REGISTRATIONS = (
    Registration(
        name="onnxruntime",
        open=OnnxRuntimeBackend,
        unavailable=unavailable,
        purposes={"generate on the CPU (onnxruntime)": unavailable, "run quantized bundles fast on the CPU": _slow},
        state_passes=7.0,  # times γ (read, write), k·v (write), add (two reads, a write), read-out (a read)
        basis="a roofline fitted to this project's measurements on two CPU cores",
    ),
)
