"""Size, speed and quality of several bundles of one model.

Rule: the bundles are in one process and take turns in rounds, so that other load on the machine affects all alike; each
step is timed as `generate --stats` times it, and the median over all rounds counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retnet_export.quantize.evaluation import Evaluation, evaluate, evaluate_all
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.model import Model, load
from retnet_export.runtime.progress import Progress, silent

ROUNDS = 5
TOKENS_A_ROUND = 200
SETTLE_SECONDS = 0.05
"""Between turns: threads of the model that ran last stop spinning."""


@dataclass(frozen=True)
class TradeOff:
    """One bundle of several.

    Attributes:
        name: its name among them.
        weights_bytes: of its weights file.
        token_ms: the median time from one token to the next, in milliseconds, sampling included.
        round_ms: the medians of the rounds, which say how far to trust it.
        evaluation: on the text, against the first bundle; the first one's against itself is left out.
    """

    name: str
    weights_bytes: int
    token_ms: float
    round_ms: tuple[float, ...]
    evaluation: Evaluation

    @property
    def tokens_per_second(self) -> float:
        return 1e3 / self.token_ms

    @property
    def spread(self) -> float:
        """The slowest round over the fastest, less one."""
        return max(self.round_ms) / min(self.round_ms) - 1


def trade_offs(
    bundles: Mapping[str, Path],
    text: Path,
    *,
    prompt: str,
    rounds: int = ROUNDS,
    tokens: int = TOKENS_A_ROUND,
    progress: Progress = silent,
) -> tuple[TradeOff, ...]:
    """Measure bundles of one model.

    Args:
        bundles: folders by name; the first is what the others are compared with.
        text: a file that the model was not trained on, for the quality.
        prompt: what is continued, for the speed.
        rounds: turns of each.
        tokens: generated in a turn.

    Raises:
        UserError: a bundle does not load, the text is unfit, or the bundles are of different models.
    """
    models = {name: load(path, check_hashes=False) for name, path in bundles.items()}
    reference, *others = models.values()
    progress("quality", 0.0)
    evaluations = [evaluate(reference, text), *evaluate_all(others, text, against=reference, progress=progress)]
    times: dict[str, list[list[float]]] = {name: [] for name in models}
    for model in models.values():
        _generate(model, prompt, tokens=16)  # the first steps page the weights in
    for turn in range(rounds):
        progress("speed", turn / rounds)
        for name, model in models.items():
            time.sleep(SETTLE_SECONDS)
            times[name].append(_generate(model, prompt, tokens).total_ms)
    return tuple(
        TradeOff(
            name=name,
            weights_bytes=model.bundle.manifest.weights_bytes,
            token_ms=float(np.median(np.concatenate(times[name]))),
            round_ms=tuple(float(np.median(part)) for part in times[name]),
            evaluation=evaluation,
        )
        for (name, model), evaluation in zip(models.items(), evaluations, strict=True)
    )


def _generate(model: Model, prompt: str, tokens: int) -> Stats:
    """Time so many tokens; a text that ends before is followed by another, of another seed."""
    stats = Stats()
    for seed in range(tokens):
        session = model.session()
        session.feed(prompt)
        for _ in session.pieces(max_new_tokens=tokens - stats.new_tokens, temperature=0.8, top_p=0.95, seed=seed, stats=stats):
            pass
        if stats.new_tokens == tokens:
            return stats
    raise UserError(
        f"{model.bundle.path}: its texts end directly after {prompt!r}, so there is no token to measure; give another prompt"
    )
