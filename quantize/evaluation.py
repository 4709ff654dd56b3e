"""What a bundle is worth on a text, and how far it is from another one: the judge of every quantization.

Rule: the text is read token by token through the decode graph, as on the device, so that what rounding does to the state adds
up as it will there. Two bundles take turns by chunks: each keeps its threads to itself while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.quantize.calibration import CHUNK, encode
from retnet_export.runtime.backends.base import State
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.files import read_text
from retnet_export.runtime.model import Model

Logits = NDArray[np.float32]
Progress = Callable[[str, float], None]
GREEDY_PROMPTS = 8
GREEDY_TOKENS = 128


@dataclass(frozen=True)
class StateError:
    """How far two states are apart after some tokens.

    Attributes:
        tokens: read so far.
        by_head: ‖S - S_ref‖ / ‖S_ref‖ of each head, over all layers together; the fastest decay first.
    """

    tokens: int
    by_head: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """One bundle against another on the same text.

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
    """What a bundle is worth on a text.

    Attributes:
        text: the file's name.
        tokens: read, all but the first predicted.
        bytes: of the text that was predicted.
        perplexity: per token.
        bits_per_byte: the text's length in bits under the model over its bytes; comparable between tokenizers.
        comparison: with another bundle, if one was given.
    """

    text: str
    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float
    comparison: Comparison | None


def evaluate(
    model: Model,
    path: Path,
    *,
    against: Model | None = None,
    tokens: int | None = None,
    progress: Progress = lambda stage, share: None,
) -> Evaluation:
    """Read a text and say how well the bundle foretells it.

    Args:
        model: the bundle, loaded.
        path: a text file.
        against: another bundle, of the same vocabulary and state.
        tokens: read at most so many; all when None.
        progress: is told what goes on.

    Raises:
        UserError: the file is empty, not UTF-8 or shorter than one chunk, or the bundles do not go together.
    """
    ids = encode(model, read_text(path), path)[:tokens]
    if len(ids) < CHUNK:
        raise UserError(f"{path}: {len(ids)} tokens are shorter than one chunk of {CHUNK}; read more of the text")
    if against is not None:
        _check_pair(model, against)
    models = [model] if against is None else [model, against]
    streams = [each.backend.open_stream(1) for each in models]
    losses: list[list[NDArray[np.float64]]] = [[] for _ in models]
    divergences: list[NDArray[np.float64]] = []
    agreements = 0
    state_errors: list[StateError] = []
    marks = _marks(len(ids))
    for start in range(0, len(ids) - 1, CHUNK):
        progress("reading", start / len(ids))
        part = ids[start : start + CHUNK]
        following = ids[start + 1 : start + CHUNK + 1]
        distributions = []
        for stream, loss in zip(streams, losses, strict=True):
            log_p = _log_softmax(_read(stream, part))[: len(following)]
            loss.append(-log_p[np.arange(len(following)), following])
            distributions.append(log_p)
        if against is not None:
            ours, theirs = distributions
            divergences.append((np.exp(theirs) * (theirs - ours)).sum(-1))
            agreements += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            if start + len(part) in marks:
                state_errors.append(_state_error(start + len(part), *(stream.read_state(0) for stream in streams)))
    mean_losses = [float(np.concatenate(loss).mean()) for loss in losses]
    predicted = len(ids) - 1
    size = len(model.tokenizer.decode(ids[1:].tolist()).encode())
    comparison = None
    if against is not None:
        kl = np.concatenate(divergences)
        comparison = Comparison(
            against=against.bundle.manifest.name,
            perplexity=float(np.exp(mean_losses[1])),
            perplexity_ratio=float(np.exp(mean_losses[0] - mean_losses[1])),
            kl_mean=float(kl.mean()),
            kl_p999=float(np.quantile(kl, 0.999)),
            agreement=agreements / predicted,
            greedy=_greedy_lengths(model, against, ids, progress),
            state=tuple(state_errors),
        )
    return Evaluation(
        text=path.name,
        tokens=len(ids),
        bytes=size,
        perplexity=float(np.exp(mean_losses[0])),
        bits_per_byte=mean_losses[0] * predicted / np.log(2) / size,
        comparison=comparison,
    )


def _check_pair(model: Model, against: Model) -> None:
    ours, theirs = model.bundle.manifest.model, against.bundle.manifest.model
    if ours != theirs:
        raise UserError(f"{model.bundle.path} and {against.bundle.path} are different models: their configurations differ")


def _marks(count: int) -> set[int]:
    """Where the state is compared: after 128, 256, 512, … tokens, and at the end."""
    marks = {count}
    mark = CHUNK
    while mark < count:
        marks.add(mark)
        mark *= 2
    return marks


def _read(stream, tokens: NDArray[np.int64]) -> Logits:  # type: ignore[no-untyped-def]
    """Logits (T, V) after each token."""
    rows = []
    for token in tokens:
        stream.step(np.array([token]))
        rows.append(stream.logits()[0].copy())
    return np.stack(rows)


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _state_error(tokens: int, ours: State, theirs: State) -> StateError:
    difference, size = 0.0, 0.0
    for name in theirs:
        if name.startswith("state."):
            a, r = ours[name][0].astype(np.float64), theirs[name][0].astype(np.float64)  # (H, Dk, Dv)
            if a.shape != r.shape:  # one of them keeps its states value-major: the dialect onnxruntime-cuda
                a = a.swapaxes(1, 2)
            difference = difference + ((a - r) ** 2).sum((1, 2))
            size = size + (r**2).sum((1, 2))
    return StateError(tokens, tuple(float(error) for error in np.sqrt(difference / np.maximum(size, 1e-300))))


def _greedy_lengths(model: Model, against: Model, ids: NDArray[np.int64], progress: Progress) -> tuple[int, ...]:
    """How long greedy continuations of passages of the text stay the same."""
    length = CHUNK // 2
    starts = np.linspace(0, len(ids) - length, GREEDY_PROMPTS).astype(int)
    lengths = []
    for count, start in enumerate(starts):
        progress("continuing", count / len(starts))
        prompt = ids[start : start + length]
        ours, theirs = (_continue(each, prompt) for each in (model, against))
        differing = [index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        lengths.append(differing[0] if differing else GREEDY_TOKENS)
    return tuple(lengths)


def _continue(model: Model, prompt: NDArray[np.int64]) -> Sequence[int]:
    stream = model.backend.open_stream(1)
    token = int(_read(stream, prompt)[-1].argmax())
    tokens = [token]
    while len(tokens) < GREEDY_TOKENS:
        stream.step(np.array([token]))
        token = int(stream.logits()[0].argmax())
        tokens.append(token)
    return tokens
