"""The state written every `WINDOW` steps, over a long sequence: its error against float64, and that of one written at each step.

    python benchmarks/window.py [--tokens 20000] [--every 2500]        half a minute on an H100, no files

Two sequences step together through a small random model in float32 whose slowest head, as in the paper's 7.8B, forgets
nothing (γ = 1 - 2^-20). The same tokens go through runners of one sequence, whose kernel writes the state at each step. Half
of the tokens are random, half one token a thousand times over, on which a state grows as large as it can.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from drift import Reference, graph_angles, references, unturned
from forever import stretches
from random_weights import random_weights

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.model import RetNet
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.runtime.backends.cuda.backend import CudaBackend
from retnet_export.runtime.backends.cuda.many_source import WINDOW
from retnet_export.runtime.backends.cuda.runner import CudaRunner
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import state_name
from retnet_export.runtime.device import cuda
from retnet_export.runtime.numerics import measure

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=256, num_layers=2, num_heads=16, head_key_dim=16, head_value_dim=32, ffn_size=512, num_kv_heads=16
)
SEQUENCES = 2


def errors(runner: CudaRunner, slot: int, reference: Reference) -> tuple[float, float, float]:
    """Errors of the worst head's state, of the slowest head's state in the last layer, and of the logits, in deviations."""
    angles, logits = graph_angles(CONFIG, reference.tokens), runner.logits()[slot].copy()
    state = runner.read_state(slot)
    heads = [
        [measure(unturned(state[state_name(layer)][0, head], angles), expected[head]).relative for head in range(CONFIG.num_heads)]
        for layer, expected in enumerate(reference.states)
    ]
    return float(np.max(heads)), heads[-1][-1], measure(logits, reference.logits).relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=2_500, help="tokens between comparisons, a multiple of 250")
    options = parser.parse_args()
    weights = random_weights(CONFIG, 3)
    tokens = np.stack([stretches(options.tokens, CONFIG.vocab_size, seed) for seed in range(SEQUENCES)])
    model = RetNet.from_weights(CONFIG, weights.__getitem__, torch.float64)
    expected = [list(references(model, row, options.every)) for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(path=Path(folder), family="random", config=CONFIG, weight=weights.__getitem__, files=())
        backend = CudaBackend(export_bundle(checkpoint, Path(folder) / "random.retnet", ExportOptions()))
    together, alone = backend.open_runner(SEQUENCES), [backend.open_runner(1) for _ in range(SEQUENCES)]
    print(f"{cuda.device().name}, {options.tokens:,} steps, the state of two sequences written every {WINDOW} steps")
    print("| steps | state, every W | state, every step | slowest head, W | every step | logits, W | every step |")
    print("|---|---|---|---|---|---|---|")
    for index, begin in enumerate(range(0, options.tokens, options.every)):
        for step in tokens[:, begin : begin + options.every].T:
            together.step(step)
            for runner, token in zip(alone, step, strict=True):
                runner.step(token[None])
        rows = [
            np.max([errors(runner, slot, expected[sequence][index]) for sequence, (runner, slot) in enumerate(runners)], axis=0)
            for runners in (((together, 0), (together, 1)), ((alone[0], 0), (alone[1], 0)))
        ]
        cells = " | ".join(f"{row[part]:.1e}" for part in range(3) for row in rows)
        print(f"| {begin + options.every:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
