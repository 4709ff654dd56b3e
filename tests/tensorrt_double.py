"""TensorRT's Python API without TensorRT, stricter than the real one: what we call of it, run by ONNX Runtime.

An engine is the ONNX graph that was parsed, with its profiles. It runs on a `CudaDouble`. What real TensorRT may answer with
wrong numbers or a crash raises `Misuse` here: a shape outside the profile, a tensor without an address, an address that an
input and an output share, memory that was freed or is too small, a run before the profile is set, an attribute that the
release does not have.

A double is made for one release of the real API, whose members it may have and no others: tests/tensorrt_api/releases.json.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from cuda_double import CudaDouble, Misuse

RELEASES = json.loads((Path(__file__).parent / "tensorrt_api" / "releases.json").read_text())


CURRENT: dict[str, object] = {}
"""The release that the double is now ("release") and the CUDA that its engines run on ("cuda")."""
CONTEXTS: list[IExecutionContext] = []
"""Every execution context since the double was installed, in the order in which they were made."""


class Strict:
    """Public members are those of the current release; reading or setting another one fails."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            Strict._check(self, name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name, value):
        if not name.startswith("_"):
            Strict._check(self, name)
        object.__setattr__(self, name, value)

    @staticmethod
    def _check(instance, name):
        kind = type(instance)
        if kind.__module__ == __name__ and name not in RELEASES[CURRENT["release"]][kind.__name__]:
            raise AttributeError(f"{kind.__name__} of {CURRENT['release']} has no {name}")


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BF16 = 7
    INT64 = 8


class BuilderFlag(enum.Enum):
    TF32 = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class TopKOperation(enum.Enum):
    MAX = 0


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    DETAILED = 2


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ILogger(Strict):
    ERROR, INTERNAL_ERROR, WARNING, INFO, VERBOSE = "error", "internal error", "warning", "info", "verbose"

    def log(self, severity, msg):
        raise Misuse("ILogger.log is not implemented")


class IProgressMonitor(Strict):
    def phase_start(self, phase_name, parent_phase, num_steps):
        raise Misuse("IProgressMonitor.phase_start is not implemented")

    def step_complete(self, phase_name, step):
        raise Misuse("IProgressMonitor.step_complete is not implemented")

    def phase_finish(self, phase_name):
        raise Misuse("IProgressMonitor.phase_finish is not implemented")


class ITensor(Strict):
    def __init__(self, name, dtype, symbols):
        """`symbols` are sizes; those left open are names."""
        self.name, self.dtype, self._symbols = name, dtype, symbols
        self.shape = tuple(size if isinstance(size, int) else -1 for size in symbols)


class ITopKLayer(Strict):
    def __init__(self, tensors):
        self.name = ""
        self._tensors = tensors

    def get_output(self, index):
        return self._tensors[index]


class INetworkDefinition(Strict):
    def __init__(self, flags):
        if not flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            raise Misuse("the network is not strongly typed")
        self._model, self._inputs, self._outputs, self._top = None, [], [], []

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_input(self, index):
        return self._inputs[index]

    def get_output(self, index):
        return self._outputs[index]

    def add_topk(self, input, op, k, axes):
        if op is not TopKOperation.MAX or axes != 1 << (len(input.shape) - 1) or not 1 <= k <= min(3840, input.shape[-1]):
            raise Misuse(f"TopK of {k} over axes {axes:#b} of {input.name} {input.shape}")
        symbols = (*input._symbols[:-1], k)
        top = (input.name, k, ITensor("", input.dtype, symbols), ITensor("", DataType.INT32, symbols))
        self._top.append(top)
        return ITopKLayer(top[2:])

    def mark_output(self, tensor):
        self._outputs.append(tensor)


class IOptimizationProfile(Strict):
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        if not all(low <= middle <= high for low, middle, high in zip(min, opt, max, strict=True)):
            raise Misuse(f"profile of {input}: {min} {opt} {max} do not grow")
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))


class ITimingCache(Strict):
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return self._content + b"kernels"


