"""How much memory and time an export takes: a random checkpoint of one of the paper's sizes, in shards, exported.

    python benchmarks/export_large.py --folder /somewhere/with/40/GB            # 6.7B, fp16
    python benchmarks/export_large.py --folder /tmp/export --size tiny          # seconds, to try it out

The measure of time is a plain copy of the same files on the same disk, timed in the same run; both are read from a cold
cache and end with a sync. Memory is sampled from /proc while the command `retnet-export export` runs in a process of its
own: anonymous memory is what the export needs, mapped files are page cache, which the system can drop.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from safetensors.numpy import save_file

from retnet_export.export.checkpoints.torchscale import file_name
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.device.doctor import examine

SIZES = {  # layers, width, FFN, heads: the paper's table 2
    "6.7B": (32, 4096, 8192, 16),
    "2.7B": (32, 2560, 5120, 10),
    "1.3B": (24, 2048, 4096, 8),
    "tiny": (4, 256, 512, 4),
}
VOCAB_SIZE = 32_000
SAMPLE_SECONDS = 0.02


def write_checkpoint(folder: Path, size: str) -> ModelConfig:
    """A syncdoth checkpoint without GLU, which has the paper's parameter count, with a shard per layer."""
    layers, width, ffn, heads = SIZES[size]
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_key_dim=width // heads,
        head_value_dim=2 * width // heads,
        ffn_size=ffn,
        ffn="mlp",
        ffn_bias=True,
        head_norm_affine="none",
    )
    settings = {
        "model_type": "retnet",
        "vocab_size": VOCAB_SIZE,
        "decoder_embed_dim": width,
        "decoder_value_embed_dim": 2 * width,
        "decoder_ffn_embed_dim": ffn,
        "decoder_layers": layers,
        "decoder_retention_heads": heads,
        "subln": False,
        "use_glu": False,
        "torch_dtype": "float16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    # A tensor is a piece of one pool of random numbers, at a random place: drawing 6.7 billion takes longer than writing them.
    generator = np.random.default_rng(0)
    pool: NDArray[np.float16] = (generator.standard_normal(1 << 27, np.float32) * width**-0.5).astype(np.float16)

    def draw(shape: tuple[int, ...]) -> NDArray[np.float16]:
        count = math.prod(shape)
        start = int(generator.integers(0, pool.size - count + 1))
        drawn: NDArray[np.float16] = pool[start : start + count].reshape(shape)
        return drawn

    index: dict[str, str] = {}
    shards: dict[str, dict[str, NDArray[np.float16]]] = {}
    for name, shape in weight_shapes(config).items():
        stored = "lm_head.weight" if name == "head.weight" else f"model.{file_name(name, config)}"
        shard = name.split(".")[1] if name.startswith("layers.") else "rest"
        index[stored] = f"model-{shard}.safetensors"
        shards.setdefault(index[stored], {})[stored] = draw(shape)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return config


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_copy(source: Path, target: Path) -> float:
    """Seconds to copy the files, synced."""
    forget(source)
    began = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def time_export(source: Path, target: Path, precision: str) -> tuple[float, dict[str, int]]:
    """Seconds to export, synced, and the peaks of the process's memory in KiB."""
    forget(source)
    command = [sys.executable, "-c", "from retnet_export.cli import app; app()", "export", str(source), "-o", str(target)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--precision", precision])
    peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        time.sleep(SAMPLE_SECONDS)
    os.sync()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the export failed with exit code {process.returncode}")
    return seconds, peaks


def main(
    folder: Annotated[Path, typer.Option(help="Where checkpoint, copy and bundle are written, in a new folder that is deleted.")],
    size: Annotated[str, typer.Option(help=", ".join(SIZES))] = "6.7B",
    precision: Annotated[str, typer.Option(help="Of the bundle: fp16, fp32 or bf16.")] = "fp16",
    runs: Annotated[int, typer.Option(help="Copies and exports, in turn; the median counts.")] = 1,
) -> None:
    """Write a random checkpoint, copy it, export it, and print what that took."""
    work = folder / "export-large"
    work.mkdir(parents=True)
    try:
        checkpoint = work / "checkpoint"
        config = write_checkpoint(checkpoint, size)
        held = sum(file.stat().st_size for file in checkpoint.iterdir())
        copies, exports, peaks = [], [], {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
        for _ in range(runs):
            copies.append(time_copy(checkpoint, work / "copy"))
            seconds, found = time_export(checkpoint, work / "large.retnet", precision)
            exports.append(seconds)
            peaks = {name: max(peaks[name], found[name]) for name in peaks}
            written = (work / "large.retnet" / "weights.bin").stat().st_size
            shutil.rmtree(work / "large.retnet")
    finally:
        shutil.rmtree(work)
    parameters = sum(math.prod(shape) for shape in weight_shapes(config).values())
    machine = examine()["machine"]
    copy, export = float(np.median(copies)), float(np.median(exports))
    print(f"machine     {machine['processor']}, {machine['cores']} cores, {machine['memory']}; Python {platform.python_version()}")
    print(f"checkpoint  {parameters / 1e9:.2f}e9 parameters, {held / 1e9:.2f} GB in {config.num_layers + 1} shards, fp16")
    print(f"bundle      {written / 1e9:.2f} GB, {precision}")
    print(f"copy        {copy:.1f} s ({held / copy / 1e6:.0f} MB/s), median of {runs}, {min(copies):.1f} to {max(copies):.1f}")
    print(f"export      {export:.1f} s ({export / copy:.2f} times the copy), {min(exports):.1f} to {max(exports):.1f}")
    print(
        f"memory      {peaks['RssAnon'] / 2**20:.2f} GiB anonymous, {peaks['VmHWM'] / 2**20:.2f} GiB with mapped files, at the peak"
    )


if __name__ == "__main__":
    typer.run(main)
