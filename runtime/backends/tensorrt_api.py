"""TensorRT 10.3 to 11 and TensorRT-RTX 1.x through one code path: how to load them, and what differs between them.

Rule: no other module asks for a version. What we call exists under one name in all of them; what does not, and
what we do instead, is listed in tests/tensorrt_api/differences.py, which a test compares with the API of each release.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from retnet_export.runtime.bundle.manifest import DType, TensorSpec
from retnet_export.runtime.device import cuda
from retnet_export.runtime.errors import UserError

TargetName = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Target:
    """One of the two products.

    Attributes:
        name: as on the command line.
        module: its Python module.
        oldest: the first version that takes our graphs (strong typing, INT64 inputs, INT4 weights).
        install: how to get it.
        capabilities: compute capabilities it builds for without such a GPU; None: it builds for the GPU of this machine.
    """

    name: TargetName
    module: str
    oldest: tuple[int, int]
    install: str
    capabilities: tuple[str, ...] | None


TARGETS: Mapping[str, Target] = {
    "tensorrt": Target(
        "tensorrt",
        "tensorrt",
        (10, 3),
        "on a Jetson it comes with JetPack 6.1 or later (sudo apt install nvidia-jetpack, and a virtual environment made with "
        "--system-site-packages); elsewhere: pip install tensorrt",
        None,
    ),
    "tensorrt-rtx": Target(
        "tensorrt-rtx",
        "tensorrt_rtx",
        (1, 0),
        "pip install 'retnet-export[tensorrt-rtx]'",
        ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    ),
}


def load_module(target: str) -> Any:
    """The Python module of a target, its version checked.

    Raises:
        UserError: there is no such target, it is not installed, cannot be loaded, or is too old.
    """
    if target not in TARGETS:
        raise UserError(f"no target {target!r}; there are {', '.join(TARGETS)}")
    known = TARGETS[target]
    try:
        module = importlib.import_module(known.module)
    except ImportError as error:
        # A module that is there but cannot find its libraries also lands here; its own words say which.
        raise UserError(f"{target} is not usable here: {error}. To install it: {known.install}") from error
    except OSError as error:
        raise UserError(f"{target} is installed but its libraries do not load: {error}") from error
    if not hasattr(module, "Builder"):  # type stubs alone make an empty module of that name
        raise UserError(f"{target} is not installed (only its type stubs are). To install it: {known.install}")
    if version_of(module)[:2] < known.oldest:
        oldest = ".".join(map(str, known.oldest))
        raise UserError(
            f"{target} {module.__version__} is too old: the graphs need {oldest} or later (strongly typed networks, INT4 weights)"
            + ("; on a Jetson that is JetPack 6.1 or later" if target == "tensorrt" else "")
        )
    return module


def unavailable(name: str) -> str | None:
    """Why a product is not usable here at all, be it to build for another machine; None if it is."""
    try:
        load_module(name)
    except UserError as error:
        return str(error)
    return None


def unavailable_on_this_gpu(name: str) -> str | None:
    """Why no engine can run on this machine, or None."""
    if (reason := unavailable(name) or cuda.unavailable()) is not None:
        return reason
    known, device = TARGETS[name].capabilities, cuda.device()
    capability = f"{device.compute_capability[0]}.{device.compute_capability[1]}"
    if known is None or capability in known:
        return None
    return f"{name} has no kernels for compute capability {capability}, only for {', '.join(known)}"


def version_of(module: ModuleType) -> tuple[int, ...]:
    """The version as numbers: "10.3.0.post1" is (10, 3, 0)."""
    parts = []
    for part in module.__version__.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def newest_opset(target: str, version: tuple[int, ...]) -> int:
    """The newest ONNX operator set that a release is documented to parse.

    INT4 weights as blocked DequantizeLinear, which ONNX added with opset 21, are parsed since 10.0 whatever the general limit.

    Source: TensorRT's support matrix and ONNX opset guide: 20 for 10.3, 24 for 10.13, 25 for 11.
    """
    if target == "tensorrt-rtx" or version[:2] >= (10, 13):
        return 24
    return 21


def make_logger(module: Any) -> Any:
    """A logger that keeps errors and, of the build's report, the sizes of weights and activations and the list of layers.

    Returns:
        An `ILogger` with `errors: list[str]`, `report: list[str]` and `layers: list[str]`.
    """

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.report: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.errors.append(message)
            elif message.startswith("Total "):
                self.report.append(message)
            elif "LayerType: " in message or message.startswith(("Layers:", "Layer(")):
                self.layers.append(message)

    return Logger()


TYPES: Mapping[str, DType] = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
"""Element types by TensorRT's names."""


def io_tensors(module: Any, engine: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and the outputs of an engine, sizes left open as -1; a type that no manifest knows by TensorRT's name."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        spec = TensorSpec(name, TYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))
        (inputs if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else outputs).append(spec)
    return inputs, outputs
