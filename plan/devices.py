"""Devices the planner knows: memory, bandwidth, and the weight formats their GPUs have.

Figures are the vendors' unless a comment says otherwise. A Jetson's memory is shared by CPU and GPU, so a part of it belongs
to the system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retnet_export.runtime.errors import UserError

GB = 10**9

FORMAT_FLOOR: Mapping[str, tuple[int, int]] = {
    "float32": (5, 0),
    "float16": (5, 3),
    "bfloat16": (8, 0),
    "int8": (7, 5),
    "int4": (7, 5),
    "float8": (8, 9),
    "float4": (10, 0),
}
"""The first compute capability whose tensor cores and TensorRT kernels know a weight format.

Source: TensorRT support matrix, "Hardware and Precision"; bfloat16 begins with Ampere, FP8 with Ada, FP4 with Blackwell.
"""


@dataclass(frozen=True)
class DeviceSpec:
    """A device.

    Attributes:
        key: as on the command line.
        name: shown in tables.
        memory_gb: its memory, in units of 10⁹ bytes.
        bandwidth_gbs: what the memory can deliver, in 10⁹ bytes a second.
        compute_capability: of its GPU; None for a CPU.
        system_gb: what the system keeps for itself of a shared memory.
        runtime: the backend that runs a bundle there; `prediction.MEASUREMENTS` has rows of it.
        note: what else one should know.
    """

    key: str
    name: str
    memory_gb: float
    bandwidth_gbs: float
    compute_capability: str | None
    system_gb: float
    runtime: str
    note: str = ""

    @property
    def usable_bytes(self) -> float:
        """Memory that a program may have."""
        return (self.memory_gb - self.system_gb) * GB


JETSON_SYSTEM_GB = 1.75
"""What JetPack leaves no program: 1.5 GB without a desktop, 2 GB with one. Measured by users, not published."""

DEVICES: Mapping[str, DeviceSpec] = {
    spec.key: spec
    for spec in (
        DeviceSpec("orin-nano-4gb", "Jetson Orin Nano 4 GB", 4, 34, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("orin-nano-4gb-super", "Jetson Orin Nano 4 GB, Super mode", 4, 51, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("orin-nano-8gb", "Jetson Orin Nano 8 GB", 8, 68, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("orin-nano-8gb-super", "Jetson Orin Nano 8 GB, Super mode", 8, 102, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("orin-nx-8gb", "Jetson Orin NX 8 GB", 8, 102, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("orin-nx-16gb", "Jetson Orin NX 16 GB", 16, 102, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("agx-orin-32gb", "Jetson AGX Orin 32 GB", 32, 205, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("agx-orin-64gb", "Jetson AGX Orin 64 GB", 64, 205, "8.7", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("thor-t4000", "Jetson Thor T4000", 64, 273, "11.0", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("thor-t5000", "Jetson Thor T5000", 128, 273, "11.0", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("dgx-spark", "DGX Spark (GB10)", 128, 273, "12.1", JETSON_SYSTEM_GB, "tensorrt"),
        DeviceSpec("h100", "H100 80GB", 80, 3350, "9.0", 0, "cuda", "3,030 GB/s measured for a copy"),
        # The reading bandwidth of the two-core machine that the CPU figures were measured on.
        DeviceSpec("cpu-2-cores", "2 cores of a Xeon cloud VM", 24, 40, None, 1, "onnxruntime", "40 GB/s measured for reading"),
    )
}


def find_device(key: str) -> DeviceSpec:
    """A device by its key.

    Raises:
        UserError: there is no such device; the message lists them.
    """
    if key not in DEVICES:
        raise UserError(f"no device {key!r}; the planner knows {', '.join(DEVICES)}")
    return DEVICES[key]


def formats_of(compute_capability: str) -> tuple[str, ...]:
    """Weight formats of a GPU."""
    capability = parse_capability(compute_capability)
    return tuple(name for name, floor in FORMAT_FLOOR.items() if capability >= floor)


def parse_capability(text: str) -> tuple[int, int]:
    """ "8.7" as (8, 7).

    Raises:
        UserError: it is not of that form.
    """
    major, dot, minor = text.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise UserError(f"compute capability {text!r}: expected two numbers and a point, for example 8.7")
    return int(major), int(minor)
