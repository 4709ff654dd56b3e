"""The paper's Figure 6 on one GPU: a 7.8B RetNet on the backend `cuda` against a KV-cache Transformer of the same size, both fp16.

The Transformer is `compare`'s baseline on ONNX Runtime: same width, depth, vocabulary and parameter count, multi-head attention
through GroupQueryAttention on a pre-allocated cache that it extends in place, fused norms and gates, a captured CUDA graph a
step. Weights are random. A step is timed at a given context by telling the Transformer that it has read that many tokens; what
state and cache hold does not change the time.

    python benchmarks/gpu_compare.py --json docs/lab/figures/gpu_comparison.json
    python benchmarks/gpu_compare.py --from docs/lab/figures/gpu_comparison.json --plots docs/lab/figures
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gpu_models import MODELS, RandomWeightsFile
from step import FORMATS, random_model
from transformer_passes import ResidualNormPass, SinkCastsPass, SwishPass

from retnet_export.compare import drawing
from retnet_export.compare.drawing import BLUE, VERMILION, Look
from retnet_export.runtime.backends.cuda.backend import CudaBackend
from retnet_export.runtime.backends.cuda.many_source import WINDOW
from retnet_export.runtime.device import cuda

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIGA = 1e9
PROVIDER = "CUDAExecutionProvider"
SESSION_OPTIONS = {
    "ep.cuda.enable_gemm_auto_tune": "1",  # per shape, the fastest of cuBLAS and ONNX Runtime's own kernels for few rows
    "session.use_device_allocator_for_initializers": "1",  # weights are not rounded up to the arena's blocks
}
SPARE_BYTES = 3 << 30
"""Left free beside the cache, for weights' scratch and logits."""


def matrices_of(config: Any) -> dict[str, tuple[int, int]]:
    """The Transformer's matrices as its graph stores them."""
    width, inner = config.hidden_size, config.num_heads * config.head_dim
    shapes = {"embedding.weight": (config.vocab_size, width), "head.weight": (width, config.vocab_size)}
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.attention.qkv.weight": (width, inner + 2 * config.num_kv_heads * config.head_dim),
            f"{layer}.attention.out.weight": (inner, width),
            f"{layer}.ffn.gate_up.weight": (width, 2 * config.ffn_size),
            f"{layer}.ffn.down.weight": (config.ffn_size, width),
        }
    return shapes


def write_transformer(folder: Path, config: Any, capacity: int) -> None:
    """The baseline's graph, with random weights and the rewrites of the variant that it has a use for."""
    import onnx_ir as ir

    from retnet_export.compare.transformer import weight_shapes
    from retnet_export.compare.transformer_graph import build_transformer
    from retnet_export.graph.variants import rewrite

    shapes, random = weight_shapes(config), np.random.default_rng(2)

    def read(name: str) -> Any:
        return 1 + 0.1 * random.standard_normal(shapes[name], dtype=np.float32)

    with RandomWeightsFile(folder / "weights.bin", matrices_of(config)) as file:
        model = build_transformer(config, read, file, "float16", capacity)
    ir.save(rewrite(model, (SinkCastsPass, ResidualNormPass, SwishPass)), folder / "transformer.onnx")


