"""ONNX Runtime on an NVIDIA GPU: state, tokens, position and logits stay on the device; a step is one captured CUDA graph.

Rule: a step copies the tokens in and nothing out. The graph reads the state from one set of buffers and writes it to the
other; the two directions are captured as two CUDA graphs of the session (run option `gpu_graph_id`). Logits, or the largest of
them where the graph chooses them itself, cross to the host when asked for.

Two things about CUDA graphs in ONNX Runtime that this module is arranged around: a captured graph holds the addresses it saw,
so buffers live as long as the stream; and a first run runs several times, which ping-pong buffers survive, and after which the
state is set to its initial value.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import NUMPY_DTYPES, State, last_rows, state_from_graph, state_to_graph, top_of
from retnet_export.runtime.backends.device_weights import DeviceWeights
from retnet_export.runtime.backends.onnxruntime_api import best_variant, check_session
from retnet_export.runtime.backends.registration import Registration
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.manifest import GraphSpec, StateSpec
from retnet_export.runtime.device import cuda
from retnet_export.runtime.errors import MissingExtraError, UserError
from retnet_export.runtime.numerics import Tolerance

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"
SESSION_OPTIONS = {
    "ep.cuda.enable_gemm_auto_tune": "1",  # per shape, the fastest of cuBLAS and ONNX Runtime's own kernels for few rows
    "session.use_device_allocator_for_initializers": "1",  # weights are not rounded up to the arena's blocks
}
"""Settings of both sessions; versions of ONNX Runtime that do not know them ignore them."""

MANY_ROWS_OPTIONS = {"ep.cuda.fpa_intb_gemm": "1"}
"""Of decode for batches: INT4 and INT8 weights on the tensor cores, whose kernel for one row is slower, and for a prompt's rows no
faster than floats made of a matrix at a time (docs/lab)."""
ON_A_JETSON = "on a Jetson: NVIDIA's onnxruntime-gpu wheel for its JetPack"
FLOATS = frozenset({"float32", "float16", "bfloat16"})


class OnnxRuntimeCudaBackend:
    """A bundle loaded into ONNX Runtime's CUDA provider.

    Both graphs read one copy of the weights. Quantized ones get a second, in the order that the tensor cores' kernels want, when
    the first batch of several sequences is opened. Streams may be used by different threads, each by one at a time.

    Args:
        bundle: the bundle; one with the variant `onnxruntime-cuda` is faster.
        graphs: whether steps are captured as CUDA graphs.
        low_memory: True does without the second copy; steps of batches then take longer.
        variant: of the bundle's graphs; the best that this ONNX Runtime runs when None.

    Raises:
        UserError: ONNX Runtime has no CUDA provider, there is no GPU, or the graph is refused.
    """

    name = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle, *, graphs: bool = True, low_memory: bool | None = None, variant: str | None = None) -> None:
        reason = unavailable()
        if reason is not None:
            raise UserError(f"the backend {self.name!r} does not work here: {reason}")
        stream = _stream()
        self.variant = best_variant(bundle.manifest, "cuda") if variant is None else variant
        self._specs = bundle.manifest.variants[self.variant].graphs
        weights = DeviceWeights({name: bundle.file(spec.file) for name, spec in self._specs.items()}, stream)
        # Attributes are dropped in this order: a session uses its weights and its stream until it is gone.
        self._prefill: onnxruntime.InferenceSession | None = None
        self._decode: dict[bool, onnxruntime.InferenceSession] = {}
        self._bundle, self._graphs, self._low_memory = bundle, graphs, low_memory
        self._weights, self._stream = weights, stream
        self._graph_ids = itertools.count(1)
        self._decode_session(1)

    def _load(self, graph: str, capture: bool, *, many_rows: bool) -> onnxruntime.InferenceSession:
        import onnxruntime

        path = self._bundle.file(self._specs[graph].file)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        onnxruntime.set_default_logger_severity(3)  # 1.31 warns, at every session, of a plugin that there is none of
        for key, value in (SESSION_OPTIONS | (MANY_ROWS_OPTIONS if many_rows else {})).items():
            options.add_session_config_entry(key, value)
        self._weights.add_to(options, graph)
        provider = {
            "device_id": "0",
            "user_compute_stream": str(self._stream.handle),
            "enable_cuda_graph": "1" if capture else "0",
            "enable_skip_layer_norm_strict_mode": "1",  # norms are summed in float32
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",  # float32 means float32
        }
        try:
            with cuda.LOCK:
                session = onnxruntime.InferenceSession(str(path), options, providers=[(PROVIDER, provider), "CPUExecutionProvider"])
        except Exception as error:  # its errors share no narrower base class
            raise UserError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load the graph on the GPU: {error}") from error
        if PROVIDER not in session.get_providers():
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} could not start its CUDA provider; are CUDA and cuDNN installed?"
            )
        check_session(path, self._specs[graph], session)
        return session

    def prefill_session(self) -> onnxruntime.InferenceSession | None:
        """The prefill graph's session, loaded when first needed; None if the bundle has none."""
        with cuda.LOCK:  # two sessions may need it at once
            if self._prefill is None and "prefill" in self._specs:
                self._prefill = self._load("prefill", False, many_rows=False)
        return self._prefill

    def _decode_session(self, batch: int) -> onnxruntime.InferenceSession:
        """The session for a batch: quantized weights have kernels for one row and for several, and a session has one of them."""
        many_rows = batch > 1 and not self._low_memory and self._bundle.manifest.precision.weights not in FLOATS
        with cuda.LOCK:
            if many_rows not in self._decode:
                self._decode[many_rows] = self._load("decode", self._graphs, many_rows=many_rows)
        return self._decode[many_rows]

    def open_stream(self, batch: int) -> OnnxRuntimeCudaStream:
        manifest = self._bundle.manifest
        spec = self._specs["decode"]
        if spec.inputs[0].shape[0] not in (-1, batch):
            raise UserError(
                f"{self._bundle.path}: exported for batch {spec.inputs[0].shape[0]}, asked for {batch}; export it without --batch"
            )
        ids = (next(self._graph_ids), next(self._graph_ids)) if self._graphs else None
        return OnnxRuntimeCudaStream(self, self._stream, self._decode_session(batch), spec, manifest.state, batch, ids)