class IBuilderConfig(Strict):
    def __init__(self):
        self.progress_monitor, self.profiling_verbosity = None, ProfilingVerbosity.LAYER_NAMES_ONLY
        if "num_compute_capabilities" in RELEASES[CURRENT["release"]]["IBuilderConfig"]:
            self.num_compute_capabilities = 0
        self._profiles, self._capabilities, self._cache, self._flags = [], {}, None, set(BuilderFlag)

    def clear_flag(self, flag):
        self._flags.discard(BuilderFlag(flag))

    def set_flag(self, flag):
        self._flags.add(BuilderFlag(flag))

    def set_memory_pool_limit(self, pool, pool_size):
        MemoryPoolType(pool)

    def set_compute_capability(self, compute_capability, index):
        if index >= self.num_compute_capabilities:
            raise Misuse("set num_compute_capabilities first")
        self._capabilities[index] = compute_capability
        return True

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return not cache._content or cache._content.endswith(b"kernels")

    def get_timing_cache(self):
        return self._cache


class ParserError(Strict):
    def __init__(self, node):
        self._node = node

    def node(self):
        return 0

    def node_name(self):
        return self._node.name

    def node_operator(self):
        return self._node.op_type

    def desc(self):
        return f"no importer for {self._node.op_type}"


class OnnxParser(Strict):
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    def parse(self, model, path=None):
        import onnx

        graph = onnx.load_model_from_string(model)
        spans = {}
        for tensor in graph.graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            place = (where.get("location"), where.get("offset"))
            if where and spans.setdefault(place, tuple(tensor.dims)) != tuple(tensor.dims):
                self._errors = [ParserError(onnx.helper.make_node("Constant", [], [], name=tensor.name))]
                return False
        if spans:
            read_external_data(graph, Path(path).parent)  # an engine needs no file beside it
        self._errors = [ParserError(node) for node in graph.graph.node if node.domain not in ("", "ai.onnx")]
        if self._errors:
            return False
        self._network._model = graph
        for values, target in ((graph.graph.input, self._network._inputs), (graph.graph.output, self._network._outputs)):
            target.extend(tensor_of(value) for value in values)
        return True

    def parse_from_file(self, model):
        return self.parse(Path(model).read_bytes(), model)

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]


ELEMENT_TYPES = {1: DataType.FLOAT, 7: DataType.INT64, 10: DataType.HALF, 6: DataType.INT32, 16: DataType.BF16}
NUMPY_TYPES = {DataType.FLOAT: np.float32, DataType.INT64: np.int64, DataType.HALF: np.float16, DataType.INT32: np.int32}


def tensor_of(value):
    kind = value.type.tensor_type
    symbols = tuple(size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim)
    return ITensor(value.name, ELEMENT_TYPES[kind.elem_type], symbols)


def read_external_data(model, folder):
    """As TensorRT does: links are followed, and no path leads out of the folder. (onnx's own reader takes no links.)"""
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            continue
        if "/" in where["location"]:
            raise Misuse(f"{tensor.name} lies in {where['location']}")
        with (folder / where["location"]).open("rb") as file:
            file.seek(int(where["offset"]))
            tensor.raw_data = file.read(int(where["length"]))
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


class Builder(Strict):
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        if not config._profiles:
            raise Misuse("a network with free sizes needs an optimization profile")
        for tensor in network._inputs:
            for profile in config._profiles:
                if tensor.name not in profile._shapes:
                    raise Misuse(f"the profile has no shape for {tensor.name}")
                for shape in profile._shapes[tensor.name]:
                    if any(size not in (-1, given) for size, given in zip(tensor.shape, shape, strict=True)):
                        raise Misuse(f"{tensor.name} is {tensor.shape}, the profile says {shape}")
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("building", None, 2)
            monitor.phase_start("tactics", "building", 4)
            for phase, steps in (("tactics", 4), ("building", 2)):
                for step in range(steps):
                    if not monitor.step_complete(phase, step):
                        return None
                monitor.phase_finish(phase)
        for _ in config._profiles:
            self._logger.log(ILogger.INFO, "Total Activation Memory: 4096 bytes")
        self._logger.log(ILogger.INFO, "Total Weights Memory: 1000 bytes")
        if config.profiling_verbosity is ProfilingVerbosity.DETAILED:
            self._logger.log(ILogger.VERBOSE, "Layers:\nName: all, LayerType: double, Inputs: [], Outputs: [], TacticName: ")
        return pickle.dumps(
            {
                "model": network._model.SerializeToString(),
                "inputs": [(tensor.name, tensor.dtype, tensor._symbols) for tensor in network._inputs],
                "outputs": [(tensor.name, tensor.dtype, tensor._symbols) for tensor in network._outputs],
                "profiles": [profile._shapes for profile in config._profiles],
                "top": [(source, k, values.name, tokens.name) for source, k, values, tokens in network._top],
            }
        )


