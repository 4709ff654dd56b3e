"""The fused state kernel by itself: compiled with nvcc, checked against float64, timed against the copy bandwidth.

    python benchmarks/state_kernel.py

One launch is one layer's retention step (kernels/retention_step.cu). It reads and writes the float32 state once; everything
else it touches is thousands of times smaller. The timing replays a CUDA graph of one launch for each of a model's layers,
each with buffers of its own, so that the caches hold none of them.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from gpu import GIGA, copy_bandwidth

from retnet_export.runtime.device import cuda

SOURCE = Path(__file__).parent / "kernels" / "retention_step.cu"
DK, DV = 256, 512
EPS = 1e-6 * DK
REPEATS = 20


def compile_kernel(folder: Path) -> Any:
    """The kernel's launcher, compiled for this machine's GPU."""
    major, minor = cuda.device().compute_capability
    library = folder / "retention_step.so"
    command = ["nvcc", "-O3", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    launch = ctypes.CDLL(str(library)).retention_step
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    launch.argtypes = [*[pointer] * 8, integer, integer, integer, ctypes.c_float, integer, pointer]
    return launch


class Layer:
    """Inputs and outputs of one layer, random, on the device; the small ones are kept on the host as well."""

    def __init__(self, stream: cuda.Stream, batch: int, heads: int, seed: int, *, keep_state: bool) -> None:
        random = np.random.default_rng(seed)
        self.batch, self.heads = batch, heads
        self.projections = random.standard_normal((batch, heads * 2 * (DK + DV))).astype(np.float16)
        angle = random.uniform(0, 2 * np.pi, (batch, DK // 2))
        self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        self.gamma = (1 - 2.0 ** (-5.0 - np.arange(heads))).astype(np.float32)
        self.weight = random.standard_normal(DV).astype(np.float32)
        shape = (batch, heads, DK, DV)
        self.state = random.standard_normal(shape, dtype=np.float32) if keep_state else None
        small: tuple[NDArray[Any], ...] = (self.projections, self.cos, self.sin, self.gamma, self.weight)
        self._buffers = [cuda.DeviceBuffer(array.nbytes) for array in small]
        for buffer, array in zip(self._buffers, small, strict=True):
            stream.copy_to_device(buffer, array)
        self.before, self.after = (cuda.DeviceBuffer(4 * int(np.prod(shape))) for _ in range(2))
        self.y = cuda.DeviceBuffer(2 * batch * heads * DV)
        stream.fill(self.before, 0x3C)
        if self.state is not None:
            stream.copy_to_device(self.before, self.state)
            stream.fill(self.after, 0xFF)
            stream.fill(self.y, 0xFF)
        stream.synchronize()

    @property
    def bytes_moved(self) -> int:
        return self.before.bytes + self.after.bytes + self.y.bytes + self.projections.nbytes

    def launch(self, function: Any, columns: int, stream: cuda.Stream, *, overlap: bool) -> None:
        addresses = [buffer.address for buffer in (*self._buffers, self.before, self.after, self.y)]
        code = function(*addresses, self.batch, self.heads, columns, EPS, overlap, stream.handle)
        if code:
            raise RuntimeError(f"the launch failed with CUDA error {code}")


def reference(layer: Layer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y (B, H·Dv) and the state after, in float64, from the paper's equations."""
    assert layer.state is not None
    batch, heads, half = layer.batch, layer.heads, DK // 2
    p = layer.projections.astype(np.float64)
    first, second = (p[:, start : start + 2 * heads * half].reshape(batch, 2 * heads, half) for start in (0, 2 * heads * half))
    turned = (first + 1j * second) * (layer.cos.astype(np.float64) + 1j * layer.sin)[:, None]
    qk = np.concatenate([turned.real, turned.imag], -1)
    q, k = qk[:, :heads], qk[:, heads:]
    v, gate = (p[:, start : start + heads * DV].reshape(batch, heads, DV) for start in (2 * heads * DK, heads * (2 * DK + DV)))
    state = layer.gamma.astype(np.float64)[:, None, None] * layer.state + k[..., None] * v[:, :, None]
    o = np.einsum("bhk,bhkv->bhv", q, state)
    normed = o / np.sqrt((o * o).mean(-1, keepdims=True) + EPS) * layer.weight
    return (normed * gate / (1 + np.exp(-gate))).reshape(batch, -1), state


def check(function: Any, stream: cuda.Stream, batch: int, heads: int, columns: int) -> tuple[float, float]:
    """Relative errors ‖a - r‖ / ‖r‖ of y and of the state."""
    layer = Layer(stream, batch, heads, seed=columns + batch, keep_state=True)
    layer.launch(function, columns, stream, overlap=False)
    y, state = np.empty((batch, heads * DV), np.float16), np.empty((batch, heads, DK, DV), np.float32)
    stream.copy_to_host(y, layer.y)
    stream.copy_to_host(state, layer.after)
    stream.synchronize()
    y_reference, state_reference = reference(layer)
    return _error(y, y_reference), _error(state, state_reference)


def _error(actual: NDArray[Any], reference: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(actual - reference) / np.linalg.norm(reference))


def measure(
    function: Any, stream: cuda.Stream, layers: int, batch: int, heads: int, columns: int, overlap: bool
) -> tuple[float, float]:
    """Microseconds of one launch, and bytes it moves per second."""
    model = [Layer(stream, batch, heads, seed, keep_state=False) for seed in range(layers)]
    model[0].launch(function, columns, stream, overlap=overlap)  # loads the module, which a capture cannot
    with stream.capture() as graph:
        for layer in model:
            layer.launch(function, columns, stream, overlap=overlap)
    times = []
    for _ in range(REPEATS):
        begin, end = cuda.Event(), cuda.Event()
        stream.record(begin)
        stream.launch(graph)
        stream.record(end)
        times.append(end.milliseconds_since(begin))
    ms = statistics.median(times[3:]) / layers
    return 1e3 * ms, model[0].bytes_moved / (1e-3 * ms)


def main() -> None:
    stream, bandwidth = cuda.Stream(), copy_bandwidth()
    print(f"{cuda.device().name}, copy bandwidth {bandwidth / GIGA:.0f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        function = compile_kernel(Path(folder))
        for columns in (32, 64, 128):
            y_error, state_error = check(function, stream, batch=3, heads=16, columns=columns)
            print(f"{columns:4} columns a block: error of y {y_error:.2e} (float16), of the state {state_error:.2e}")
            if not (y_error < 1e-3 and state_error < 1e-6):  # a NaN fails too
                raise SystemExit("the kernel is wrong")
        for name, layers, heads in (("1.5B", 24, 8), ("7.8B", 32, 16)):
            for batch in (1, 8):
                for columns, overlap in ((32, False), (64, False), (128, False), (64, True), (128, True)):
                    us, rate = measure(function, stream, layers, batch, heads, columns, overlap)
                    print(
                        f"{name} batch {batch} {columns:4} columns{', overlapping' if overlap else '':13}: "
                        f"{us:7.2f} us a layer, {rate / GIGA:6.0f} GB/s, "
                        f"{100 * rate / bandwidth:5.1f} % of copy bandwidth",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