def _stream() -> cuda.Stream:
    """The stream of every model of the process: once a second one has done work, each kernel of a captured graph starts later on
    both, half a microsecond on an H200, for as long as the process lives (docs/lab)."""
    with cuda.LOCK:
        return _one_stream()


@functools.cache
def _one_stream() -> cuda.Stream:
    return cuda.Stream()


def unavailable() -> str | None:
    """Why the backend cannot work here, or None if it can."""
    try:
        import onnxruntime
    except ImportError:
        return f"{MissingExtraError('onnxruntime-gpu', 'cuda', 'running a bundle on an NVIDIA GPU')} ({ON_A_JETSON})"
    if PROVIDER not in onnxruntime.get_available_providers():
        return (
            f"this onnxruntime {onnxruntime.__version__} is built without CUDA; "
            f"pip uninstall onnxruntime, then pip install 'retnet-export[cuda]' ({ON_A_JETSON})"
        )
    return cuda.unavailable()


class OnnxRuntimeCudaStream:
    """Device buffers and bindings of one batch of sequences."""

    def __init__(
        self,
        backend: OnnxRuntimeCudaBackend,
        stream: cuda.Stream,
        session: onnxruntime.InferenceSession,
        spec: GraphSpec,
        state: tuple[StateSpec, ...],
        batch: int,
        graph_ids: tuple[int, int] | None,
    ) -> None:
        self.batch, self._specs, self._layout = batch, state, spec.state_layout
        self._shapes = {each.name: (batch, *each.shape[1:]) for each in spec.outputs}
        self._dtypes = {each.name: NUMPY_DTYPES[each.dtype] for each in spec.outputs}
        # Dropped in this order: bindings and sessions before the buffers and the stream that they use.
        self._bindings: tuple[onnxruntime.IOBinding, ...] = ()
        self._session, self._backend, self._stream = session, backend, stream
        self._tokens = cuda.DeviceBuffer(8 * batch)
        self._host_tokens = cuda.pinned((batch, 1), np.int64)
        self._sides = tuple({each.input: cuda.DeviceBuffer(self._bytes(each.output)) for each in state} for _ in range(2))
        kept = {each.output for each in state}
        self._results = {name: cuda.DeviceBuffer(self._bytes(name)) for name in self._shapes if name not in kept}
        self._hosts = {name: cuda.pinned(self._shapes[name], self._dtypes[name]) for name in self._results}
        self._current: set[str] = set()  # results that the last run gave
        self._fetched: set[str] = set()  # those of them that are on the host
        self._bindings = tuple(self._bind(session, side, self._results) for side in range(2))
        for binding in self._bindings:
            binding.bind_input("tokens", "cuda", 0, np.int64, (batch, 1), self._tokens.address)
        self._options = tuple(self._run_options(graph_id) for graph_id in graph_ids or (None, None))
        self._side = 0
        stream.fill(self._tokens, 0)
        self._reset()
        for side in range(2 if graph_ids else 0):
            self._run(session, self._bindings[side], self._options[side])
        self._reset()

    def step(self, tokens: NDArray[np.int64]) -> None:
        self._stream.synchronize()  # the step before may still be reading the pinned tokens
        self._host_tokens[:, 0] = tokens
        self._stream.copy_to_device(self._tokens, self._host_tokens)
        self._run(self._session, self._bindings[self._side], self._options[self._side])
        self._advance(self._results)

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._read(tokens[:, : max(lengths.max(), 1)], lengths, last_rows(lengths), self._results)

    def score(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        results = {name: cuda.DeviceBuffer(self._bytes(name) * rows.shape[1]) for name in self._results}
        self._read(tokens, lengths, rows, results)
        self._current.clear()  # which are of one row a slot
        logits = np.empty((*rows.shape, self._shapes["logits"][1]), np.float32)
        self._stream.copy_to_host(logits, results["logits"])
        self._stream.synchronize()
        return logits

    def _read(
        self,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: NDArray[np.int64],
        results: Mapping[str, cuda.DeviceBuffer],
    ) -> None:
        """Run the prefill graph; `results` have room for what it gives of `rows` (B, R)."""
        session = self._backend.prefill_session()
        assert session is not None
        binding = self._bind(session, self._side, results, rows.shape[1:])
        for name, array in (("tokens", tokens), ("length", lengths), ("rows", rows)):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._run(session, binding, self._run_options(None))
        self._advance(output.name for output in session.get_outputs())
        self._stream.synchronize()  # the host arrays go with this call

    def logits(self) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._fetch("logits")["logits"]
        return logits

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        kept = self._shapes.get("top_logits", (0, 0))[1]
        if k > kept or "top_logits" not in self._current:
            return top_of(self.logits(), k)
        top = self._fetch("top_tokens", "top_logits")
        tokens, values = top["top_tokens"], top["top_logits"]
        # The operator leaves out NaN, and some of those equal to the smallest that it keeps; then the whole row is looked at.
        beyond = kept < self._shapes["logits"][1] and (values[:, k - 1] == values[:, -1]).any()
        if beyond or not np.isfinite(values[:, 0]).all():
            return top_of(self.logits(), k)
        looked_at = values[:, : k + 1]
        if (looked_at[:, 1:] == looked_at[:, :-1]).any():
            order = np.lexsort((tokens, -values), axis=-1)  # it keeps no order among equal ones
            tokens, values = np.take_along_axis(tokens, order, -1), np.take_along_axis(values, order, -1)
        return tokens[:, :k], values[:, :k]

    def read_state(self, slot: int) -> State:
        arrays: dict[str, NDArray[Any]] = {}
        for spec in self._specs:
            array = np.empty((1, *self._shapes[spec.output][1:]), self._dtypes[spec.output])
            self._stream.copy_to_host(array, self._sides[self._side][spec.input], offset=slot * array.nbytes)
            arrays[spec.input] = array
        self._stream.synchronize()
        return state_from_graph(self._specs, self._layout, arrays)

    def write_state(self, slot: int, state: State) -> None:
        arrays = state_to_graph(self._specs, self._layout, state)
        for name, array in arrays.items():
            self._stream.copy_to_device(self._sides[self._side][name], array, offset=slot * array.nbytes)
        self._stream.synchronize()

    def _run(self, session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions) -> None:
        with cuda.LOCK:  # the first run of a thread captures
            session.run_with_iobinding(binding, options)

    def _reset(self) -> None:
        """The initial state in every slot of both sets."""
        for spec, side in itertools.product(self._specs, self._sides):
            if spec.initial == 0:
                self._stream.fill(side[spec.input], 0)
            else:
                start = np.full(self._shapes[spec.output], spec.initial, self._dtypes[spec.output])
                self._stream.copy_to_device(side[spec.input], start)
        self._stream.synchronize()
        self._side = 0
        self._current.clear()
        self._fetched.clear()

    def _advance(self, results: Iterable[str]) -> None:
        """The other set of buffers holds the state now, and `results` are those of the run that wrote it."""
        self._side = 1 - self._side
        self._current = set(results)
        self._fetched.clear()

    def _fetch(self, *names: str) -> dict[str, NDArray[Any]]:
        """Results of the last run on the host; copied once a run."""
        missing = [name for name in names if name not in self._fetched]
        for name in missing:
            self._stream.copy_to_host(self._hosts[name], self._results[name])
        if missing:
            self._stream.synchronize()
            self._fetched.update(missing)
        return {name: self._hosts[name] for name in names}

    def _bytes(self, output: str) -> int:
        return int(np.prod(self._shapes[output])) * self._dtypes[output].itemsize

    def _bind(
        self,
        session: onnxruntime.InferenceSession,
        side: int,
        results: Mapping[str, cuda.DeviceBuffer],
        rows: tuple[int, ...] = (),
    ) -> onnxruntime.IOBinding:
        """State from one set of buffers to the other, and results, of one row a slot or of (R,) rows, into theirs."""
        binding = session.io_binding()
        before, after = self._sides[side], self._sides[1 - side]
        for spec in self._specs:
            shape, dtype = self._shapes[spec.output], self._dtypes[spec.output]
            binding.bind_input(spec.input, "cuda", 0, dtype, shape, before[spec.input].address)
            binding.bind_output(spec.output, "cuda", 0, dtype, shape, after[spec.input].address)
        for name in (output.name for output in session.get_outputs() if output.name in results):
            batch, *rest = self._shapes[name]
            binding.bind_output(name, "cuda", 0, self._dtypes[name], (batch, *rows, *rest), results[name].address)
        return binding

    def _run_options(self, graph_id: int | None) -> onnxruntime.RunOptions:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(-1 if graph_id is None else graph_id))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options


REGISTRATIONS = (
    Registration(
        name="onnxruntime-cuda",
        open=lambda bundle, threads, low_memory: OnnxRuntimeCudaBackend(bundle, low_memory=low_memory),
        unavailable=unavailable,
        purposes={"generate on an NVIDIA GPU (onnxruntime-cuda)": unavailable},
        state_passes=2.0,  # in its variant one operator decays, updates and reads out the state
        basis="a roofline fitted to this project's measurements on an H100",
        tolerances={
            "float32": Tolerance(1e-4, "float32 rounding, TF32 off; sums in another order than on the CPU"),
            "float16": Tolerance(5e-2, "as on the CPU, and the residual stream and the gates rounded to 11 bits as well"),
        },
    ),
)
