"""Guessing ahead changes the time and nothing else: whatever is guessed, the same seed gives the same text and the same state."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from altered import with_runners
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet_export.runtime.backends.base import Checking, PassCost
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate import loop, sequences
from retnet_export.runtime.generate.batching import Prompt
from retnet_export.runtime.generate.budget import FIRST, SHARE, Budget
from retnet_export.runtime.generate.generation import Continuation, Options
from retnet_export.runtime.generate.speculation import HISTORY, ORDERS, History, plan_drafts
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.numerics import TOLERANCES, measure

REPEATING = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]
PATTERN = "One apple, two apples. One pear, two pears. One plum, two plums. One"
FREE, CHEAP, DEAR = PassCost(0.0, 0.0), PassCost(0.3, 0.12), PassCost(4.0, 2.0)

SAMPLINGS = st.builds(
    Options,
    temperature=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.2, -0.3]),
    logit_bias=st.sampled_from([{}, {5: 2.0, 7: float("-inf")}]),
    logprobs=st.sampled_from([None, 0, 3]),
    stop_tokens=st.sampled_from([(), (11,), (3, 17)]),
    max_new_tokens=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)


def length(cost, chances):
    """How many tokens a pass drafts, if one token of each sequence waits."""
    return plan_drafts(cost, chances, [1] * len(chances), undoes=False).length


def fed(model, prompt):
    session = model.session()
    session.feed(prompt)
    return session


def outcome(model, prompt, options):
    """Everything that a generation leaves behind."""
    session = fed(model, prompt)
    generation = session.pieces(options, with_text=isinstance(prompt, str))
    pieces = list(generation)
    return pieces, generation.finish, generation.ended_by, session.snapshot()


def assert_same(found, expected):
    assert [(piece.token, piece.text) for piece in found[0]] == [(piece.token, piece.text) for piece in expected[0]]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert found[1:3] == expected[1:3]
    assert_same_place(found[3], expected[3])


def assert_same_place(ours: Snapshot, theirs: Snapshot):
    assert (ours.position, ours.tail, ours.unread) == (theirs.position, theirs.tail, theirs.unread)
    np.testing.assert_array_equal(ours.read, theirs.read)
    np.testing.assert_array_equal(ours.history, theirs.history)
    for name, value in theirs.state.items():
        assert name == "position" or measure(ours.state[name], value).relative < TOLERANCES["chunkwise-float32"].relative
    assert measure(ours.logits, theirs.logits).relative < TOLERANCES["onnxruntime-float32"].relative


@settings(deadline=None, max_examples=120)
@given(options=SAMPLINGS, speculate=st.sampled_from([1, 2, 5, 16, None]))
def test_the_same_seed_gives_the_same_text_and_state(model, options, speculate):
    expected = outcome(model, REPEATING, replace(options, speculate=0))
    assert_same(outcome(model, REPEATING, replace(options, speculate=speculate)), expected)


@settings(deadline=None, max_examples=40)
@given(options=SAMPLINGS, draws=st.integers(0, 2**32))
def test_whatever_is_guessed_the_text_is_the_same(model, options, draws):
    expected = outcome(model, REPEATING, replace(options, speculate=0))
    random = np.random.default_rng(draws)
    tokens = [piece.token for piece in expected[0] if piece.token is not None]

    def guess(self, count):
        """The truth, up to a place where it goes wrong."""
        count = int(random.integers(0, count + 1))
        start = len(self.tokens) - len(REPEATING)
        right = tokens[start : start + count]
        place = int(random.integers(0, count + 1))
        return [*right[:place], *random.integers(0, 50, count - len(right[:place])).tolist()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History, "chances", lambda self, most: [1.0] * most)
        patch.setattr(History, "expected", guess)
        assert_same(outcome(model, REPEATING, replace(options, speculate=7)), expected)


@settings(deadline=None, max_examples=25)
@given(
    temperature=st.sampled_from([0.0, 0.4, 0.8]),
    stop=st.sampled_from([(), ("plum",), (" two", "pears."), (".",), ("e, t",)]),
    speculate=st.sampled_from([3, 16, None]),
    seed=st.integers(0, 2**32),
)
def test_stop_strings_end_it_at_the_same_place(writer, temperature, stop, speculate, seed):
    options = Options(temperature=temperature, top_p=0.95, stop=stop, max_new_tokens=40, seed=seed, speculate=0)
    assert_same(outcome(writer, PATTERN, replace(options, speculate=speculate)), outcome(writer, PATTERN, options))


def test_a_text_that_repeats_itself_takes_fewer_passes(model):
    texts = {}
    for speculate in (0, 8):
        session, stats = fed(model, REPEATING), Stats()
        options = Options(temperature=0.0, max_new_tokens=200, speculate=speculate)
        texts[speculate] = list(session.generate_tokens(options, stats=stats)), stats
    (plain, without), (guessed, stats) = texts.values()
    assert plain == guessed
    assert (without.drafted, without.accepted, len(without.total_ms)) == (0, 0, 200)
    assert stats.new_tokens == stats.accepted + len(stats.total_ms) == 200
    assert stats.accepted > 25
    assert stats.summary(1)["accepted"] == stats.accepted


@settings(deadline=None, max_examples=30)
@given(
    taken=st.integers(0, 24),
    then=st.sampled_from(["snapshot", "feed", "step", "score", "generate", "fork"]),
    seed=st.integers(0, 99),
)
def test_a_session_stands_where_the_text_does_after_any_piece(model, taken, then, seed):
    snapshots = []
    for speculate in (0, 6):
        session = fed(model, REPEATING)
        pieces = session.generate_tokens(temperature=0.2, seed=seed, max_new_tokens=24, speculate=speculate)
        for _ in range(taken):
            next(pieces)
        assert session.position == len(REPEATING) + taken
        if then == "feed":
            session.feed([7, 8, 9])
        elif then == "step":
            session.step([7])
        elif then == "generate":
            list(session.generate_tokens(temperature=0, max_new_tokens=5, speculate=speculate))
        elif then == "score":
            session.score(np.array([[7, 8, 9]]))
        elif then == "fork":
            session = session.fork()
        snapshots.append(session.snapshot())
        if then == "snapshot":  # which does not disturb the generation
            list(pieces)
            snapshots.append(session.snapshot())
    half = len(snapshots) // 2
    for ours, theirs in zip(snapshots[half:], snapshots[:half], strict=True):
        assert_same_place(ours, theirs)


@pytest.mark.parametrize("then", ["generate", "logits", "snapshot"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_session_goes_on_where_it_stands_after_something_came_in_the_way_of_a_pass(model, monkeypatch, at, then):
    """A KeyboardInterrupt, say, after a token was chosen and before it was read."""
    expected = list(fed(model, REPEATING).generate_tokens(temperature=0, max_new_tokens=20, speculate=0))
    session, waiting, calls = fed(model, REPEATING), sequences.Sequences.waiting, itertools.count(1)

    def interrupted(self, count):
        if next(calls) == at:
            raise KeyboardInterrupt
        return waiting(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(sequences.Sequences, "waiting", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.generate_tokens(temperature=0, max_new_tokens=20, speculate=4))
    made = session.position - len(REPEATING)
    assert made >= at
    if then == "logits":
        assert session.logits[0].argmax() == expected[made]
    elif then == "snapshot":
        assert session.snapshot().logits.argmax() == expected[made]
    assert next(session.generate_tokens(temperature=0)) == expected[made]


def test_a_trial_that_cannot_be_undone_leaves_no_state_to_go_on_from(model, monkeypatch):
    def alter(runner):
        def failing():
            raise RuntimeError("no")

        runner.undo = failing

    monkeypatch.setattr(History, "chances", lambda self, most: [1.0] * most)
    monkeypatch.setattr(History, "expected", lambda self, count: [49] * count)
    session = fed(with_runners(model, alter), REPEATING)
    with pytest.raises(RuntimeError, match="no"):
        list(session.generate_tokens(temperature=0, max_new_tokens=20, speculate=4))
    with pytest.raises(UserError, match="state is unknown"):
        session.step([1])
    session.reset()
    session.feed(REPEATING)
    assert next(session.generate_tokens(temperature=0)) == next(fed(model, REPEATING).generate_tokens(temperature=0))


def test_the_history_is_saved_with_the_state_and_bounded(model, tmp_path):
    session = fed(model, REPEATING * (HISTORY // len(REPEATING) + 2))
    session.snapshot().save(tmp_path / "it.state")
    loaded = Snapshot.load(tmp_path / "it.state")
    assert len(loaded.history) == HISTORY
    again = model.session()
    again.restore(loaded)
    stats = Stats()
    list(again.generate_tokens(temperature=0, max_new_tokens=20, speculate=4, stats=stats))
    assert stats.drafted > 0
    np.testing.assert_array_equal(again.snapshot().history[:-20], loaded.history[20:])


PROMPTS = [REPEATING, [1, 2, 3], REPEATING[5:], [9] * 12, [4, 4, 7, 4, 4, 7, 4, 4], list(range(30)), REPEATING * 3]


@settings(deadline=None, max_examples=30)
@given(options=SAMPLINGS, batch=st.integers(1, 4), speculate=st.sampled_from([1, 6, 16, None]))
def test_many_prompts_get_the_same_texts(model, options, batch, speculate):
    stats = Stats()
    expected = list(model.generate_many(PROMPTS, replace(options, speculate=0), batch=batch))
    found = list(model.generate_many(PROMPTS, replace(options, speculate=speculate), batch=batch, stats=stats))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.tokens, ours.finish) == (theirs.tokens, theirs.finish)
    assert stats.new_tokens == sum(len(completion.tokens) for completion in found)


def test_sequences_of_one_batch_may_guess_or_not(model):
    prompts = [(REPEATING, 0), (REPEATING, 9), ([4, 4, 7] * 4, 2), ([1, 2], None)]

    def texts(speculate):
        many = [
            Prompt(text, temperature=0.2, seed=1, max_new_tokens=30, speculate=own if speculate else 0) for text, own in prompts
        ]
        return [completion.tokens for completion in model.generate_many(many, batch=3)]

    assert texts(True) == texts(False)


def test_a_number_below_zero_is_refused():
    with pytest.raises(UserError, match="speculate is -1, expected 0 or more"):
        Options(speculate=-1)


@settings(max_examples=200)
@given(tokens=st.lists(st.integers(0, 3), max_size=60), most=st.integers(0, 9))
def test_a_draft_is_what_followed_the_longest_run_the_last_time(tokens, most):
    history = History(tokens)
    draft = history.expected(length(FREE, [history.chances(most)]))
    places = next(
        (
            found
            for order in ORDERS
            if (found := [end for end in range(order, len(tokens)) if tokens[end - order : end] == tokens[len(tokens) - order :]])
        ),
        [],
    )
    if not places or not most:
        assert draft == []
        return
    assert 0 < len(draft) <= most
    line = tokens + draft  # which repeats itself where the draft reaches its own beginning
    assert draft == [line[places[-1] + offset] for offset in range(len(draft))]


def test_nothing_is_drafted_where_guesses_fail_and_much_where_they_hold():
    random, cost = np.random.default_rng(0), PassCost(0.5, 0.13)
    wild, tame = History(), History()
    wild.watched = tame.watched = True
    for index, token in enumerate(random.integers(0, 6, 600).tolist()):
        wild.note(token)
        tame.note(index % 7)
    assert length(cost, [wild.chances(16)]) == 0
    assert length(cost, [tame.chances(16)]) == 16
    assert tame.expected(16) == [(600 + index) % 7 for index in range(16)]
    assert length(cost, [tame.chances(16), *[[]] * 7]) == 0  # eight rows as wide as one draft cost more than it brings
    assert length(cost, [tame.chances(16)] * 2) > 0


def test_a_passage_goes_on_behind_a_word_that_was_replaced():
    passage = list(range(40))
    history = History([*passage, *passage[:20]])
    history.watched = True
    history.note(20)
    history.note(99)  # instead of 21
    assert history.expected(4) == [22, 23, 24, 25]
    for token in (22, 23, 98, 97, 26):  # two words in a row, and on
        history.note(token)
    assert history.expected(3) == [27, 28, 29]
    for token in (90, 91, 92, 93):
        history.note(token)
    assert history.expected(3) == []


def test_a_draft_ends_where_the_line_before_had_a_surprise():
    """Lines that count: what follows a number is known, and the number is not."""
    history = History()
    history.watched = True
    for number in range(30):
        for token in (1, 2, 3, 4, 5, 6, 7, 100 + number):
            history.note(token)
    history.note(1)
    drafted = length(CHEAP, [history.chances(16)])
    assert history.expected(drafted) == [2, 3, 4, 5, 6, 7]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_history_is_the_last_tokens_however_they_came(data):
    history, tokens = History(), []
    history.watched = True
    for _ in range(data.draw(st.integers(1, 12))):
        part = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 9, data.draw(st.integers(1, 2000))).tolist()
        if len(part) % 2:
            history.extend(part)
        else:
            for token in part[:300]:
                history.note(token)
            history.extend(part[300:])
        tokens += part
    np.testing.assert_array_equal(history.tokens, tokens[-HISTORY:])


def test_a_history_does_not_grow_with_the_text():
    history, sizes = History(), []
    history.watched = True
    for token in np.random.default_rng(0).integers(0, 9, 8 * HISTORY).tolist():
        history.note(token)
        sizes.append(len(pickle.dumps(history)) if len(sizes) % HISTORY == 0 else 0)
    assert max(sizes) < 1.1 * max(sizes[: 4 * HISTORY])


@settings(max_examples=300)
@given(
    shares=st.lists(st.sampled_from([0.2, 0.5, 0.8, 0.95, 1.0]), min_size=1, max_size=12),
    waiting=st.integers(1, 12),
)
def test_as_many_guesses_enter_the_state_on_trial_as_leave_least_to_read_again(shares, waiting):
    chances = list(itertools.accumulate(shares, lambda first, then: first * then))
    plan = plan_drafts(FREE, [chances], [waiting], undoes=True)
    ends = [first - then for first, then in itertools.pairwise([1.0, *chances[: plan.length], 0.0])]  # after so many right ones

    def again(on_trial):
        return sum(share * (right - on_trial if right >= on_trial else waiting + right) for right, share in enumerate(ends))

    best = min(map(again, range(plan.length + 1)))
    assert again(plan.on_trial) == pytest.approx(best)
    assert plan_drafts(FREE, [chances], [waiting], undoes=False).on_trial == 0


class Clock:
    """A clock that runners move: a step takes 1, a pass over n tokens as much as `cost` says. It counts the tokens, too."""

    def __init__(self, cost: PassCost) -> None:
        self.cost, self.now, self.tokens = cost, 0.0, 0

    def alter(self, runner) -> None:
        def timed(method, *arguments):
            width = arguments[0].shape[1] if arguments[0].ndim == 2 else 0
            self.tokens += width or 1
            self.now += 1 + (self.cost.surplus(1, width) if width else 0.0)
            return method(*arguments)

        for name in ("step", "score", "score_on_trial", "prefill"):
            setattr(runner, name, partial(timed, getattr(runner, name)))


@pytest.fixture
def dictate(model, monkeypatch):
    """Lets a session write given tokens, 400 at a time, in a time that the costs of passes say."""

    if not isinstance(model.backend, Checking):
        pytest.skip("this backend makes no drafts unless they are asked for")

    def dictated(cost: PassCost, tokens: Iterable[int], times=1) -> list[tuple[float, int]]:
        """How long each took, in steps, and how many tokens went through the model."""
        clock, text, found = Clock(cost), iter(tokens), []
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        monkeypatch.setattr(Continuation, "choose", lambda self, view: next(text))
        session = fed(with_runners(model, clock.alter), REPEATING)
        for _ in range(times):
            clock.now, clock.tokens = 0.0, 0
            assert len(list(session.generate_tokens(max_new_tokens=400))) == 400
            found.append((clock.now, clock.tokens))
        return found

    return dictated


CYCLE = (7, 3, 9, 4, 1, 1, 8)


@pytest.mark.parametrize("cost", [PassCost(0.0, 0.05), CHEAP, PassCost(1.0, 0.06), DEAR], ids=str)
@pytest.mark.parametrize("sure", [0.95, 1.0])
def test_drafts_that_always_fail_cost_next_to_nothing_whatever_a_pass_takes(model, monkeypatch, dictate, cost, sure):
    """Even if every guess is wrong and thought to be right, and what the backend says of its costs is wrong, too."""
    monkeypatch.setattr(History, "chances", lambda self, most: [sure**place for place in range(1, 1 + most)])
    monkeypatch.setattr(History, "expected", lambda self, count: [49] * count)
    first, second = dictate(cost, itertools.cycle(CYCLE), times=2)
    last = cost.surplus(1, 17) + cost.surplus(1, 2)  # what the last draft costs, which the rest of the text has yet to earn
    assert 400 < first[0] < 400 * (1 + SHARE) + FIRST + last
    assert second[0] < 400 * (1 + SHARE) + last


def test_drafts_that_come_true_but_take_longer_than_steps_are_given_up(dictate):
    first, second = dictate(DEAR, itertools.cycle(CYCLE), times=2)
    assert 400 < first[0] < 400 + 2 * DEAR.surplus(1, 17)
    assert second[0] < 400 * (1 + SHARE) + DEAR.surplus(1, 17)


def test_a_text_that_repeats_itself_is_written_in_less_than_half_the_time(dictate):
    ((took, _),) = dictate(CHEAP, itertools.cycle(CYCLE))
    assert took < 400 / 2


def test_what_came_true_on_trial_is_read_once(monkeypatch, dictate):
    ((_, tokens),) = dictate(CHEAP, itertools.cycle(CYCLE))
    assert 400 <= tokens < 420
    monkeypatch.setattr(sequences, "Undoing", type(None))  # no runner is one
    ((_, tokens),) = dictate(CHEAP, itertools.cycle(CYCLE))
    assert tokens > 650


def test_a_step_that_someone_disturbed_does_not_ruin_a_session():
    budget = Budget()
    for index in range(60):
        budget.note_step(1, 50.0 if index % 20 == 3 else 1.0)
    before = budget.credit(1)
    assert before == pytest.approx(FIRST + 60 * SHARE)
    budget.note_pass(1, 1.6, 0.5)
    assert before - budget.credit(1) == pytest.approx(0.6, abs=0.2)
    before = budget.credit(1)
    budget.note_pass(1, 100.0, 0.5)
    assert before - budget.credit(1) == pytest.approx(2.0)
    budget.note_pass(1, 41.0, 0.5)  # again: so that is what it takes
    assert before - budget.credit(1) == pytest.approx(42.0, abs=4)
    assert Budget().credit(1) == 0.0  # before a step was measured


def test_where_nothing_is_read_again_drafts_are_longer():
    chances = [0.9**n for n in range(1, 16)]
    kept, again = (plan_drafts(PassCost(0.3, 0.2, again=each), [chances], [1], undoes=False).length for each in (False, True))
    assert kept > again > 0
    wild = [0.3**n for n in range(1, 16)]
    lengths = [plan_drafts(PassCost(0.65, 0.075, again=False), [wild], [waiting], undoes=False).length for waiting in (1, 12)]
    assert lengths[0] == 0 < lengths[1]  # what came true has to enter the state anyway, at the price of a pass