class Runtime(Strict):
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            return ICudaEngine(pickle.loads(bytes(serialized_engine)))
        except pickle.UnpicklingError:
            self._logger.log(ILogger.ERROR, "not an engine of this version")
            return None


SCRATCH = 4096


class ICudaEngine(Strict):
    def __init__(self, content):
        import onnxruntime

        self._content = content
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(content["model"], options, providers=["CPUExecutionProvider"])

    def get_device_memory_size_for_profile_v2(self, profile_index):
        return SCRATCH * (1 + profile_index)

    @property
    def num_io_tensors(self):
        return len(self._tensors())

    def get_tensor_name(self, index):
        return list(self._tensors())[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in {tensor[0] for tensor in self._content["inputs"]} else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._tensors()[name][1]

    def get_tensor_shape(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors()[name][2])

    def _tensors(self):
        return {tensor[0]: tensor for tensor in self._content["inputs"] + self._content["outputs"]}

    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        return IExecutionContext(self, strategy)

    def create_engine_inspector(self):
        return EngineInspector()


class EngineInspector(Strict):
    """Names layers without their tensors, as the real one does of an engine that was built without DETAILED."""

    def __init__(self):
        self.execution_context = None

    def get_engine_information(self, format):
        if self.execution_context is None or format is not LayerInformationFormat.JSON:
            raise Misuse("asked without a context, whose sizes it would leave open, or not for JSON")
        return '{"Layers": ["all"]}'


class IExecutionContext(Strict):
    def __init__(self, engine, strategy):
        self._engine, self._own_memory = engine, strategy is not ExecutionContextAllocationStrategy.USER_MANAGED
        self._memory, self._profile, self._shapes, self._addresses = None, None, {}, {}
        CONTEXTS.append(self)

    def set_device_memory(self, memory, size):
        if self._own_memory:
            raise Misuse("set_device_memory on a context that owns its memory")
        self._memory = (memory, size)

    def set_optimization_profile_async(self, profile_index, stream_handle):
        if profile_index >= len(self._engine._content["profiles"]):
            return False
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name, shape):
        if self._profile is None:
            raise Misuse("set the optimization profile first")
        low, _, high = self._engine._content["profiles"][self._profile][name]
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, memory):
        if name not in {tensor[0] for tensor in self._engine._content["inputs"] + self._engine._content["outputs"]}:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        cuda, content = CURRENT["cuda"], self._engine._content
        if self._profile is None:
            raise Misuse("enqueue before the optimization profile is set")
        if not self._own_memory:
            if self._memory is None:
                raise Misuse("enqueue before device memory is set")
            if self._memory[1] < self._engine.get_device_memory_size_for_profile_v2(self._profile):
                raise Misuse("the device memory is too small for the profile")
            cuda.check_device(*self._memory)
        if missing := {name for name, _, _ in content["inputs"]} - set(self._shapes):
            raise Misuse(f"enqueue before the shapes of {sorted(missing)} are set")
        sizes = {}
        for name, _, symbols in content["inputs"]:
            for symbol, size in zip(symbols, self._shapes[name], strict=True):
                if sizes.setdefault(symbol, size) != size:
                    raise Misuse(f"{symbol} is {sizes[symbol]}, and {size} in {name}")
        spans = {}
        for kind in ("inputs", "outputs"):
            for name, dtype, symbols in content[kind]:
                if not self._addresses.get(name):
                    # TensorRT takes null for empty inputs alone; we give every tensor an address of its own.
                    raise Misuse(f"enqueue before {name} has an address")
                full = tuple(size if isinstance(size, int) else sizes[size] for size in symbols)
                # One byte at least, also of what is empty: the address must be memory, and nobody else's.
                size = max(1, math.prod(full) * np.dtype(NUMPY_TYPES[dtype]).itemsize)
                cuda.check_device(self._addresses[name], size)
                spans[name] = (kind, self._addresses[name], size, full, NUMPY_TYPES[dtype])
        for name, (kind, start, size, _, _) in spans.items():
            for other, (other_kind, other_start, other_size, _, _) in spans.items():
                if (
                    name != other
                    and "outputs" in (kind, other_kind)
                    and start < other_start + other_size
                    and other_start < start + size
                ):
                    raise Misuse(f"{name} and {other} share memory")
        cuda.enqueue(stream_handle, lambda: self._engine_run(spans))
        return True

    def _engine_run(self, spans):
        content, cuda = self._engine._content, CURRENT["cuda"]
        for _, address, size, _, _ in spans.values():
            cuda.check_device(address, size)
        feeds = {
            name: np.frombuffer(ctypes.string_at(address, size), dtype, math.prod(shape)).reshape(shape)
            for name, (kind, address, size, shape, dtype) in spans.items()
            if kind == "inputs"
        }
        names = [output.name for output in self._engine._session.get_outputs()]
        results = dict(zip(names, self._engine._session.run(names, feeds), strict=True))
        for source, k, top_values, top_indices in content["top"]:
            # Ties the other way round from ours: the real one promises no order among them.
            order = np.argsort(results[source][..., ::-1], axis=-1, kind="stable")[..., ::-1][..., :k]
            order = results[source].shape[-1] - 1 - order
            results[top_values] = np.take_along_axis(results[source], order, -1)
            results[top_indices] = order.astype(np.int32)
        for name, (kind, address, _, shape, dtype) in spans.items():
            if kind == "outputs":
                array = np.ascontiguousarray(results[name], dtype)
                if array.shape != shape:
                    raise Misuse(f"{name} came out as {array.shape}, its memory is for {shape}")
                ctypes.memmove(address, array.ctypes.data, array.nbytes)


