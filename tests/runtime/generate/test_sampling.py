"""Sampling against its definition: which tokens may be drawn, how often each is, and on what the draw depends."""

from __future__ import annotations

import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from retnet_export.commands.sampling import FLAGS
from retnet_export.runtime.backends.base import top_of
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import OptionChanges, Options
from retnet_export.runtime.generate.sampling import Row, Sampler, Sampling, drawn, log_softmax, nucleus

LOGITS = np.array([1.5, -0.3, 2.0, 0.1, 2.0, -4.0, 0.9, 1.1], np.float32)
"""Small enough to write the distribution down; two equal largest logits."""

DRAWS = 20_000
CRITICAL = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}
"""The chi-square that a right sampler exceeds once in a thousand runs, by degrees of freedom; the seeds are fixed."""


def definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution (V,) in float64, by the words of `Sampling`, one token after another."""
    probability = np.exp(logits.astype(np.float64) / sampling.temperature)
    probability /= probability.sum()
    by_rank = sorted(range(len(logits)), key=lambda token: (-probability[token], token))
    kept = by_rank[: sampling.top_k or None]
    total = sum(probability[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        nucleus.append(token)
        reached += probability[token] / total
        if reached >= sampling.top_p:
            break
    kept = [token for token in nucleus if probability[token] >= sampling.min_p * probability[nucleus[0]]]
    expected = np.zeros(len(logits))
    expected[kept] = probability[kept]
    return expected / expected.sum()


def sampler(size: int = len(LOGITS), read: tuple[int, ...] = (), **options: object) -> Sampler:
    return Sampler(Sampling(**options), np.bincount(np.array(read, np.int64), minlength=size).astype(np.int32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_tokens_are_drawn_as_often_as_the_definition_says(options):
    expected = definition(LOGITS, Sampling(**options))
    drawer = sampler(seed=11, **options)
    counts = np.bincount([drawer.choose(Row(LOGITS)) for _ in range(DRAWS)], minlength=len(LOGITS))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - DRAWS * expected)[possible] ** 2 / (DRAWS * expected[possible])).sum()
    assert chi_square < CRITICAL[int(possible.sum()) - 1]


@given(
    arrays(np.float32, st.integers(2, 400), elements=st.floats(-20, 20, width=32)),
    st.floats(0.01, 0.99),
)
@settings(max_examples=150, deadline=None)
def test_the_nucleus_is_the_smallest_set_of_largest_weights_that_reaches_p(logits, top_p):
    weights = np.exp(logits - logits.max())
    kept = nucleus(weights, top_p)
    share = weights[kept].sum(dtype=np.float64) / weights.sum(dtype=np.float64)
    assert (np.diff(kept) > 0).all()
    assert share >= top_p * (1 - 1e-12)
    smallest = weights[kept].min()
    assert (share * weights.sum(dtype=np.float64) - smallest) / weights.sum(dtype=np.float64) < top_p * (1 + 1e-12)
    left = np.setdiff1d(np.arange(len(weights)), kept)
    assert (weights[left] <= smallest).all()
    assert all(token > kept[weights[kept] == smallest].max() for token in left[weights[left] == smallest])


@given(
    arrays(np.float32, st.integers(2, 60), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0])),
    st.integers(1, 60),
)
@settings(max_examples=100, deadline=None)
def test_the_largest_logits_come_in_order_and_equal_ones_by_token(logits, k):
    tokens, values = top_of(logits[None], min(k, len(logits)))
    expected = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:k]
    assert tokens[0].tolist() == expected
    assert values[0].tolist() == logits[expected].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([0.0, 0.5, 4.0]))
@settings(max_examples=50, deadline=None)
def test_the_largest_of_a_whole_vocabulary_are_those_of_a_sort(seed, k, spread):
    # A spread of 0.5 rounds to some five values, so that many are equal.
    logits = np.round(np.random.default_rng(seed).normal(0, spread, 5_003)).astype(np.float32)
    tokens, values = top_of(logits[None], k)
    expected = np.argsort(-logits, kind="stable")[:k]
    assert tokens[0].tolist() == expected.tolist()
    assert values[0].tolist() == logits[expected].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 1_000), st.sampled_from([0.0, 0.5, 0.99]))
@settings(max_examples=100, deadline=None)
def test_a_draw_is_where_the_sum_of_weights_exceeds_the_share(seed, count, zeros):
    dice = np.random.default_rng(seed)
    weights = dice.random(count).astype(np.float32) * (dice.random(count) >= zeros)
    weights[dice.integers(count)] = 1.0
    cumulative = np.cumsum(weights, dtype=np.float64)
    for share in (0.0, dice.random(), np.nextafter(1.0, 0.0)):
        place = drawn(weights, share)
        assert weights[place] > 0
        # In exact numbers it is the first place beyond; sums over blocks round otherwise in their last bits.
        assert cumulative[place] > share * cumulative[-1] * (1 - 1e-12)
        assert cumulative[place] - weights[place] <= share * cumulative[-1] * (1 + 1e-12)


class OnlyTop(Row):
    """As a backend: it would cost to bring all logits to the host."""

    def all(self):
        raise AssertionError("all logits were asked for")


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_k": 5}, {"top_k": 5, "top_p": 0.7, "min_p": 0.2}])
def test_the_choice_is_the_same_from_all_logits_and_from_the_backends_largest(options):
    rows = np.random.default_rng(5).integers(-3, 4, (200, 30)).astype(np.float32)
    whole, largest = sampler(30, seed=2, logit_bias={0: 0.0}, **options), sampler(30, seed=2, **options)
    for row in rows:
        assert whole.choose(Row(row)) == largest.choose(OnlyTop(row))


def test_rounding_in_the_logits_does_not_change_the_text():
    generator = np.random.default_rng(8)
    rows = generator.standard_normal((500, 1000)).astype(np.float32)
    noisy = rows + generator.standard_normal(rows.shape).astype(np.float32) * 1e-6
    one, other = (sampler(1000, seed=4, temperature=0.8, top_p=0.95) for _ in range(2))
    differ = sum(one.choose(Row(a)) != other.choose(Row(b)) for a, b in zip(rows, noisy, strict=True))
    assert differ <= 1


def test_the_seed_decides_the_draws():
    drawn = [[sampler(seed=seed).choose(Row(LOGITS)) for _ in range(1)] + [seed] for seed in (1, 1)]
    assert drawn[0] == drawn[1]
    drawers = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    streams = {tuple(drawer.choose(Row(LOGITS)) for _ in range(40)) for drawer in drawers}
    assert len(streams) == 2


def test_greedy_takes_the_first_of_equal_logits():
    assert sampler(temperature=0.0).choose(Row(LOGITS)) == 2


def test_repetition_penalty_weakens_tokens_that_were_read_whatever_their_sign():
    logits = np.array([2.0, 1.9, -0.5, -0.6], np.float32)
    assert sampler(4, read=(0,), temperature=0.0, repetition_penalty=1.2).choose(Row(logits)) == 1
    negative = np.array([-0.5, -0.55, -9.0, -9.0], np.float32)
    assert sampler(4, read=(0,), temperature=0.0, repetition_penalty=1.2).choose(Row(negative)) == 1


def test_presence_counts_once_and_frequency_every_time():
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    presence, frequency = sampler(3, temperature=0.0, presence_penalty=0.8), sampler(3, temperature=0.0, frequency_penalty=0.8)
    assert [presence.choose(Row(logits)) for _ in range(4)] == [0, 0, 0, 0]
    assert [frequency.choose(Row(logits)) for _ in range(4)] == [0, 0, 1, 0]


def test_penalties_of_generated_tokens_do_not_look_at_the_prompt():
    logits = np.array([2.0, 1.9], np.float32)
    assert sampler(2, read=(0, 0, 0), temperature=0.0, presence_penalty=1.0, frequency_penalty=1.0).choose(Row(logits)) == 0


def test_bias_moves_a_token_and_minus_infinity_bans_it():
    assert sampler(temperature=0.0, logit_bias={5: 7.0}).choose(Row(LOGITS)) == 5
    banned = sampler(seed=3, logit_bias={2: -np.inf, 4: -np.inf})
    assert not {2, 4} & {banned.choose(Row(LOGITS)) for _ in range(2000)}


def test_banning_every_token_is_refused():
    with pytest.raises(UserError, match="bans every token"):
        sampler(2, logit_bias={0: -np.inf, 1: -np.inf}).choose(Row(np.zeros(2, np.float32)))


def test_log_probabilities_are_those_of_the_model_itself():
    expected = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert np.abs(log_softmax(LOGITS) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1, expected 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"min_p": 1.5}, "min_p is 1.5, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected more than 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has -1=1.0"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias has 1=nan"),
        ({"logit_bias": {8: 1.0}}, "logit_bias names token 8, the vocabulary has 8"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        sampler(**options)


def test_every_option_can_be_given_by_name():
    hints = typing.get_type_hints(OptionChanges)
    assert hints == typing.get_type_hints(Options)
    assert set(FLAGS) == set(hints) - {"logprobs"}
