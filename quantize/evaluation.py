"""The quality of a bundle on a text, and its distance from another bundle: how every quantization is judged.

Rule: every token is predicted from all those before it, through the graphs that the device runs (reading.py says by which of
them). Bundles take turns by chunks: each keeps its threads to itself while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.quantize.reading import Logits, by_chunks, by_steps, wants_steps
from retnet_export.quantize.texts import CHUNK, encode
from retnet_export.runtime.backends.base import State
from retnet_export.runtime.bundle.files import read_text
from retnet_export.runtime.bundle.manifest import POSITION
from retnet_export.runtime.errors import ArgumentError, UserError
from retnet_export.runtime.model import Model
from retnet_export.runtime.progress import Progress, silent

GREEDY_PROMPTS = 8
GREEDY_TOKENS = 128


@dataclass(frozen=True)
class StateError:
    """The difference of two states after some tokens.

    Attributes:
        tokens: read so far.
        by_head: ‖S - S_ref‖ / ‖S_ref‖ of each head, over all layers together; the fastest decay first.
    """

    tokens: int
    by_head: tuple[float, ...]


@dataclass(frozen=True)
class Divergence:
    """A comparison of two bundles on the same text.

    Attributes:
        against: the other's name.
        perplexity: of the other.
        perplexity_ratio: this one's perplexity over the other's.
        kl_mean, kl_p999: KL divergence per token in nats, of the other's distribution from this one's: mean and
            99.9th percentile.
        agreement: the share of tokens after which both would go on greedily alike.
        greedy: tokens that greedy continuations of passages stay the same, for each passage; `GREEDY_TOKENS` at most.
        state: the error of the state on the way.
    """

    against: str
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p999: float
    agreement: float
    greedy: tuple[int, ...]
    state: tuple[StateError, ...]


@dataclass(frozen=True)
class Evaluation:
    """The quality of a bundle on a text.

    Attributes:
        text: the file's name.
        tokens: read, all predicted but the first, or those that begin a text.
        by_steps: whether token by token; in chunks otherwise.
        bytes: of the text that was predicted.
        perplexity: per token.
        bits_per_byte: the text's length in bits under the model over its bytes; comparable between tokenizers.
        comparison: with another bundle, if one was given.
    """

    text: str
    tokens: int
    by_steps: bool
    bytes: int
    perplexity: float
    bits_per_byte: float
    comparison: Divergence | None


def evaluate(
    model: Model,
    path: Path,
    *,
    against: Model | None = None,
    tokens: int | None = None,
    steps: bool | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure how well the bundle predicts a text.

    Args:
        model: the bundle, loaded.
        path: a text file.
        against: another bundle, of the same vocabulary and state.
        tokens: read at most so many; all when None.
        steps: token by token, or in chunks; None: in chunks unless a state is stored in fewer bits (reading.py).
        progress: receives stage and share done.

    Raises:
        UserError: the file is empty, not UTF-8 or shorter than one chunk, or the bundles do not go together.
    """
    return evaluate_all([model], path, against=against, tokens=tokens, steps=steps, progress=progress)[0]


