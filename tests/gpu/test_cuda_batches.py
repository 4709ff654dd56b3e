"""The backend `cuda` with several sequences, prompts and drafts: equal to the float64 oracle, one sequence at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
from random_weights import random_weights

from retnet_export.runtime.backends.cuda.backend import CudaBackend
from retnet_export.runtime.backends.cuda.runner import CudaRunner

PTX = (
    tuple(int(part) for part in os.environ["RETNET_EXPORT_TEST_PTX"].split(".")) if "RETNET_EXPORT_TEST_PTX" in os.environ else None
)
"""Another GPU's compute capability, whose code is to run instead of this one's own."""
VOCABULARY = min(config.vocab_size for config in tiny.CONFIGS.values())
"""Tokens that every model here knows."""
PRECISIONS = {"float32": "fp32", "float16": "fp16"}
TOLERANCE = {"float32": 2e-4, "float16": 3e-2}
"""Of logits, relative to their deviation; operands are rounded to fp16 once a product, sums and state are float32."""


class Reference:
    """The oracle, sequence by sequence."""

    def __init__(self, config, weights, slots: int) -> None:
        self.config, self.weights = config, {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.positions, self.states = [0] * slots, [oracle.initial_state(config) for _ in range(slots)]

    def feed(self, slot: int, tokens, keep: int | None = None) -> np.ndarray:
        """Logits (n, V) after each token; the sequence keeps the first `keep` of them, all by default."""
        position, state, rows = self.positions[slot], self.states[slot], []
        for index, token in enumerate(tokens):
            row, state = oracle.step(self.config, self.weights, int(token), position + index, state)
            rows.append(row)
            if index + 1 == (len(tokens) if keep is None else keep):
                self.positions[slot], self.states[slot] = position + index + 1, state
        return np.array(rows)


def off(found, expected) -> float:
    """The largest error, in deviations of what is expected."""
    return float(np.abs(found - expected).max() / expected.std())


@pytest.fixture(
    params=[(name, compute) for name in tiny.CONFIGS for compute in TOLERANCE], ids=lambda each: f"{each[0]}, {each[1]}"
)
def case(request, tmp_path: Path) -> tuple[CudaBackend, Reference, float]:
    name, compute = request.param
    config = tiny.CONFIGS[name]
    weights = random_weights(config, 3)
    bundle = tiny.bundle(tmp_path, config, weights, precision=PRECISIONS[compute])
    return CudaBackend(bundle, ptx=PTX), Reference(config, weights, 3), TOLERANCE[compute]


def tokens_for(runner: CudaRunner, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def test_steps_of_a_batch_prompts_and_steps_again_are_those_of_the_oracle(case) -> None:
    backend, reference, tolerance = case
    runner = backend.open_runner(3)

    def steps(count: int, seed: int) -> None:
        for tokens in tokens_for(runner, count, 3, seed=seed):
            runner.step(tokens)
            expected = np.stack([reference.feed(slot, [token])[-1] for slot, token in enumerate(tokens)])
            assert off(runner.logits(), expected) < tolerance
            assert (runner.top(1)[0][:, 0] == runner.logits().argmax(-1)).all()

    steps(33, 1)  # the state is written on the way
    for lengths in ([5, 0, 9], [1, 70, 33]):
        tokens = tokens_for(runner, 3, max(lengths), seed=2)
        runner.prefill(tokens, np.array(lengths))
        for slot, length in enumerate(lengths):
            if length:
                expected = reference.feed(slot, tokens[slot, :length])[-1]
                assert off(runner.logits()[slot], expected) < tolerance
                assert (runner.top(5)[0][slot] == np.argsort(-runner.logits()[slot], kind="stable")[:5]).all()
    steps(3, 3)


def test_drafts_are_scored_and_leave_no_trace(case) -> None:
    backend, reference, tolerance = case
    runner = backend.open_runner(2)
    runner.step(tokens_for(runner, 2))
    for slot, token in enumerate(tokens_for(runner, 2)):
        reference.feed(slot, [token])
    tokens, lengths, rows = tokens_for(runner, 2, 40, seed=4), np.array([2, 35]), np.array([[0, 1, 2, 39], [34, 35, 36, 37]])
    scores = runner.score(tokens, lengths, rows)
    for slot in range(2):
        expected = reference.feed(slot, tokens[slot], keep=int(lengths[slot]))
        assert off(scores[slot], expected[rows[slot]]) < tolerance
    runner.step(tokens[:, 0])
    assert off(runner.logits(), np.stack([reference.feed(slot, tokens[slot, :1])[-1] for slot in range(2)])) < tolerance


@pytest.mark.parametrize("width", [2, 5, 8, 17, 32, 33])
def test_passes_over_drafts_are_those_of_steps_at_every_width(case, width: int) -> None:
    backend, reference, tolerance = case
    runner, random = backend.open_runner(1), np.random.default_rng(width)
    for _ in range(4):  # some of the draft is right each time, and enters the state with the next pass
        length = int(random.integers(0, width))
        tokens = tokens_for(runner, 1, width, seed=int(random.integers(1000)))
        scores = runner.score(tokens, np.array([length]), np.arange(width)[None])
        assert off(scores[0], reference.feed(0, tokens[0], keep=length)) < tolerance
    runner.step(np.array([5]))
    assert off(runner.logits()[0], reference.feed(0, [5])[-1]) < tolerance


def test_drafts_that_were_right_are_not_read_again(case, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, reference, tolerance = case
    from retnet_export.runtime.backends.cuda import many

    seen, cut = [], many.cut
    monkeypatch.setattr(many, "cut", lambda *arguments: [seen.append(piece) or piece for piece in cut(*arguments)])
    runner = backend.open_runner(1)
    text = tokens_for(runner, 40)
    own, at = list(text[:1]), 1
    for right in (3, 0, 5, 5, 1):  # so many of five guesses
        draft = text[at : at + 5].copy()
        if right < 5:
            draft[right] = (draft[right] + 1) % VOCABULARY
        tokens, rows = np.array([[*own, *draft]]), len(own) - 1 + np.arange(6)
        scores = runner.score(tokens, np.array([len(own)]), rows[None])
        assert off(scores[0], reference.feed(0, tokens[0], keep=len(own))[rows]) < tolerance
        own, at = list(text[at : at + right + 1]), at + right + 1
    runner.prefill(np.array([own]), np.array([len(own)]))
    assert off(runner.logits()[0], reference.feed(0, own)[-1]) < tolerance
    runner.step(np.array([7]))
    assert off(runner.logits()[0], reference.feed(0, [7])[-1]) < tolerance
    assert [int(piece.kept[0]) for piece in seen] == [0, 3, 0, 5, 5, 1]
    assert [int(piece.needed[0]) for piece in seen] == [6, 6, 6, 6, 6, 1]


def test_drafts_are_forgotten_when_another_changes_the_state(case) -> None:
    backend, reference, tolerance = case
    runner = backend.open_runner(1)
    runner.score(np.array([[1, 2, 3]]), np.array([1]), np.array([[0, 1, 2]]))
    reference.feed(0, [1])
    state = runner.read_state(0)
    runner.write_state(0, state)
    runner.step(np.array([9]))
    reference.feed(0, [9])
    scores = runner.score(np.array([[2, 3, 4]]), np.array([3]), np.array([[2]]))
    assert off(scores[0], reference.feed(0, [2, 3, 4])[-1:]) < tolerance


def test_a_state_that_was_read_continues_alone_in_another_slot(case) -> None:
    backend, reference, tolerance = case
    runner, other = backend.open_runner(3), backend.open_runner(1)
    for tokens in tokens_for(runner, 7, 3, seed=5):
        runner.step(tokens)
        for slot, token in enumerate(tokens):
            reference.feed(slot, [token])
    other.write_state(0, runner.read_state(2))
    other.step(np.array([1]))
    runner.step(np.array([2, 3, 1]))
    assert off(other.logits()[0], reference.feed(2, [1])[-1]) < tolerance
    assert off(runner.logits()[2], other.logits()[0].astype(np.float64)) < tolerance
    runner.narrow(1)
    runner.step(np.array([4]))
    reference.feed(0, [2])
    assert off(runner.logits()[0], reference.feed(0, [4])[-1]) < tolerance


def test_a_prompt_is_the_same_in_any_pieces(case) -> None:
    backend, _, tolerance = case
    tokens = np.random.default_rng(6).integers(0, backend.manifest.model.vocab_size, (1, 131))

    def logits_of(*pieces: int) -> np.ndarray:
        runner, done = backend.open_runner(1), 0
        for piece in pieces:
            runner.prefill(tokens[:, done : done + piece], np.array([piece]))
            done += piece
        return runner.logits()[0].astype(np.float64)

    whole = logits_of(131)
    for pieces in ((1, 130), (16, 17, 98), (64, 64, 3), (1,) * 131):
        assert off(logits_of(*pieces), whole) < tolerance


def test_a_prompt_beyond_one_run_is_read_in_several(case) -> None:
    backend, reference, tolerance = case
    backend.many.rows_at_once = 24
    runner = backend.open_runner(3)
    tokens, lengths = tokens_for(runner, 3, 60, seed=7), np.array([60, 3, 31])
    runner.prefill(tokens, lengths)
    for slot, length in enumerate(lengths):
        assert off(runner.logits()[slot], reference.feed(slot, tokens[slot, :length])[-1]) < tolerance
