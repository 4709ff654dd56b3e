"""TensorRT: engines that `compile` made, with state and logits on the GPU from the first token to the last.

Rules. No address is bound to a state input and a state output at once: two sets of state buffers change roles each step. What
crosses to the host in a step is a token in and a few candidates out, through pinned memory; the logits cross when asked for.
The host waits once per token, when it looks at the candidates. A step is one CUDA graph, one for each of the two directions
between the buffer sets; it is captured after the direction has run once, because TensorRT may allocate when shapes are new.

    step, even:  tokens -> device;  engine: state 0 -> state 1;  candidates -> host
    step, odd:   tokens -> device;  engine: state 1 -> state 0;  candidates -> host
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.agreement import check_agrees
from retnet_export.runtime.backends.base import (
    NUMPY_DTYPES,
    State,
    initial_state,
    last_rows,
    state_from_graph,
    state_to_graph,
    top_of,
)
from retnet_export.runtime.backends.registration import Registration, WhyNot
from retnet_export.runtime.backends.tensorrt_api import (
    io_tensors,
    load_module,
    make_logger,
    unavailable,
    unavailable_on_this_gpu,
)
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import (
    FOLDER,
    TOP_LOGITS,
    TOP_TOKENS,
    EnginePart,
    EngineRecord,
    find_engine,
    map_engine,
    open_shape,
)
from retnet_export.runtime.bundle.manifest import PORTABLE, Manifest, StateSpec
from retnet_export.runtime.device import cuda
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import Tolerance

if TYPE_CHECKING:
    import tensorrt as trt


ALIGNMENT = 256
"""Between addresses, as of CUDA's own allocations."""


class TensorRtError(RuntimeError):
    """TensorRT refused a call that should have worked."""


class TensorRtBackend:
    """A compiled bundle on this machine's GPU.

    Args:
        bundle: the bundle; its folder `engines/` holds the engine.
        target: "tensorrt" or "tensorrt-rtx".

    Raises:
        UserError: TensorRT or the GPU is missing, there is no engine for them, or it is of another bundle.
    """

    def __init__(self, bundle: Bundle, target: str = "tensorrt") -> None:
        self.name, self.variant = target, PORTABLE
        self.manifest: Manifest = bundle.manifest
        self.module: Any = load_module(target)
        device = cuda.device()
        capability = f"{device.compute_capability[0]}.{device.compute_capability[1]}"
        self.record: EngineRecord = find_engine(bundle, target, self.module.__version__, capability)
        self.logger = make_logger(self.module)
        self._runtime: trt.Runtime = self.module.Runtime(self.logger)
        self._engines = {name: self._load(bundle, name) for name in self.record.files}
        # One stream for everything: runs never overlap, so one block of scratch memory serves them all.
        self.stream = cuda.Stream()
        self.scratch = cuda.DeviceBuffer(
            max(self.engine(part).get_device_memory_size_for_profile_v2(part.profile) for part in self.record.parts)
        )

    def _load(self, bundle: Bundle, name: str) -> trt.ICudaEngine:
        with map_engine(bundle, self.record, name) as content:
            engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = self.logger.errors[-1] if self.logger.errors else "it gave no reason"
            raise UserError(
                f"{bundle.path}: {self.name} {self.module.__version__} cannot load {name}: {reason}; "
                f"compile again on this machine: retnet-export compile {bundle.path} --target {self.name}"
            )
        for graph, prefix in {(part.graph, part.prefix) for part in self.record.parts if part.file == name}:
            inputs, outputs = (
                [replace(tensor, name=tensor.name.removeprefix(prefix)) for tensor in tensors if tensor.name.startswith(prefix)]
                for tensors in io_tensors(self.module, engine)
            )
            spec = self.manifest.graphs[graph]
            check_agrees(bundle.path / FOLDER / name, spec, inputs, outputs, added=(TOP_LOGITS, TOP_TOKENS))
        return engine

    def engine(self, part: EnginePart) -> trt.ICudaEngine:
        """The loaded engine of a part."""
        return self._engines[part.file]

    def open_runner(self, batch: int) -> TensorRtRunner:
        fixed = self.manifest.graphs["decode"].inputs[0].shape[0]
        if not 1 <= batch <= self.record.max_batch or fixed not in (-1, batch):
            expected = f"1 to {self.record.max_batch}" if fixed == -1 else str(fixed)
            raise UserError(
                f"{self.name}: asked for a batch of {batch}, the engine takes {expected}; compile it with max_batch={batch}"
            )
        return TensorRtRunner(self, batch)


