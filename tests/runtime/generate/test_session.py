"""A session: put aside, forked, rewound, stopped at any token; one thread at a time; never sampling from nonsense."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
from altered import with_runners

from retnet_export.runtime.backends.base import top_of
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.model import Model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
GREEDY = Options(temperature=0.0, max_new_tokens=12)
DRAWN = Options(temperature=1.5, max_new_tokens=12, seed=7)


def fed(model: Model, tokens=PROMPT, **options):
    session = model.session(**options)
    session.feed(tokens)
    return session


def written(session, options=GREEDY) -> list[int]:
    return list(session.generate_tokens(options))


def test_a_restored_snapshot_goes_on_as_if_nothing_had_happened(model):
    session = fed(model)
    snapshot = session.snapshot()
    first = written(session, DRAWN)
    session.feed([1, 2, 3])
    session.restore(snapshot)
    assert session.position == len(PROMPT)
    assert written(session, DRAWN) == first


def test_a_fork_and_its_origin_know_nothing_of_each_other(model):
    alone = written(fed(model))
    session = fed(model)
    fork = session.fork()
    fork.feed([7, 7, 7])
    assert written(session) == alone
    assert fork.position == len(PROMPT) + 3
    assert written(fork) == written(fed(model, [*PROMPT, 7, 7, 7]))


def test_a_snapshot_is_not_changed_by_what_its_session_does_next(model):
    session = fed(model)
    snapshot = session.snapshot()
    before = {name: array.copy() for name, array in snapshot.state.items()}
    written(session)
    assert all((snapshot.state[name] == array).all() for name, array in before.items())
    assert snapshot.position == len(PROMPT)


def test_rewind_goes_back_to_before_each_text_that_was_fed(model):
    session = model.session(keep=2)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        session.feed(tokens)
    session.rewind()
    assert session.position == 4
    session.rewind()
    assert session.position == 2
    with pytest.raises(UserError, match="cannot rewind by 1: 0 snapshots are kept, at most 2"):
        session.rewind()
    assert written(session) == written(fed(model, [1, 2]))


def test_a_session_that_keeps_nothing_says_so(model):
    with pytest.raises(UserError, match="keeps no snapshots: open it with keep=1"):
        fed(model).mark()


def test_positions_beyond_the_range_of_int32_are_restored_and_counted_on(model):
    session = fed(model)
    snapshot = session.snapshot()
    far = 2**31 + 5
    snapshot.state["position"][:] = far
    session.restore(snapshot)
    session.step([1])
    assert session.position == far + 1
    assert session.snapshot().position == far + 1


def test_repetition_penalty_remembers_the_prompt_through_a_snapshot(model):
    options = Options(temperature=0.0, repetition_penalty=50.0, max_new_tokens=20)
    session = fed(model)
    expected = written(session.fork(), options)
    other = model.session()
    other.restore(session.snapshot())
    assert written(other, options) == expected
    assert not set(expected) & set(PROMPT)
    assert len(set(expected)) == len(expected)


def test_generation_is_lazy_and_the_session_stands_where_it_was_closed(model):
    session = fed(model)
    tokens = session.generate_tokens(GREEDY)
    taken = [next(tokens) for _ in range(3)]
    tokens.close()
    assert session.position == len(PROMPT) + 3
    assert taken + written(session)[:4] == written(fed(model))[:7]


def test_generation_stops_before_a_stop_token(model):
    expected = written(fed(model))
    assert written(fed(model), Options(temperature=0.0, stop_tokens=[expected[4]])) == expected[: expected.index(expected[4])]


def test_log_probabilities_come_with_each_token(model):
    pieces = list(fed(model).pieces(temperature=0.0, max_new_tokens=3, logprobs=2, with_text=False))
    for piece in pieces:
        (best, value), (_, second) = piece.top
        assert best == piece.token
        assert value == piece.logprob
        assert second <= value < 0


def test_the_same_seed_gives_the_same_tokens_whether_or_not_all_logits_are_read(model):
    options = Options(temperature=1.2, top_k=6, seed=3, max_new_tokens=30)
    all_read = Options(temperature=1.2, top_k=6, seed=3, max_new_tokens=30, logprobs=0)
    assert written(fed(model), options) == written(fed(model), all_read)


def test_nothing_to_continue_is_refused_at_once(model):
    with pytest.raises(UserError, match="feed the session a prompt first"):
        model.session().generate_tokens()


def test_a_token_outside_the_vocabulary_is_refused_and_changes_nothing(model):
    session = fed(model)
    with pytest.raises(UserError, match="token 50 is not in the vocabulary of 50"):
        session.feed([1, 50])
    assert session.position == len(PROMPT)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UserError, match="prompt is empty"):
        model.session().feed([])


def test_text_needs_a_tokenizer(model):
    with pytest.raises(UserError, match="has no tokenizer"):
        model.session().feed("text")
    with pytest.raises(UserError, match="stop needs text"):
        fed(model).generate_tokens(stop="x")


def test_changing_a_session_under_a_running_generation_is_refused(model):
    session = fed(model)
    tokens = session.generate_tokens(GREEDY)
    next(tokens)
    session.feed([1])
    with pytest.raises(UserError, match="was fed, restored or reset while it was generating"):
        next(tokens)


def test_a_second_thread_on_one_session_is_refused_and_the_first_goes_on(model):
    entered, leave = threading.Event(), threading.Event()

    def waits(runner):
        step = runner.step

        def held(tokens):
            entered.set()
            assert leave.wait(10)
            step(tokens)

        runner.step = held

    session = fed(with_runners(model, waits))
    thread = threading.Thread(target=session.step, args=([1],))
    thread.start()
    assert entered.wait(10)
    for action in (lambda: session.step([2]), session.snapshot, lambda: session.feed([1]), session.reset):
        with pytest.raises(UserError, match="in use by another thread"):
            action()
    leave.set()
    thread.join(10)
    assert session.position == len(PROMPT) + 1


def test_two_sessions_of_one_model_work_in_two_threads(model):
    prompts = ([1, 2, 3], [9, 8, 7, 6, 5])
    options = Options(temperature=1.0, seed=5, max_new_tokens=150)
    expected = [written(fed(model, prompt), options) for prompt in prompts]
    results: list[list[int]] = [[], []]

    def work(index: int) -> None:
        results[index] = written(fed(model, prompts[index]), options)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_a_session_that_failed_in_a_step_says_so_until_it_is_restored(model):
    lost = True

    def fails(runner):
        step = runner.step

        def failing(tokens):
            if lost:
                raise RuntimeError("device lost")
            step(tokens)

        runner.step = failing

    session = fed(with_runners(model, fails))
    snapshot = session.snapshot()
    with pytest.raises(RuntimeError, match="device lost"):
        session.step([1])
    lost = False
    for action in (lambda: session.step([1]), session.snapshot, lambda: next(session.generate_tokens())):
        with pytest.raises(UserError, match="earlier step of this session failed"):
            action()
    session.restore(snapshot)
    assert written(session) == written(fed(model))
    lost, several = True, with_runners(model, fails).session(2)
    with pytest.raises(RuntimeError, match="device lost"):
        several.step([1, 2])
    lost = False
    with pytest.raises(UserError, match=r"call reset\(\)$"):  # one that is restored does not bring back the other
        several.restore(snapshot)
    several.reset()
    several.restore(snapshot, 1)
    np.testing.assert_array_equal(several.snapshot(1).logits, snapshot.logits)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_reported_with_step_and_layer_and_never_sampled(model, options, value):
    session = fed(model)
    snapshot = session.snapshot()
    healthy = session.fork().snapshot()
    snapshot.state["state.001"][0, 2, 3, 4] = value
    session.restore(snapshot)
    session.step([1])
    with pytest.raises(UserError, match=f"after step {len(PROMPT) + 1} are not finite .* is 'state.001', of layer 1"):
        next(session.generate_tokens(**options))
    session.restore(healthy)
    assert written(session) == written(fed(model))


def test_faults_behind_the_last_layer_are_told_from_those_in_a_state(model):
    broken = np.full((1, 50), np.nan, np.float32)

    def spoilt(runner):
        runner.logits, runner.top = lambda: broken, lambda k: top_of(broken, k)

    session = fed(with_runners(model, spoilt))
    with pytest.raises(UserError, match="every layer's state is finite, so the cause is after the last layer"):
        next(session.generate_tokens())


def test_a_batch_too_large_for_memory_is_refused_with_its_size(model):
    with pytest.raises(UserError, match="not enough memory for the state of 100000000000 sequences"):
        model.session(10**11)


def test_stats_tell_where_the_time_went(model):
    stats = Stats()
    session = model.session()
    session.feed(PROMPT, stats)
    list(session.generate_tokens(GREEDY, stats=stats))
    figures = stats.summary(model.bundle.manifest.state_bytes)
    assert figures["prompt_tokens"] == len(PROMPT)
    assert figures["new_tokens"] == 12
    assert figures["state_bytes"] == session.snapshot().bytes
    assert 0 < figures["token_ms_p50"] <= figures["token_ms_p95"] <= figures["token_ms_p99"]
    assert figures["time_to_first_token_ms"] >= 1e3 * stats.prompt_seconds
    assert figures["peak_memory_bytes"] > 1e6
    assert all(value is None for name, value in Stats().summary(1).items() if name.endswith(("_ms", "p50", "per_second")))


def test_the_first_sequences_of_a_batch_step_alone_and_another_may_move_into_a_gap(model):
    """The middle one of three leaves: the third takes its place, and goes on as a session of its own does."""
    texts, session = ([3, 1, 4], [1, 5], [9, 2, 6, 5]), model.session(3)
    alone = []
    for slot, text in enumerate(texts):
        alone.append(model.session())
        alone[slot].feed(text)
        session.restore(alone[slot].snapshot(), slot)
    session.advance([7, 8, 9])
    session.move(2, 1)
    moved = alone[2].fork()
    np.testing.assert_allclose(session.snapshot(1).logits, moved.step([9])[0], atol=1e-5)
    session.advance([10, 11])
    logits = session.prefill(np.array([[12, 13], [14, 0]]), np.array([2, 1]))
    for slot, (one, fed) in enumerate([(alone[0], [7, 10, 12, 13]), (alone[2], [9, 11, 14])]):
        one.feed(fed)
        np.testing.assert_allclose(logits[slot], one.logits[0], atol=1e-5)
        np.testing.assert_array_equal(session.snapshot(slot).read, one.snapshot().read)
        assert session.snapshot(slot).tail == one.tail


def test_a_continuation_follows_its_sequence_to_another_slot(model):
    session, one = model.session(2), model.session()
    one.feed([3, 1, 4])
    options = Options(temperature=0.0, repetition_penalty=3.0, max_new_tokens=12, speculate=0)
    expected = list(one.fork().generate_tokens(options))
    for slot in (0, 1):
        session.restore(one.snapshot(), slot)
    loop, made = session.loop(), []
    first, second = (loop.begin(session.continuation(options, False, slot), slot) for slot in (0, 1))
    rows = [first, second]
    for count in range(12):
        if count == 3:
            session.move(1, 0)
            rows = [second]
        pieces = [loop.choose(running, slot) for slot, running in enumerate(rows)]
        made.append(pieces[-1].token)
        loop.advance(rows)
    assert made == expected


def test_a_session_that_is_let_go_frees_its_state_at_once(model):
    """Not when Python next collects cycles: until then the memory of a GPU would be full of states that nobody uses."""
    runners = []
    watched = with_runners(model, lambda runner: runners.append(weakref.ref(runner)))
    gc.collect()
    gc.disable()
    try:
        session = watched.session()
        session.feed(PROMPT)
        written(session)
        half = session.generate_tokens(GREEDY)
        next(half)
        session.snapshot()
        del session, half
        list(watched.generate_many([PROMPT, PROMPT[:3]], GREEDY, batch=2))
        assert len(runners) > 1
        assert [runner for runner in runners if runner() is not None] == []
    finally:
        gc.enable()