def evaluate_all(
    models: Sequence[Model],
    path: Path,
    *,
    against: Model | None = None,
    tokens: int | None = None,
    steps: bool | None = None,
    progress: Progress = silent,
) -> list[Evaluation]:
    """`evaluate` for several bundles of one vocabulary on one text, which the one they are compared with reads once.

    Args:
        models: the bundles, loaded.
        path: a text file.
        against: another bundle, of the same vocabulary and state.
        tokens: read at most so many; all when None.
        steps: as in `evaluate`; all bundles are read alike.
        progress: receives stage and share done.

    Raises:
        UserError: as `evaluate`.
    """
    if tokens is not None and tokens < CHUNK:
        raise ArgumentError("tokens", f"is {tokens}, less than one chunk of {CHUNK}; read more of the text")
    text = read_text(path)
    ids = encode(models[0], text, path)
    for model in models:
        if against is not None:
            _check_pair(model, against)
    for other in [*models[1:], *([] if against is None else [against])]:
        _check_tokens(models[0], other, text, ids)
    ids = ids[:tokens]
    if steps is None:
        steps = wants_steps([model.bundle.manifest for model in (*models, *([] if against is None else [against]))])
    given = max(1, len(models[0].tokenizer.prefix))
    readings = [_Reading(model, given, steps) for model in models]
    reference = None if against is None else _Reading(against, given, steps)
    marks = _marks(len(ids))
    for start in range(0, len(ids) - 1, CHUNK):
        progress("reading", start / len(ids))
        part, following = ids[start : start + CHUNK], ids[start + 1 : start + CHUNK + 1]
        expected = None if reference is None else reference.advance(part, following).log_probabilities()
        for reading in readings:
            scores = reading.advance(part, following)
            if expected is not None:
                reading.compare(scores.log_probabilities(), expected)
        if reference is not None and start + len(part) in marks:
            theirs = reference.runner.read_state(0)
            for reading in readings:
                reading.state.append(state_error(start + len(part), reading.runner.read_state(0), theirs))
    predicted = len(ids) - given
    size = len(models[0].tokenizer.decode(ids[given:].tolist()).encode())
    comparisons: Sequence[Divergence | None] = [None] * len(models)
    if reference is not None:
        greedy = _greedy_lengths(models, reference.model, ids, progress)
        comparisons = [reading.comparison(reference, lengths) for reading, lengths in zip(readings, greedy, strict=True)]
    return [
        Evaluation(
            text=path.name,
            tokens=len(ids),
            by_steps=steps,
            bytes=size,
            perplexity=float(np.exp(reading.loss)),
            bits_per_byte=reading.loss * predicted / np.log(2) / size,
            comparison=comparison,
        )
        for reading, comparison in zip(readings, comparisons, strict=True)
    ]


