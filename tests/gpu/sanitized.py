"""What compute-sanitizer watches: every kernel of the backend `cuda` once, on a model so small that racecheck ends within a minute.

PYTHONPATH=tests:benchmarks:… compute-sanitizer --tool racecheck python tests/gpu/sanitized.py [step|batch|few|prompt]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.cuda.backend import CudaBackend
from retnet_export.runtime.backends.cuda.runner import CudaRunner

CONFIG = tiny.config(
    vocab_size=96, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, head_key_dim=16, head_value_dim=32, ffn_size=64
)
READ = {
    "step": lambda runner: [runner.step(np.array([token])) for token in range(3)],
    "batch": lambda runner: [runner.step(np.arange(3)) for _ in range(3)],
    "few": lambda runner: [
        runner.score(np.array([tokens]), np.array([length]), np.arange(length - 1, len(tokens))[None])
        for tokens, length in (
            ([0, 1, 2, 3, 4, 5, 6], 1),
            ([1, 2, 3, 50, 51], 4),
            ([51, 60], 2),
        )  # three drafts were right, then one
    ],
    "prompt": lambda runner: runner.prefill(np.arange(80)[None], np.array([80])),
}


def watch(runner: CudaRunner, what: str) -> None:
    READ[what](runner)
    runner.logits()
    runner.read_state(0)  # brings the state up to date


def main(kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = tiny.bundle(Path(folder), CONFIG, precision="fp16")
        int4 = quantize_bundle(plain, Path(folder) / "int4.retnet", QuantizeOptions(weights="int4", group_size=16))
        for bundle in (plain, int4):
            backend = CudaBackend(bundle)
            for what in kinds:
                watch(backend.open_runner(3 if what == "batch" else 1), what)
                print(bundle.manifest.precision.weights, what, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*READ])
