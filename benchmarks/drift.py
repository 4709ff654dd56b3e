"""Whether errors grow over a long sequence: a bundle's state and logits against the float64 reference, at checkpoints.

The reference is `export.model.RetNet` in float64, which reads in chunks what the bundle reads token by token: the same
recurrence (equation 7), at a speed that allows a million tokens.

States are compared after turning each back by its own n·θ. A state holds keys turned by n·θ, and the graph's θ is a multiple of
2^-32 turn (graph.blocks.rotation), so after a million tokens its keys are up to 7e-4 radians from those of the reference. That
changes no output, because queries are turned by the same angle and only differences of angles matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retnet_export.graph.blocks import PHASE_TURN, phase_per_token
from retnet_export.runtime.backends.base import Runner
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import state_name
from retnet_export.runtime.numerics import measure

if TYPE_CHECKING:
    from retnet_export.export.model import RetNet

REFERENCE_CHUNK = 250
"""Tokens that the reference reads at once; in float64 the split does not matter."""


@dataclass(frozen=True)
class Drift:
    """Errors after some tokens.

    Attributes:
        tokens: read so far.
        state: the worst head of the worst layer: largest error over the standard deviation of the head's state.
        logits: largest error over the standard deviation of the logits after the last token.
    """

    tokens: int
    state: float
    logits: float


@dataclass(frozen=True)
class Reference:
    """What the float64 model holds after some tokens.

    Attributes:
        tokens: read so far.
        states: of each layer, (H, Dk, Dv), turned back by the angles of their position, pairs (i, i + Dk/2).
        logits: (V,) after the last token.
    """

    tokens: int
    states: Sequence[NDArray[np.float64]]
    logits: NDArray[np.float64]


def references(model: RetNet, tokens: NDArray[np.int64], every: int) -> Iterator[Reference]:
    """Read `tokens` (T,) with a float64 model from position 0; T is a multiple of `every`, and that of 250."""
    import torch

    config, state = model.config, model.initial_state(1)
    for read, piece in enumerate(tokens.reshape(-1, REFERENCE_CHUNK), start=1):
        with torch.no_grad():
            logits, state = model.chunk(torch.from_numpy(piece)[None], state)
        if (count := read * REFERENCE_CHUNK) % every == 0:
            angles = count * config.theta
            states = [unturned(_in_halves(config, layer[0].numpy()), angles) for layer in state.layers]
            yield Reference(count, states, logits[0, -1].numpy())


def measure_drift(
    runner: Runner, expected: Iterable[Reference], config: ModelConfig, tokens: NDArray[np.int64], *, chunk: int = 1, start: int = 0
) -> Iterator[Drift]:
    """Read `tokens` with a runner and compare it with the references.

    Args:
        runner: of one sequence, at the initial state.
        expected: what the same tokens leave in the reference.
        config: of both.
        tokens: (T,).
        chunk: how many tokens the runner reads at once: 1 steps, more prefills.
        start: the position of the first token in the sequence. The reference always starts at 0: retention depends on distances
            alone, so that the results must be the same.
    """
    runner.write_state(0, dict(runner.read_state(0)) | {"position": np.array([start])})
    read = 0
    for reference in expected:
        _read(runner, tokens[read : reference.tokens], chunk)
        read = reference.tokens
        state, angles = runner.read_state(0), graph_angles(config, start + read)
        errors = [
            measure(unturned(state[state_name(layer)][0, head], angles), heads[head]).relative
            for layer, heads in enumerate(reference.states)
            for head in range(config.num_heads)
        ]
        yield Drift(read, max(errors), measure(runner.logits()[0], reference.logits).relative)


def _read(runner: Runner, tokens: NDArray[np.int64], chunk: int) -> None:
    if chunk == 1:
        for token in tokens[:, None]:
            runner.step(token)
        return
    for begin in range(0, len(tokens), chunk):
        part = tokens[None, begin : begin + chunk]
        runner.prefill(part, np.array([part.shape[1]]))


def graph_angles(config: ModelConfig, position: int) -> NDArray[np.float64]:
    """The angles (Dk/2,) at which the graph stands after `position` tokens, at any position exactly."""
    phase = [position * int(steps) % PHASE_TURN for steps in phase_per_token(config)]
    return np.array(phase) * (2 * np.pi / PHASE_TURN)


def unturned(state: NDArray[np.generic], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """States (…, Dk, Dv), whose rotary pairs are (i, i + Dk/2), turned back by `angles` (Dk/2,)."""
    first, second = np.split(np.asarray(state, np.float64), 2, axis=-2)
    turned = (first + 1j * second) * np.exp(-1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-2)


def _in_halves(config: ModelConfig, state: NDArray[np.float64]) -> NDArray[np.float64]:
    """States (…, Dk, Dv) in the order of the graph's, where pairs are (i, i + Dk/2) for every family."""
    if config.rotary_layout == "half":
        return state
    return np.concatenate([state[..., 0::2, :], state[..., 1::2, :]], axis=-2)