class _Reading:
    """One bundle on its way through the text.

    Attributes:
        model: the bundle.
        given: how many tokens at the beginning are not to be predicted.
        runner: its state.
        state: how far it was from the reference's, at the marks.
    """

    def __init__(self, model: Model, given: int, steps: bool) -> None:
        self.model, self.given, self.runner = model, given, model.backend.open_runner(1)
        self._read_logits = by_steps if steps else by_chunks
        self._chunk_size = model.bundle.manifest.graphs["prefill"].chunk_size
        self.state: list[StateError] = []
        self._read = 0
        self._losses: list[NDArray[np.float64]] = []
        self._divergences: list[NDArray[np.float64]] = []
        self._agreements: list[NDArray[np.bool_]] = []

    def advance(self, part: NDArray[np.int64], following: NDArray[np.int64]) -> _Scores:
        """Read a chunk (T,), note what the following tokens cost, and give all scores; of the last chunk without the end."""
        scores = _Scores(self._read_logits(self.runner, part, self._chunk_size)[: len(following)])
        losses = scores.losses(following)
        if not (finite := np.isfinite(losses)).all():
            count = self._read + int(finite.argmin()) + 1
            raise UserError(
                f"{self.model.bundle.path}: its logits are not finite after token {count} of the text; "
                "if the bundle is fp16, export it with precision=fp32 or state=fp32"
            )
        self._read += len(part)
        self._losses.append(losses)
        return scores

    def compare(self, log_p: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
        """Note how far `log_p` (T, V) is from the reference's."""
        self._divergences.append((np.exp(expected) * (expected - log_p)).sum(-1))
        self._agreements.append(log_p.argmax(-1) == expected.argmax(-1))

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self._predicted(self._losses).mean())

    def comparison(self, reference: _Reading, greedy: tuple[int, ...]) -> Divergence:
        divergences = self._predicted(self._divergences)
        return Divergence(
            against=reference.model.bundle.manifest.name,
            perplexity=float(np.exp(reference.loss)),
            perplexity_ratio=float(np.exp(self.loss - reference.loss)),
            kl_mean=float(divergences.mean()),
            kl_p999=float(np.quantile(divergences, 0.999)),
            agreement=float(self._predicted(self._agreements).mean()),
            greedy=greedy,
            state=tuple(self.state),
        )

    def _predicted(self, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Those of the tokens that were to be predicted."""
        return np.concatenate(values)[self.given - 1 :]


def _check_pair(model: Model, against: Model) -> None:
    ours, theirs = model.bundle.manifest.model, against.bundle.manifest.model
    if ours != theirs:
        raise UserError(
            f"{model.bundle.path} and {against.bundle.path} are different models: their configurations differ; "
            "compare bundles of one checkpoint"
        )


def _check_tokens(model: Model, other: Model, text: str, ids: NDArray[np.int64]) -> None:
    """Tokens of one must be tokens of the other; a bundle without a tokenizer is not checked."""
    if other.bundle.manifest.tokenizer is not None and other.tokenizer.encode(text, prefix=True) != ids.tolist():
        raise UserError(
            f"{model.bundle.path} and {other.bundle.path} cut the text into different tokens: their tokenizers differ, so their "
            "predictions cannot be compared; compare bundles of one checkpoint"
        )


def _marks(count: int) -> set[int]:
    """Where the state is compared: after 128, 256, 512, … tokens, and at the end."""
    marks = {count}
    mark = CHUNK
    while mark < count:
        marks.add(mark)
        mark *= 2
    return marks


class _Scores:
    """Logits after some tokens and their normaliser: most of the time only the token that follows is looked up.

    Args:
        logits: (T, V).
    """

    def __init__(self, logits: Logits) -> None:
        top = logits.max(-1, keepdims=True)
        self._logits = logits
        self._normaliser = top + np.log(np.exp(logits - top).sum(-1, keepdims=True, dtype=np.float64))  # (T, 1)

    def losses(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """-log p of one token a row, (T,)."""
        chosen = np.take_along_axis(self._logits, tokens[:, None], -1)
        return np.asarray(self._normaliser - chosen)[:, 0]

    def log_probabilities(self) -> NDArray[np.float64]:
        """log p of every token, (T, V)."""
        return np.asarray(self._logits - self._normaliser)


def state_error(tokens: int, ours: State, theirs: State) -> StateError:
    """How far two states of one sequence are apart after `tokens` tokens; both by name, (1, H, Dk, Dv) a layer."""
    difference, size = 0.0, 0.0
    for name in theirs.keys() - {POSITION}:
        a, r = ours[name][0].astype(np.float64), theirs[name][0].astype(np.float64)  # (H, Dk, Dv)
        difference = difference + ((a - r) ** 2).sum((1, 2))
        size = size + (r**2).sum((1, 2))
    return StateError(tokens, tuple(float(error) for error in np.sqrt(difference / np.maximum(size, 1e-300))))


def _greedy_lengths(models: Sequence[Model], against: Model, ids: NDArray[np.int64], progress: Progress) -> list[tuple[int, ...]]:
    """For each model, how many greedy tokens after passages of the text equal the reference's."""
    length = CHUNK // 2
    starts = np.linspace(0, len(ids) - length, GREEDY_PROMPTS).astype(int)
    lengths: list[list[int]] = [[] for _ in models]
    for count, start in enumerate(starts):
        progress("continuing", count / len(starts))
        prompt = ids[start : start + length]
        theirs = _continue(against, prompt)
        for model, found in zip(models, lengths, strict=True):
            differing = (index for index, (a, b) in enumerate(zip(_continue(model, prompt), theirs, strict=True)) if a != b)
            found.append(next(differing, GREEDY_TOKENS))
    return [tuple(found) for found in lengths]


def _continue(model: Model, prompt: NDArray[np.int64]) -> Sequence[int]:
    runner = model.backend.open_runner(1)
    token = int(by_chunks(runner, prompt, model.bundle.manifest.graphs["prefill"].chunk_size)[-1].argmax())
    tokens = [token]
    while len(tokens) < GREEDY_TOKENS:
        runner.step(np.array([token]))
        token = int(runner.logits()[0].argmax())
        tokens.append(token)
    return tokens
