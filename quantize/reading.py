"""How evaluation reads a text: in chunks, or step by step as on the device. Logits come after every token either way.

Rule: both give the same logits up to float32 rounding, and chunks are more than ten times as fast. A state that is stored in
fewer bits is rounded after every step but only once a chunk, which would flatter it: such a bundle is read by steps unless asked
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import Runner
from retnet_export.runtime.bundle.manifest import Manifest

Logits = NDArray[np.float32]


def by_steps(runner: Runner, tokens: NDArray[np.int64], chunk_size: int = 1) -> Logits:
    """Logits (T, V) after each of `tokens` (T,), read one by one."""
    rows = []
    for token in tokens:
        runner.step(np.array([token]))
        rows.append(runner.logits()[0].copy())
    return np.stack(rows)


def by_chunks(runner: Runner, tokens: NDArray[np.int64], chunk_size: int) -> Logits:
    """The same, up to `chunk_size` tokens at a time."""
    parts = np.split(tokens, range(chunk_size, len(tokens), chunk_size))
    logits = [runner.score(part[None], np.array([len(part)]), np.arange(len(part))[None])[0] for part in parts]
    return logits[0] if len(logits) == 1 else np.concatenate(logits)


def wants_steps(manifests: Sequence[Manifest]) -> bool:
    """Whether a state among them is stored in fewer bits than it is computed in."""
    return any(spec.dtype not in ("float32", "int64") for manifest in manifests for spec in manifest.state)