class TensorRtRunner:
    """Buffers, execution contexts and CUDA graphs of one batch of sequences."""

    def __init__(self, backend: TensorRtBackend, batch: int) -> None:
        self._backend, self.batch = backend, batch
        self._stream = backend.stream
        self._specs = {spec.input: spec for spec in backend.manifest.state}
        self._layout = backend.manifest.graphs["decode"].state_layout
        self._state = tuple({name: cuda.DeviceBuffer(_bytes(spec, batch)) for name, spec in self._specs.items()} for _ in range(2))
        self._side = 0
        self._decode = _Inputs(backend, backend.record.part("decode"), batch)
        self._prefill: dict[int, _Inputs] = {}  # by profile; made when a prompt comes that wants it

        vocab_size, candidates = backend.manifest.model.vocab_size, backend.record.candidates
        self._logits = cuda.DeviceBuffer(4 * batch * vocab_size)
        self._host_logits: NDArray[np.float32] | None = None
        self._logits_current = False
        self._top_logits, self._top_tokens = (cuda.DeviceBuffer(4 * batch * candidates) for _ in range(2))
        self._results = {"logits": self._logits}
        if candidates:
            self._results |= {TOP_LOGITS: self._top_logits, TOP_TOKENS: self._top_tokens}
        self._host_top_logits = cuda.pinned((batch, candidates), np.float32)
        self._host_top_tokens = cuda.pinned((batch, candidates), np.int32)

        self._graphs: list[cuda.Graph | None] = [None, None]
        self._warm = [False, False]
        self._capturable = True
        self._waiting = False  # whether the stream may still read or write host buffers
        for slot in range(batch):
            self.write_state(slot, initial_state(backend.manifest.state))

    def step(self, tokens: NDArray[np.int64]) -> None:
        self._wait()
        self._decode.tokens[:, 0] = tokens
        side = self._side
        if self._graphs[side] is None and self._warm[side] and self._capturable:
            self._capture(side)
        graph = self._graphs[side]
        if graph is not None:
            self._stream.launch(graph)
        else:
            self._step(side)
            self._warm[side] = True
        self._advanced()

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        # Columns that are padding in every slot are not computed at all.
        self._read(tokens[:, : max(int(lengths.max()), 1)], lengths, last_rows(lengths), self._results)
        self._fetch_candidates()

    def score(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        count, vocab_size = rows.size, self._backend.manifest.model.vocab_size
        results = {
            name: cuda.DeviceBuffer(4 * count * (vocab_size if name == "logits" else self._backend.record.candidates))
            for name in self._results
        }
        self._read(tokens, lengths, rows, results)
        logits = np.empty((*rows.shape, vocab_size), np.float32)
        self._stream.copy_to_host(logits, results["logits"])
        self._wait()
        return logits

    def score_on_trial(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.score(tokens, lengths, rows)  # which writes the state to the other side

    def undo(self) -> None:
        self._side = 1 - self._side

    def _read(
        self,
        tokens: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: NDArray[np.int64],
        results: Mapping[str, cuda.DeviceBuffer],
    ) -> None:
        """Run prefill; `results` have room for what it gives of `rows` (B, R)."""
        self._wait()
        part = self._backend.record.part("prefill", tokens.shape[1])
        if part.profile not in self._prefill:
            self._prefill[part.profile] = _Inputs(self._backend, part, self.batch)
        inputs = self._prefill[part.profile]
        inputs.set_tokens(tokens, lengths, rows)
        self._enqueue(inputs, self._side, results)
        self._advanced()

    def logits(self) -> NDArray[np.float32]:
        if self._host_logits is None:
            self._host_logits = cuda.pinned((self.batch, self._backend.manifest.model.vocab_size), np.float32)
        if not self._logits_current:
            self._stream.copy_to_host(self._host_logits, self._logits)
            self._waiting, self._logits_current = True, True
        self._wait()
        return self._host_logits

    def top(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if k > self._backend.record.candidates:
            return top_of(self.logits(), k)
        self._wait()
        # TensorRT promises no order among equal logits; the protocol asks for that of their tokens.
        order = np.lexsort((self._host_top_tokens, -self._host_top_logits), axis=-1)[:, :k]
        tokens = np.take_along_axis(self._host_top_tokens, order, -1).astype(np.int64)
        return tokens, np.take_along_axis(self._host_top_logits, order, -1)

    def read_state(self, slot: int) -> State:
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, spec in self._specs.items():
            shape = (1, *spec.shape[1:])
            array = np.empty(shape if spec.layer is None else self._layout.shape(shape), NUMPY_DTYPES[spec.dtype])
            self._stream.copy_to_host(array, self._state[self._side][name], slot * array.nbytes)
            arrays[name] = array
        self._stream.synchronize()
        return state_from_graph(self._backend.manifest.state, self._layout, arrays)

    def write_state(self, slot: int, state: State) -> None:
        for name, array in state_to_graph(self._backend.manifest.state, self._layout, state).items():
            self._stream.copy_to_device(self._state[self._side][name], array, slot * array.nbytes)
            self._stream.synchronize()  # the array may be gone after this turn of the loop

    def _wait(self) -> None:
        if self._waiting:
            self._stream.synchronize()
            self._waiting = False

    def _advanced(self) -> None:
        self._side = 1 - self._side
        self._waiting, self._logits_current = True, False

    def _capture(self, side: int) -> None:
        try:
            with self._stream.capture() as graph:
                self._step(side)
        except (cuda.CudaError, TensorRtError) as error:
            self._capturable = False
            warnings.warn(
                f"CUDA graphs do not work here, so each step starts kernel by kernel: {error}", RuntimeWarning, stacklevel=3
            )
        else:
            self._graphs[side] = graph

    def _step(self, side: int) -> None:
        """Everything a step does on the device, from the state of `side` to the other."""
        self._enqueue(self._decode, side, self._results)
        self._fetch_candidates()

    def _enqueue(self, inputs: _Inputs, side: int, results: Mapping[str, cuda.DeviceBuffer]) -> None:
        """One run from the state of `side` to the other."""
        inputs.upload(self._stream)
        inputs.set_shapes()
        before, after = self._state[side], self._state[1 - side]
        addresses = {name: before[name].address for name in self._specs}
        addresses |= {spec.output: after[name].address for name, spec in self._specs.items()}
        addresses |= inputs.addresses() | {name: buffer.address for name, buffer in results.items()}
        inputs.run(addresses, self._stream)

    def _fetch_candidates(self) -> None:
        if self._backend.record.candidates:
            self._stream.copy_to_host(self._host_top_logits, self._top_logits)
            self._stream.copy_to_host(self._host_top_tokens, self._top_tokens)


class _Inputs:
    """The execution context of a part, and what it reads beside the state: tokens; in prefill their number and the rows wanted.

    Where both graphs are in the engine, the other one's batch is 0, and each of its tensors is bound once to an address of its own:
    TensorRT takes a null address for empty inputs only, and no address for two tensors.
    """

    def __init__(self, backend: TensorRtBackend, part: EnginePart, batch: int) -> None:
        self._backend, self._batch, self.part = backend, batch, part
        capacity = 1 if part.role == "decode" else part.max_tokens
        self.tokens = cuda.pinned((batch, capacity), np.int64)
        self._device_tokens = cuda.DeviceBuffer(self.tokens.nbytes)
        self._all_rows = cuda.pinned((batch, capacity), np.int64)
        self._device_rows = cuda.DeviceBuffer(self._all_rows.nbytes)
        self._host, self._rows = _front(self.tokens, (batch, 1)), _front(self._all_rows, (batch, 1))
        self._rows[:] = 0
        self._lengths = cuda.pinned((batch,), np.int64)
        self._lengths[:] = 1
        self._device_lengths = cuda.DeviceBuffer(self._lengths.nbytes)
        self._takes_length = self.part.graph == "prefill"
        self._shaped: tuple[int, int] | None = None
        module = backend.module
        engine = backend.engine(self.part)
        self._context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise TensorRtError(f"no execution context: {_reason(backend)}")
        self._context.set_device_memory(backend.scratch.address, backend.scratch.bytes)
        if not self._context.set_optimization_profile_async(self.part.profile, backend.stream.handle):
            raise TensorRtError(f"optimization profile {self.part.profile}: {_reason(backend)}")
        backend.stream.synchronize()
        self._idle = self._bind_idle() if part.prefix else None

    def _bind_idle(self) -> cuda.DeviceBuffer:
        """Make the other graph empty."""
        record, graphs = self._backend.record, self._backend.manifest.graphs
        other = next(part for part in record.parts if part.prefix != self.part.prefix)
        spec = graphs[other.graph]
        for tensor in spec.inputs:
            self._set_shape(other.prefix + tensor.name, open_shape(tensor, 0, 1))
        names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        names += [TOP_LOGITS, TOP_TOKENS] if record.candidates else []
        buffer = cuda.DeviceBuffer(len(names) * ALIGNMENT)
        for index, name in enumerate(names):
            self._bind(other.prefix + name, buffer.address + index * ALIGNMENT)
        return buffer

    def set_tokens(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Take a chunk of tokens (B, C), how many are real (B,), and the rows wanted (B, R)."""
        self._host, self._rows = _front(self.tokens, tokens.shape), _front(self._all_rows, rows.shape)
        self._host[...], self._rows[...] = tokens, rows
        self._lengths[:] = lengths

    def upload(self, stream: cuda.Stream) -> None:
        stream.copy_to_device(self._device_tokens, self._host)
        if self._takes_length:
            stream.copy_to_device(self._device_lengths, self._lengths)
            stream.copy_to_device(self._device_rows, self._rows)

    def set_shapes(self) -> None:
        """Tell TensorRT the sizes of this run, if they are not those of the last."""
        sizes = self._host.shape[1], self._rows.shape[1]
        if sizes == self._shaped:
            return
        for spec in self._backend.manifest.graphs[self.part.graph].inputs:
            self._set_shape(self.part.prefix + spec.name, open_shape(spec, self._batch, *sizes))
        self._shaped = sizes

    def addresses(self) -> dict[str, int]:
        """Device addresses of the inputs other than the state."""
        tokens = {"tokens": self._device_tokens.address}
        if not self._takes_length:
            return tokens
        return tokens | {"length": self._device_lengths.address, "rows": self._device_rows.address}

    def run(self, addresses: Mapping[str, int], stream: cuda.Stream) -> None:
        """Bind and enqueue."""
        for name, address in addresses.items():
            self._bind(self.part.prefix + name, address)
        if not self._context.execute_async_v3(stream.handle):
            raise TensorRtError(f"the engine did not run: {_reason(self._backend)}")

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise TensorRtError(f"input {name} of shape {shape}: {_reason(self._backend)}")

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise TensorRtError(f"tensor {name}: {_reason(self._backend)}")


def _front(buffer: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """The beginning of a buffer that is as wide as the largest chunk, so that a narrower one is contiguous."""
    return buffer.reshape(-1)[: math.prod(shape)].reshape(shape)


def _reason(backend: TensorRtBackend) -> str:
    return backend.logger.errors[-1] if backend.logger.errors else "TensorRT gave no reason"


def _bytes(spec: StateSpec, batch: int) -> int:
    return batch * math.prod(spec.shape[1:]) * NUMPY_DTYPES[spec.dtype].itemsize


def _facts(name: str) -> Mapping[str, str]:
    return {} if unavailable(name) else {name: str(load_module(name).__version__)}


def _registration(name: str, purposes: Mapping[str, WhyNot]) -> Registration:
    here = functools.partial(unavailable_on_this_gpu, name)
    return Registration(
        name=name,
        open=lambda bundle, threads, low_memory: TensorRtBackend(bundle, name),
        unavailable=here,
        purposes={f"run and compile on this GPU ({name})": here, **purposes},
        state_passes=2.0,  # it fuses decay, update and read-out of a layer's state into one kernel
        state_sets=2,
        basis="a roofline fitted to NVIDIA's figures for INT4 Transformers on Jetson Orin; no RetNet was measured there",
        tolerances={
            "float32": Tolerance(1e-4, "float32 rounding, TF32 off in the builder; sums in another order than on the CPU"),
            "float16": Tolerance(5e-2, "as on the CPU, and what TensorRT fuses may be rounded to 11 bits in between"),
        },
        facts=functools.partial(_facts, name),
    )


REGISTRATIONS = (
    _registration("tensorrt", {}),
    _registration("tensorrt-rtx", {"compile for other RTX GPUs": functools.partial(unavailable, "tensorrt-rtx")}),
)
