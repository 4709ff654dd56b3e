"""Choosing the next token from the last logits, in NumPy.

Order: logit bias, penalties, temperature, top-k, top-p, min-p; then one draw by inverse transform from a seeded generator.

Rule: the choice depends on the logits and the seed alone. The kept tokens are the same whether the whole row was looked at or
the backend picked the k largest itself; equal logits go by token id; and the draw walks the kept tokens by id rather than by
rank, so that rounding that swaps two neighbours in rank moves a boundary by that rounding and not the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import top_of
from retnet_export.runtime.errors import ArgumentError

BLOCK = 256
"""Weights that are added up together before one of them is looked for."""

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches p; 1 keeps all.
        min_p: keep tokens at least so probable, as a share of the most probable one's probability; 0 keeps all.
        repetition_penalty: logits of tokens that the session has read, prompt included, are divided by it if positive and
            multiplied if negative (CTRL, arXiv 1909.05858, with the sign fix that everyone uses); 1 is none.
        presence_penalty: subtracted from the logits of tokens already generated; 0 is none.
        frequency_penalty: subtracted once for each time the token was generated; 0 is none.
        logit_bias: added to the logit of a token, by id; -inf bans it.
        seed: of the random generator; None draws one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", self.temperature == 0.0 or 1e-6 <= self.temperature < np.inf, "0 (greedy), or 1e-6 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "more than 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "0 to 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < np.inf, "more than 0; 1 is none"),
            ("presence_penalty", np.isfinite(self.presence_penalty), "a finite number; 0 is none"),
            ("frequency_penalty", np.isfinite(self.frequency_penalty), "a finite number; 0 is none"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise ArgumentError(name, f"is {getattr(self, name)}, expected {expected}")
        for token, bias in self.logit_bias.items():
            if token < 0 or np.isnan(bias) or bias == np.inf:
                raise ArgumentError("logit_bias", f"has {token}={bias}, expected a token id and a number (-inf bans the token)")

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before the choice, which needs all of them."""
        return bool(self.logit_bias) or (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def largest(self) -> int:
        """How many of the largest logits, after adjusting, decide the choice; 0 if all do."""
        return 1 if self.temperature == 0.0 else self.top_k


class LogitsView(Protocol):
    """The last logits of one sequence, wherever they are: what is asked of them decides what crosses to the host."""

    def top(self, k: int) -> tuple[Tokens, Logits]:
        """The k largest, k less than V: tokens (k,) and logits (k,), largest first, equal ones by token."""

    def all(self) -> Logits:
        """All of them, (V,); not to be written to."""


@dataclass(frozen=True)
class Row:
    """Logits (V,) on the host."""

    logits: Logits

    def top(self, k: int) -> tuple[Tokens, Logits]:
        (tokens,), (logits,) = top_of(self.logits[None], k)
        return tokens, logits

    def all(self) -> Logits:
        return self.logits


@dataclass(frozen=True)
class Allowed:
    """Logits without those of some tokens, which may not be chosen."""

    view: LogitsView
    barred: frozenset[int]
    vocab_size: int

    def top(self, k: int) -> tuple[Tokens, Logits]:
        if k + len(self.barred) >= self.vocab_size:
            return Row(self.all()).top(k)
        tokens, logits = self.view.top(k + len(self.barred))
        allowed = np.flatnonzero(~np.isin(tokens, list(self.barred)))[:k]
        return tokens[allowed], logits[allowed]

    def all(self) -> Logits:
        logits: Logits = self.view.all().copy()
        logits[list(self.barred)] = -np.inf
        return logits


class Sampler:
    """Draws tokens for one sequence.

    Args:
        sampling: how.
        read: int32 (V,), how often the session has read each token; looked at, not copied, at every choice.
    """

    def __init__(self, sampling: Sampling, read: NDArray[np.int32]) -> None:
        if beyond := [token for token in sampling.logit_bias if token >= len(read)]:
            raise ArgumentError("logit_bias", f"names token {beyond[0]}, the vocabulary has {len(read)}")
        self.sampling = sampling
        self._read = read
        self._generated = np.zeros_like(read)
        self._biased = np.fromiter(sampling.logit_bias, np.int64)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._generator = np.random.default_rng(sampling.seed)

    def choose(self, view: LogitsView) -> int:
        """The next token."""
        if self.sampling.adjusts:
            view = Row(self._adjusted(view.all()))
        k = self.sampling.largest
        if not 0 < k < len(self._read):
            return self._draw(None, view.all())
        tokens, logits = view.top(k)
        if self.sampling.temperature == 0.0:
            return self._chosen(int(tokens[0]))
        by_id = np.argsort(tokens)
        return self._draw(tokens[by_id], logits[by_id])

    def _draw(self, tokens: Tokens | None, logits: Logits) -> int:
        kept, weights = weighted(logits, self.sampling)
        place = drawn(weights, self._generator.random())
        index = place if kept is None else int(kept[place])
        return self._chosen(index if tokens is None else int(tokens[index]))

    def _chosen(self, token: int) -> int:
        self._generated[token] += 1
        return token

    def _adjusted(self, logits: Logits) -> Logits:
        sampling = self.sampling
        adjusted: Logits = logits.copy()
        adjusted[self._biased] += self._bias
        if sampling.repetition_penalty != 1.0:
            seen = np.flatnonzero(self._read)
            values, penalty = adjusted[seen], np.float32(sampling.repetition_penalty)
            adjusted[seen] = np.where(values > 0, values / penalty, values * penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            made = np.flatnonzero(self._generated)
            counts = self._generated[made].astype(np.float32)
            adjusted[made] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * counts
        if adjusted.max() == -np.inf:
            raise ArgumentError("logit_bias", "bans every token that the model allows")
        return adjusted


def weighted(logits: Logits, sampling: Sampling) -> tuple[Tokens | None, NDArray[np.float32]]:
    """What may be drawn from logits (n,), top-k done, at a positive temperature.

    Returns:
        Indices into `logits` in ascending order, None for all of them, and their probabilities up to a common factor, (m,).
    """
    with np.errstate(over="ignore"):  # at a temperature near 0 a quotient may reach -inf, which is right
        weights: NDArray[np.float32] = np.exp((logits - logits.max()) / np.float32(sampling.temperature))
    kept = None
    if sampling.top_p < 1.0:
        kept = nucleus(weights, sampling.top_p)
        weights = weights[kept]
    if sampling.min_p > 0.0:
        # The largest weight is exp(0) = 1.
        probable = np.flatnonzero(weights >= np.float32(sampling.min_p))
        kept, weights = probable if kept is None else kept[probable], weights[probable]
    return kept, weights


def drawn(weights: NDArray[np.float32], share: float) -> int:
    """The first index at which the sum of weights (n,) up to it exceeds a share, 0 to 1, of their sum; its weight is positive.

    Sums run over blocks first, then within one: to add up a vocabulary one by one takes longer than all the rest.
    """
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64)
    sums = np.cumsum(blocks)
    wanted = share * sums[-1]
    block = min(
        int(np.searchsorted(sums, wanted, side="right")), int(np.flatnonzero(blocks)[-1])
    )  # a product may round up to the sum
    within = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    place = int(np.searchsorted(within, wanted - (sums[block - 1] if block else 0.0), side="right"))
    return block * BLOCK + min(place, int(np.searchsorted(within, within[-1])))


def nucleus(weights: NDArray[np.float32], top_p: float) -> Tokens:
    """Indices, ascending, of the smallest set of largest weights (n,) whose sum reaches the share `top_p`; ties by index.

    Sorting a vocabulary costs more than all the rest of sampling, so only the edge of the nucleus is sorted: the leading bits of
    a positive float are its exponent and the start of its mantissa, which puts the weights into ordered buckets 1/16 wide.
    """
    bucket = (weights.view(np.uint32) >> 19).astype(np.intp)
    mass_down_to = np.cumsum(np.bincount(bucket, weights)[::-1])  # of the highest bucket, of the two highest, …
    wanted = top_p * mass_down_to[-1]
    place = int(np.searchsorted(mass_down_to, wanted))
    edge = len(mass_down_to) - 1 - place
    above = mass_down_to[place - 1] if place else 0.0
    at_edge = np.flatnonzero(bucket == edge)
    order = at_edge[np.argsort(-weights[at_edge], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted - above)) + 1
    kept = bucket > edge
    kept[order[:count]] = True
    return np.flatnonzero(kept)


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities (V,) of the model itself: before bias, penalties, temperature and truncation."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum(dtype=np.float64)), np.float32)
