"""What some releases of TensorRT lack, so that we do not depend on it, and what we do instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A part of the API that some releases lack, so we do not depend on it.

    Attributes:
        attribute: where it is in the module.
        first: the first release of full TensorRT that has it, None if none has.
        last: the last major version of full TensorRT that has it, None if it is still there.
        rtx: whether TensorRT-RTX 1.7 has it.
        instead: what we do.
    """

    attribute: str
    first: tuple[int, int] | None
    last: int | None
    rtx: bool
    instead: str


DIFFERENCES = (
    Difference("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", (10, 0), 10, False, "never set: it has meant nothing since 10.0"),
    Difference("BuilderFlag.FP16", (10, 0), 10, False, "never set: the network is strongly typed, the graph says each format"),
    Difference("BuilderFlag.INT8", (10, 0), 10, False, "never set: DequantizeLinear in the graph says it"),
    Difference("IBuilderConfig.int8_calibrator", (10, 0), 10, False, "never used: scales are in the graph"),
    Difference("ICudaEngine.device_memory_size", (10, 0), 10, False, "get_device_memory_size_for_profile_v2, since 10.1"),
    Difference(
        "ICudaEngine.create_execution_context_without_device_memory",
        (10, 0),
        10,
        False,
        "create_execution_context(USER_MANAGED) and set_device_memory, since 10.0",
    ),
    Difference("OnnxParser.supports_model", (10, 0), 10, False, "parse, and show the errors"),
    Difference("IBuilderConfig.set_compute_capability", None, None, True, "RTX only; full TensorRT builds for the GPU it runs on"),
    Difference("Runtime.get_engine_validity", None, None, True, "our record beside the engine says what it was built for"),
)
