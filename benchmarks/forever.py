"""A million tokens through the bundled model's first layers, against the float64 reference.

    python benchmarks/forever.py [--tokens 1000000] [--layers 2] [--every 50000]

Four runners read the same tokens: single steps and prefill, each with a float32 and a float16 state. At every checkpoint
state and logits are compared with the reference (drift.py says how); errors must not grow. A last
table starts runners at positions around 2^31 and beyond, where float32 cannot count any more.

The tokens are the hard case: half of them random, half of them one token repeated a thousand times, on which the state
grows largest.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from drift import Drift, measure_drift, references
from numpy.typing import NDArray

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.model import RetNet
from retnet_export.export.pipeline import DEFAULT_CHUNK, ExportOptions, export_bundle
from retnet_export.runtime.model import load

ROOT = Path(__file__).resolve().parent.parent
STRETCH = 1000
"""Tokens of one kind in a row."""
FAR = (2**31 - 1000, 2**32 - 1000, 2**53 + 1, 2**62)
"""Positions to start at; float32 stops counting at 2^24, float64 at 2^53, an int64 at 2^63."""


def first_layers(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same checkpoint without its later layers."""
    return replace(checkpoint, config=replace(checkpoint.config, num_layers=layers))


def stretches(count: int, vocab_size: int, seed: int = 0) -> NDArray[np.int64]:
    """Tokens (count,): stretches of random ones and of a single one, in turns."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocab_size, count, dtype=np.int64)
    for begin in range(STRETCH, count, 2 * STRETCH):
        tokens[begin : begin + STRETCH] = tokens[begin]
    return tokens


def growth(drifts: list[Drift]) -> float:
    """The worst state error of the last quarter over that of the first."""
    quarter = max(1, len(drifts) // 4)
    return float(max(drift.state for drift in drifts[-quarter:]) / max(drift.state for drift in drifts[:quarter]))


def main(
    tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 1_000_000,
    layers: Annotated[int, typer.Option(help="Layers of the bundled model to keep.")] = 2,
    every: Annotated[int, typer.Option(help="Tokens between comparisons, a multiple of 250.")] = 50_000,
    threads: Annotated[int, typer.Option(help="Threads; these graphs are too small for more than one.")] = 1,
) -> None:
    """Measure how errors develop over a long sequence."""
    torch.set_num_threads(threads)
    checkpoint = first_layers(open_checkpoint(ROOT / "examples" / "classics"), layers)
    config = checkpoint.config
    long_tokens = stretches(tokens, config.vocab_size)
    model = RetNet.from_weights(config, checkpoint.weight, torch.float64)
    expected = list(references(model, long_tokens, every))
    print(f"first {layers} layers of the bundled model, {tokens:,} tokens; errors relative to the reference's standard deviation\n")
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for state in ("fp32", "fp16"):
            bundle = export_bundle(checkpoint, Path(folder) / f"{state}.retnet", ExportOptions(state=state))
            runners[state] = load(bundle.path, "onnxruntime", threads=threads, low_memory=False).backend.open_runner
        print("| state | read by | state error | logit error | last quarter / first | state error at each checkpoint |")
        print("|-------|---------|-------------|-------------|----------------------|--------------------------------|")
        for state, (name, chunk) in product(runners, (("prefill", DEFAULT_CHUNK), ("steps", 1))):
            drifts = list(measure_drift(runners[state](1), expected, config, long_tokens, chunk=chunk))
            worst = Drift(tokens, max(drift.state for drift in drifts), max(drift.logits for drift in drifts))
            row = f"{state:5} | {name:7} | {worst.state:11.1e} | {worst.logits:11.1e} | {growth(drifts):20.2f}"
            print(f"| {row} | {' '.join(f'{drift.state:.1e}' for drift in drifts)} |", flush=True)
        near = list(references(model, long_tokens[: 2 * STRETCH], 2 * STRETCH))
        print(f"\nfloat32 state, {2 * STRETCH:,} steps from a far position")
        for start in FAR:
            (drift,) = measure_drift(runners["fp32"](1), near, config, long_tokens[: 2 * STRETCH], start=start)
            print(f"  from {start:,}: state error {drift.state:.1e}, logit error {drift.logits:.1e}")


if __name__ == "__main__":
    typer.run(main)