class Transformer:
    """The baseline on the GPU; one CUDA graph for each batch and context."""

    def __init__(self, folder: Path, config: Any, graphs: bool) -> None:
        import onnxruntime

        stream = cuda.Stream()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for key, value in SESSION_OPTIONS.items():
            options.add_session_config_entry(key, value)
        provider = {
            "user_compute_stream": str(stream.handle),
            "enable_cuda_graph": "1" if graphs else "0",
            "arena_extend_strategy": "kSameAsRequested",
        }
        path = str(folder / "transformer.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=[(PROVIDER, provider), "CPUExecutionProvider"])
        self._config, self._stream, self._cells = config, stream, 0

    def step_ms(self, batch: int, context: int, steps: int) -> tuple[float, float]:
        """Milliseconds of a step after `context` tokens, and bytes on the device meanwhile.

        Raises:
            CudaMemoryError: the cache does not fit.
        """
        import onnxruntime

        config, stream = self._config, self._stream
        need = config.cache_bytes(context + 1, 2) * batch
        memory = cuda.memory_info()
        if need + SPARE_BYTES > memory.free:
            raise cuda.CudaMemoryError(f"the cache needs {need / GIGA:.1f} GB, {memory.free / GIGA:.1f} are free")
        shape = (batch, config.num_kv_heads, context + 1, config.head_dim)
        binding = self._session.io_binding()
        caches = []
        for index in range(config.num_layers):
            for part in ("key", "value"):
                cache = cuda.DeviceBuffer(2 * int(np.prod(shape)))
                stream.fill(cache, 0x2C)  # 0x2C2C is 0.065 in float16
                binding.bind_input(f"past_key_values.{index}.{part}", "cuda", 0, np.float16, shape, cache.address)
                binding.bind_output(f"present.{index}.{part}", "cuda", 0, np.float16, shape, cache.address)
                caches.append(cache)
        ids, lasts = cuda.DeviceBuffer(8 * batch), cuda.DeviceBuffer(4 * batch)
        logits = cuda.DeviceBuffer(4 * batch * config.vocab_size)
        stream.fill(ids, 0)
        stream.copy_to_device(lasts, np.full(batch, context, np.int32))
        binding.bind_input("input_ids", "cuda", 0, np.int64, (batch, 1), ids.address)
        binding.bind_input("seqlens_k", "cuda", 0, np.int32, (batch,), lasts.address)
        binding.bind_cpu_input("total_sequence_length", np.array(context + 1, np.int32))
        binding.bind_output("logits", "cuda", 0, np.float32, (batch, 1, config.vocab_size), logits.address)
        self._cells += 1
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._cells))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        ms = timed(lambda: self._session.run_with_iobinding(binding, options), stream.synchronize, steps)
        used = memory.total - cuda.memory_info().free
        return ms, used


def timed(step: Callable[[], object], wait: Callable[[], object], steps: int) -> float:
    """Milliseconds of a step, the median of five runs of `steps` steps one after another."""
    for _ in range(3):
        step()
    wait()
    runs = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        runs.append(1e3 * (time.perf_counter() - began) / steps)
    return statistics.median(runs)


def measure_retnet(model: str, batches: list[int]) -> list[dict[str, Any]]:
    """Steps of the backend `cuda`, in runs that write the state as often as any others do."""
    total = cuda.memory_info().total
    bundle, weights = random_model(MODELS[model], *FORMATS["fp16"])
    backend = CudaBackend(bundle, weights=weights)
    rows = []
    for batch in batches:
        runner = backend.open_runner(batch)
        tokens = np.zeros(batch, np.int64)
        ms = timed(partial(runner.step, tokens), backend.stream.synchronize, 2 * WINDOW)
        used = total - cuda.memory_info().free
        rows.append({"model": "retnet", "batch": batch, "context": None, "ms": ms, "device_bytes": used})
        print(f"RetNet      batch {batch:3}: {ms:8.3f} ms, {1e3 * batch / ms:8.1f} tokens/s, {used / GIGA:6.2f} GB", flush=True)
        del runner
        gc.collect()
    return rows


def measure_transformer(
    folder: Path, model: str, batches: list[int], contexts: list[int], steps: int, graphs: bool
) -> list[dict[str, Any]]:
    from retnet_export.compare.transformer import transformer_like

    config = transformer_like(MODELS[model])
    write_transformer(folder, config, max(contexts) + 1)
    heads = f"{config.num_heads} heads of {config.head_dim}"
    print(f"Transformer: {config.parameters / 1e9:.2f}B parameters, {heads}, FFN {config.ffn_size}")
    engine = Transformer(folder, config, graphs)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for batch in batches:
            row: dict[str, Any] = {"model": "transformer", "batch": batch, "context": context, "ms": None, "device_bytes": None}
            try:
                row["ms"], row["device_bytes"] = engine.step_ms(batch, context, steps)
                print(
                    f"Transformer batch {batch:3} context {context:6}: {row['ms']:8.3f} ms, "
                    f"{1e3 * batch / row['ms']:8.1f} tokens/s, {row['device_bytes'] / GIGA:6.2f} GB",
                    flush=True,
                )
            except cuda.CudaMemoryError as error:
                print(f"Transformer batch {batch:3} context {context:6}: does not fit: {error}", flush=True)
            rows.append(row)
            gc.collect()
    return rows


