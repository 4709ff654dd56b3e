"""Choosing the next token from logits, in NumPy, on the last logits only.

Order: temperature, then top-k, then top-p over what is left; the draw is by inverse transform from a seeded generator, so
one seed and one sequence of logits give one text on any backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches p; 1 keeps all.
        seed: of the random generator; None draws one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, valid, expected in (
            ("temperature", self.temperature, 0.0 <= self.temperature < np.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "more than 0 and at most 1"),
        ):
            if not valid:
                raise UserError(f"sampling: {name} is {value}, expected {expected}")


class Sampler:
    """Draws tokens for one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token from logits (V,)."""
        if self.sampling.temperature == 0.0:
            return int(np.argmax(logits))
        tokens, probabilities = distribution(logits, self.sampling)
        index = int(np.searchsorted(np.cumsum(probabilities), self._generator.random(), side="right"))
        return int(tokens[min(index, len(tokens) - 1)])


def distribution(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, most probable first, and their probabilities: (n,), (n,), for a positive temperature."""
    wide = logits.astype(np.float64)
    k = min(sampling.top_k or len(wide), len(wide))
    kept = np.argpartition(-wide, k - 1)[:k] if k < len(wide) else np.arange(len(wide))
    kept = kept[np.argsort(-wide[kept], kind="stable")]
    scaled = (wide[kept] - wide[kept[0]]) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        count = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        kept, probabilities = kept[:count], probabilities[:count]
        probabilities = probabilities / probabilities.sum()
    return kept.astype(np.int64), probabilities
