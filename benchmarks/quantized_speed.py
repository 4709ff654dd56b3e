"""Speed of quantized weights on the CPU: fp32, INT8 and INT4 bundles of one random model, with the portable graphs and
with those for ONNX Runtime on CPUs, in turns, in one run.

Questions it answers:
1. How many tokens per second does each format reach, and how many times fp32's is that?
2. What share of the floor is that: weights and state read once, state written once, at the measured read bandwidth?
3. Where does the time go, operator by operator?
"""

from __future__ import annotations

import collections
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import typer
from common import CACHE, describe_machine, parameters, random_bundle, read_bandwidth
from decode import bytes_per_token

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.base import NUMPY_DTYPES
from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from retnet_export.runtime.bundle.bundle import Bundle, open_bundle
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import Model
from retnet_export.runtime.timing import Sample

FORMATS = {
    "int8": QuantizeOptions("int8"),
    "int8, block 128": QuantizeOptions("int8", 128),
    "int4, block 64": QuantizeOptions("int4", 64),
    "int4, block 128": QuantizeOptions("int4", 128),
    "int4, block 128, head int4": QuantizeOptions("int4", 128, head="int4"),
}
VARIANTS = ("portable", "onnxruntime-cpu")


def quantized(source: Bundle, name: str, options: QuantizeOptions) -> Bundle:
    """A quantized copy of a bundle, from the cache if it is there."""
    target = CACHE / f"{source.path.stem}-{name.replace(', ', '-').replace(' ', '-')}.retnet"
    try:
        return open_bundle(target, check_hashes=False)
    except UserError:  # not there, or written by another version
        return quantize_bundle(source, target, options, force=True)


def profile(bundle: Bundle, variant: str, steps: int, threads: int) -> list[tuple[str, float, float]]:
    """Milliseconds a step and nodes, by operator, of the decode graph; the profiler itself costs some 10 µs a node."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    spent: collections.Counter[str] = collections.Counter()
    nodes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        graph = bundle.manifest.variants[variant].graphs["decode"]
        session = onnxruntime.InferenceSession(str(bundle.file(graph.file)), options, providers=["CPUExecutionProvider"])
        carried = {spec.input for spec in bundle.manifest.state}
        inputs = [spec for spec in graph.inputs if spec.name in carried]
        feeds = {spec.name: np.zeros((1, *spec.shape[1:]), NUMPY_DTYPES[spec.dtype]) for spec in inputs}
        for _ in range(steps):
            session.run(None, {"tokens": np.array([[1]]), **feeds})
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                spent[event["args"]["op_name"]] += event["dur"]
                nodes[event["args"]["op_name"]] += 1
    return [(name, time_us / steps / 1e3, nodes[name] / steps) for name, time_us in spent.most_common()]


def main(
    size: Annotated[str, typer.Option(help="the random model: 148M, 1.5B, …")] = "148M",
    steps: Annotated[int, typer.Option(help="steps a turn")] = 60,
    turns: Annotated[int, typer.Option(help="turns")] = 5,
    threads: Annotated[int, typer.Option(help="threads")] = 2,
) -> None:
    """Measure decode with quantized weights."""
    print(describe_machine())
    source = random_bundle(size)
    bundles = {"fp32": source, **{name: quantized(source, name, options) for name, options in FORMATS.items()}}
    count = parameters(source.manifest.model) / 1e6
    print(f"random {size}, {count:.0f}M parameters, {turns} turns of {steps} steps, {threads} threads")
    runs = {f"{name}, {variant}": (bundle, variant) for name, bundle in bundles.items() for variant in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in runs}
    sessions = {
        name: Model(bundle, OnnxRuntimeBackend(bundle, threads, variant=variant)).session()
        for name, (bundle, variant) in runs.items()
    }
    for _ in range(turns):
        for name, session in sessions.items():
            for step in range(-10, steps):
                began = time.perf_counter()
                session.step([1])
                if step >= 0:
                    times[name].append(1e3 * (time.perf_counter() - began))
    bandwidth = read_bandwidth(threads)
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s (1 GiB), {read_bandwidth(threads, 100_000_000) / 1e9:.1f} GB/s (100 MB)")
    baseline = float(np.median(times["fp32, portable"]))
    print("| weights | MB | ms/token, median [10 %, 90 %] | tokens/s | × fp32 | MB/token | share of the floor |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for name, (bundle, _) in runs.items():
        sample, moved = Sample(times[name]), bytes_per_token(bundle)
        share = 1e3 * moved / bandwidth / sample.median
        speed = f"{1e3 / sample.median:.0f} | {baseline / sample.median:.2f}"
        print(
            f"| {name} | {bundle.manifest.weights_bytes / 1e6:.0f} | {sample} | {speed} | {moved / 1e6:.0f} | {100 * share:.0f} % |"
        )
    for name in ("fp32, portable", "int4, block 64, portable", "int4, block 64, onnxruntime-cpu"):
        print(f"\n{name}, by operator\n| operator | ms | nodes |\n|---|---:|---:|")
        for operator, milliseconds, count in profile(*runs[name], steps, threads)[:10]:
            print(f"| {operator} | {milliseconds:.2f} | {count:.0f} |")


if __name__ == "__main__":
    typer.run(main)
