"""Checks before a long build: a refusal has the numbers and the nearest thing that the device can run.

Rule: nothing here needs TensorRT, so every refusal is tested without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from retnet_export.plan.devices import FORMAT_FLOOR, formats_of, parse_capability
from retnet_export.plan.sizes import Sizes, sizes_of_bundle, sizes_of_model
from retnet_export.runtime.backends.tensorrt_api import newest_opset
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.manifest import Manifest
from retnet_export.runtime.device.memory import meminfo
from retnet_export.runtime.errors import UserError

RUNTIME_BYTES = 600e6
"""What CUDA and TensorRT themselves take on a device. An estimate: the published peaks of small models suggest 0.5 to 1 GB."""

BUILD_BASE = 180e6
"""Bytes of host memory that a build takes however small the model."""

BUILD_COPIES: Mapping[str, float] = {"float32": 2.4, "float16": 2.8, "bfloat16": 2.8, "int8": 3.5, "float8": 3.5, "int4": 4.9}
"""Copies of the weights that a build holds at its peak beyond that, by their format.

Measured with TensorRT-RTX 1.7.1 at three sizes each, on a line within a percent (docs/lab/tensorrt.md); a test builds one
and compares.
"""


def check_build(
    bundle: Bundle, target: str, version: tuple[int, ...], capabilities: Sequence[str], *, max_batch: int, on_this_gpu: bool
) -> None:
    """Refuse what cannot be built or could not run.

    Args:
        bundle: the bundle.
        target: "tensorrt" or "tensorrt-rtx".
        version: of it.
        capabilities: compute capabilities to build for.
        max_batch: the most sequences that step together.
        on_this_gpu: whether this machine's GPU is among them, so that its free memory counts.

    Raises:
        UserError: with numbers, and what to do instead.
    """
    manifest = bundle.manifest
    newest = newest_opset(target, version)
    for graph in manifest.graphs.values():
        if graph.opset > newest:
            shown = ".".join(map(str, version))
            raise UserError(f"{bundle.path / graph.file}: ONNX opset {graph.opset}; {target} {shown} reads up to {newest}")
    for capability in capabilities:
        check_format(str(bundle.path), manifest, capability)
    check_groups(bundle.path, manifest, target)
    check_host_memory(bundle.path, manifest)
    if on_this_gpu:
        from retnet_export.runtime.device import cuda

        check_memory(str(bundle.path), manifest, cuda.memory_info().free, "this GPU", max_batch)


def check_format(where: str, manifest: Manifest, capability: str) -> None:
    """Refuse weights and products whose format a GPU does not have."""
    for what, name in (("weights", manifest.precision.weights), ("products", manifest.precision.compute)):
        floor = FORMAT_FLOOR.get(name)
        if floor is not None and parse_capability(capability) < floor:
            raise UserError(
                f"{where}: {what} in {name} need compute capability {floor[0]}.{floor[1]} or later, this is for {capability}, "
                f"which has {', '.join(formats_of(capability))}; quantize to int8 or int4, or export with precision=fp16"
            )


def check_groups(path: Path, manifest: Manifest, target: str) -> None:
    """Refuse INT8 weights whose scales are of groups of inputs.

    Source: NvInfer.h, IDequantizeLayer: block quantization is "supported for DataType::kINT4 only" in 10.3 to 10.11, and for FP4,
    FP8 and INT4 in 10.13.
    """
    group = (manifest.quantization or {}).get("group_size")
    if target == "tensorrt" and manifest.precision.weights == "int8" and group is not None:
        raise UserError(
            f"{path}: INT8 weights with a scale for every {group} inputs; {target} takes such groups of INT4 weights only: "
            "quantize with weights=int4, or without groups"
        )


def needed_bytes(sizes: Sizes, batch: int, chunk: int, state_sets: int = 2) -> float:
    """Device memory at the peak, the runtime's own included; TensorRT has two sets of state buffers."""
    return sizes.memory_at_peak(batch, chunk, state_sets=state_sets) + RUNTIME_BYTES


def largest_batch(sizes: Sizes, available: float, chunk: int, state_sets: int = 2, limit: int = 1 << 14) -> int:
    """The largest batch that fits; 0 if not even one sequence does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed_bytes(sizes, middle, chunk, state_sets) <= available else (low, middle - 1)
    return low


def check_memory(where: str, manifest: Manifest, available: float, device: str, batch: int) -> None:
    """Refuse what does not fit, and name what does."""
    sizes, chunk = sizes_of_bundle(manifest), manifest.graphs["prefill"].chunk_size
    needed = needed_bytes(sizes, batch, chunk)
    if needed <= available:
        return
    raise UserError(
        f"{where}: needs {needed / 1e9:.2f} GB at batch {batch} (weights {sizes.weights_bytes / 1e9:.2f}, state "
        f"{2 * batch * sizes.state_bytes / 1e9:.2f}, a chunk of {chunk} tokens {sizes.activation_bytes(batch, chunk) / 1e9:.2f}, "
        f"runtime {RUNTIME_BYTES / 1e9:.2f}), {device} has {available / 1e9:.2f} GB free; {nearest_fit(manifest, available, batch)}"
    )


def nearest_fit(manifest: Manifest, available: float, batch: int) -> str:
    """The least change that makes a bundle fit: a smaller batch, then smaller weights."""
    chunk = manifest.graphs["prefill"].chunk_size
    if fitting := largest_batch(sizes_of_bundle(manifest), available, chunk):
        return f"it fits with max_batch={fitting}"
    present = sizes_of_bundle(manifest).weights_bytes
    for weights in ("float16", "int8", "int4"):
        sizes = sizes_of_model(manifest.model, weights, group_size=None if weights != "int4" else 128)
        if sizes.weights_bytes < present and needed_bytes(sizes, 1, chunk) <= available:
            option = "export it with precision=fp16" if weights == "float16" else f"quantize it with weights={weights}"
            return f"{option}: {needed_bytes(sizes, 1, chunk) / 1e9:.2f} GB at batch 1"
    return "no weight format makes it fit; take a smaller model or a device with more memory"


def check_host_memory(path: Path, manifest: Manifest) -> None:
    """Refuse a build that would run the machine out of memory."""
    available, needed = available_host_bytes(), build_bytes(manifest)
    if available is not None and needed > available:
        smaller = "" if manifest.precision.weights == "int4" else ", or quantize the bundle first"
        raise UserError(
            f"{path}: building holds {BUILD_COPIES[manifest.precision.weights]:g} times the weights at its peak, "
            f"{needed / 1e9:.1f} GB, and this machine has {available / 1e9:.1f} GB available; "
            f"close other programs{smaller}, or add swap"
        )


def build_bytes(manifest: Manifest) -> float:
    """Host memory that a build takes at its peak; on a Jetson it is the GPU's memory as well."""
    return BUILD_BASE + BUILD_COPIES[manifest.precision.weights] * manifest.weights_bytes


def available_host_bytes() -> int | None:
    """Memory that programs can still have, swap included, or None where the system does not say."""
    fields = meminfo()
    return fields["MemAvailable"] + fields.get("SwapFree", 0) if "MemAvailable" in fields else None