CLASSES = (
    Builder, BuilderFlag, DataType, EngineInspector, ExecutionContextAllocationStrategy, IBuilderConfig, ICudaEngine,
    IExecutionContext, ILogger, INetworkDefinition, IOptimizationProfile, IProgressMonitor, ITensor, ITimingCache, ITopKLayer,
    LayerInformationFormat, MemoryPoolType, NetworkDefinitionCreationFlag, OnnxParser, ParserError, ProfilingVerbosity, Runtime,
    TensorIOMode, TopKOperation,
)  # fmt: skip


def make_double(release: str, cuda: CudaDouble) -> ModuleType:
    """The module of one release, "tensorrt 10.3.0"; engines run on `cuda`."""
    CURRENT.update(release=release, cuda=cuda)
    product, version = release.split()
    module = ModuleType(product.replace("-", "_"))
    module.__version__ = version
    for kind in CLASSES:
        setattr(module, kind.__name__, kind)
    if "ComputeCapability" in RELEASES[release]:
        members = RELEASES[release]["ComputeCapability"]
        values = {name: int(text.split()[1]) for name, text in members.items() if text.startswith("value")}
        module.ComputeCapability = enum.IntEnum("ComputeCapability", values)
    return module


def install(monkeypatch, release: str = "tensorrt 10.3.0", capability: tuple[int, int] = (8, 7)) -> CudaDouble:
    """Put a double of TensorRT, and one of CUDA under it, where the package looks for the real ones."""
    from retnet_export.runtime.device import cuda as cuda_module

    cuda = CudaDouble(capability)
    CONTEXTS.clear()
    module = make_double(release, cuda)
    monkeypatch.setattr(cuda_module, "library", lambda: cuda)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return cuda


def profile_of(context: IExecutionContext) -> int | None:
    """The optimization profile that a context was last set to."""
    return context._profile


def addresses_of(context: IExecutionContext) -> dict[str, int]:
    """What was bound to each tensor of a context."""
    return dict(context._addresses)