LOOKS = {"retnet": ("RetNet", BLUE, "-"), "transformer": ("Transformer", VERMILION, "--")}
MARKERS = "osD^v"
"""One for each batch."""


def plot(results: dict[str, Any], folder: Path) -> None:
    """Memory, throughput and latency over context, as in the paper's Figure 6: one PNG file each."""
    rows, folder = results["rows"], folder.resolve()
    contexts = sorted({row["context"] for row in rows if row["context"]})
    batches = sorted({row["batch"] for row in rows})
    views: tuple[tuple[str, str, str, Callable[[dict[str, Any]], float]], ...] = (
        ("latency", "Time of a step over context", "ms a step", lambda row: row["ms"]),
        ("throughput", "Throughput over context", "tokens/s", lambda row: 1e3 * row["batch"] / row["ms"]),
        ("memory", "Device memory over context", "GB", lambda row: row["device_bytes"] / GIGA),
    )

    def draw(axes: Axes, unit: str, value: Callable[[dict[str, Any]], float]) -> None:
        for model, (name, color, line) in LOOKS.items():
            for batch, marker in zip(batches, MARKERS, strict=False):
                found = [row for row in rows if row["model"] == model and row["batch"] == batch and row["ms"]]
                # A step of the RetNet is the same at every context; it was timed once.
                points = [(context, value(row)) for row in found for context in ([row["context"]] if row["context"] else contexts)]
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    Look(color, line, marker).draw(axes, x, y, f"{name}, batch {batch}")
        drawing.logarithmic_x(axes, "tokens read", contexts)
        if unit == "tokens/s":
            drawing.logarithmic_y(axes, unit, ",.0f")
        else:
            drawing.linear_y(axes, unit)

    for name, title, unit, value in views:
        figure = drawing.new_figure(partial(draw, unit=unit, value=value), title=title)
        (folder / f"gpu_{name}.png").write_bytes(drawing.png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7.8B", choices=list(MODELS))
    parser.add_argument("--batches", default="1,8,16,64")
    parser.add_argument("--contexts", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-graphs", action="store_true", help="the Transformer without CUDA graphs")
    parser.add_argument("--folder", type=Path, default=None, help="where models are written; the system's temporary folder")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--only", choices=("retnet", "transformer"), default=None, help="one of the two models")
    parser.add_argument(
        "--from", dest="sources", type=Path, nargs="+", default=(), help="plot earlier results instead of measuring"
    )
    parser.add_argument("--plots", type=Path, default=None)
    options = parser.parse_args()
    if options.sources:
        read = [json.loads(path.read_text()) for path in options.sources]
        plot(read[0] | {"rows": [row for each in read for row in each["rows"]]}, options.plots)
        return
    import onnxruntime

    batches = [int(each) for each in options.batches.split(",")]
    contexts = [int(each) for each in options.contexts.split(",")]
    results: dict[str, Any] = {
        "size": options.model,
        "device": cuda.device().name,
        "onnxruntime": onnxruntime.__version__,
        "rows": [],
    }
    parts: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "retnet": lambda folder: measure_retnet(options.model, batches),
        "transformer": lambda folder: measure_transformer(
            folder, options.model, batches, contexts, options.steps, not options.no_graphs
        ),
    }
    for name, part in parts.items():
        if options.only not in (None, name):
            continue
        folder = Path(tempfile.mkdtemp(prefix="gpu-compare-", dir=options.folder))
        try:
            results["rows"] += part(folder)
        finally:
            shutil.rmtree(folder)
        gc.collect()
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
