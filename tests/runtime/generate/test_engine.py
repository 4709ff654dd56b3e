"""Jobs join and leave a running batch; prompts are read in between; one job's end, fault or long prompt is its own."""

from __future__ import annotations

import time

import numpy as np
import pytest
from altered import with_runners

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.budget import Budget
from retnet_export.runtime.generate.engine import Engine
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.jobs import Ended, Failed, Job, Made, Read
from retnet_export.runtime.generate.sampling import log_softmax
from retnet_export.runtime.generate.speculation import History
from retnet_export.runtime.generate.stats import Stats


def alone(model, prompt, options) -> list[int]:
    session = model.session()
    session.feed(prompt)
    return list(session.generate_tokens(options))


def job(prompt, *options: Options, **about) -> Job:
    return Job(prompt, options, with_text=False, **about)


def run(engine) -> list:
    events = []
    while engine.busy:
        events += engine.turn()
    return events


def tokens(events, job, index=0) -> list[int]:
    return [event.piece.token for event in events if isinstance(event, Made) and (event.job, event.index) == (job, index)]


def test_jobs_that_come_and_go_give_what_each_gives_alone(model):
    generator = np.random.default_rng(3)
    jobs = [
        job(
            generator.integers(0, 50, generator.integers(1, 40)).tolist(),
            Options(temperature=1.2, top_k=12, repetition_penalty=1.3, seed=seed, max_new_tokens=int(generator.integers(0, 25))),
        )
        for seed in range(40)
    ]
    engine, events = Engine(model.session, 5, read_tokens=6), []
    for each in jobs:
        engine.add(each)
        for _ in range(int(generator.integers(0, 4))):
            events += engine.turn()
    events += run(engine)
    for each in jobs:
        assert tokens(events, each) == alone(model, each.tokens, each.options[0])
        assert [event.finish for event in events if isinstance(event, Ended) and event.job is each] == ["length"]


def test_while_a_long_prompt_is_read_the_others_tokens_keep_coming(model):
    engine = Engine(model.session, 3, read_tokens=4)
    first, long, short = (job([1] * count, Options(temperature=0.0, max_new_tokens=40, speculate=0)) for count in (3, 100, 3))
    engine.add(first)
    engine.turn()
    for each in (long, short):
        engine.add(each)
    order = []
    while not any(isinstance(event, Read) and event.job is long for event in order):
        events = engine.turn()
        assert len(tokens(events, first)) == 1
        order += events
        if len(tokens(order, first)) == 39:
            break
    assert next(event for event in order if isinstance(event, Read)).job is short


def test_prompts_that_fit_one_piece_are_read_whole(model):
    engine = Engine(model.session, 4, read_tokens=8)
    options = Options(temperature=0.0, max_new_tokens=40, speculate=0)
    first, *short = jobs = [job([count] * count, options) for count in (2, 7, 6, 5)]
    for each in jobs:
        engine.add(each)
        if each is first:
            engine.turn()
    events = []
    while engine.waiting or engine.reading:
        events += engine.turn()
        # Never a piece of one and a piece of another, which would leave both for the next pass.
        assert engine.reading == 0
    assert engine.stats.prompt_tokens == 20
    events += run(engine)
    for each in short:
        assert tokens(events, each) == alone(model, each.tokens, options)


def test_an_engine_whose_times_nobody_asked_for_does_not_keep_them(model):
    """A server takes millions of steps."""
    for stats, kept in ((None, 0), (Stats(), 8)):
        engine = Engine(model.session, 2, stats=stats)
        engine.add(job([3, 1, 4], Options(temperature=0.0, max_new_tokens=9, speculate=0)))
        run(engine)
        assert [len(times) for times in (engine.stats.graph_ms, engine.stats.sampling_ms, engine.stats.total_ms)] == [kept] * 3
        assert engine.stats.new_tokens == 9


def test_several_continuations_read_their_prompt_once(model):
    engine = Engine(model.session, 2)
    options = [Options(temperature=1.5, seed=seed, max_new_tokens=6) for seed in range(5)]
    several = job([4, 8, 15, 16, 23, 42], *options)
    engine.add(several)
    events = run(engine)
    assert engine.stats.prompt_tokens == 6
    for index, each in enumerate(options):
        assert tokens(events, several, index) == alone(model, several.tokens, each)


def test_a_cancelled_job_is_gone_at_the_next_turn_and_the_others_stay_as_they_are(model):
    engine = Engine(model.session, 3, read_tokens=8)
    options = Options(temperature=0.0, max_new_tokens=20)
    jobs = [job([seed, seed + 1], options) for seed in range(3)]
    waiting, reading = job([9], options), job([7] * 30_000, options)
    for each in (*jobs[:2], reading, jobs[2], waiting):
        engine.add(each)
    events = [*engine.turn(), *engine.turn()]
    assert (engine.generating, engine.reading, engine.waiting) == (2, 1, 2)
    for each in (jobs[0], reading, waiting):
        each.cancelled = True
    events += engine.turn()
    assert (engine.reading, engine.waiting) == (0, 0)
    made = len(tokens(events, jobs[0]))
    events += run(engine)
    assert len(tokens(events, jobs[0])) == made < 20
    assert not tokens(events, reading) + tokens(events, waiting)
    for each in jobs[1:]:
        assert tokens(events, each) == alone(model, each.tokens, options)


def test_a_job_at_fault_fails_alone(model):
    banned = Options(temperature=0.0, logit_bias=dict.fromkeys(range(50), -np.inf), max_new_tokens=5)
    engine, options = Engine(model.session, 3), Options(temperature=0.0, max_new_tokens=5)
    good, bad, also_good = job([1], options), job([2], options, banned), job([3], options)
    for each in (good, bad, also_good):
        engine.add(each)
    events = run(engine)
    (failure,) = (event for event in events if isinstance(event, Failed))
    assert failure.job is bad
    assert "bans every token" in str(failure.error)
    for each in (good, also_good):
        assert tokens(events, each) == alone(model, each.tokens, options)


@pytest.mark.parametrize("at", ["step", "prefill"])
def test_a_backend_that_fails_costs_those_it_failed_for_and_the_engine_goes_on(model, at):
    works = False

    def fails(runner):
        method = getattr(runner, at)

        def failing(*arguments):
            if not works:
                raise RuntimeError("out of luck")
            method(*arguments)

        setattr(runner, at, failing)

    engine, options = Engine(with_runners(model, fails).session, 2), Options(temperature=0.0, max_new_tokens=5, speculate=0)
    engine.add(lost := job([1], options))
    events = run(engine)
    assert [(event.job, type(event.error)) for event in events if isinstance(event, Failed)] == [(lost, RuntimeError)]
    works = True
    engine.add(fine := job([1], options))
    assert tokens(run(engine), fine) == alone(model, [1], options)


@pytest.mark.parametrize("method", ["read_state", "write_state"])
def test_a_backend_that_fails_between_two_passes_leaves_no_job_without_an_answer(model, method):
    """A GPU that is lost refuses every call, those that begin anew among them."""
    lost = False

    def alter(runner):
        working = getattr(runner, method)

        def failing(*arguments):
            if lost:
                raise RuntimeError("lost")
            return working(*arguments)

        setattr(runner, method, failing)

    engine, options = Engine(with_runners(model, alter).session, 2), Options(temperature=0.0, max_new_tokens=30, speculate=0)
    jobs = [job([number], options, scores=scores) for number, scores in ((1, None), (2, 1), (3, None), (4, 1))]
    for each in jobs[:-1]:
        engine.add(each)
    events = engine.turn()
    lost = True
    events += run(engine)
    engine.add(jobs[-1])
    events += run(engine)
    for each in jobs:
        results = [event for event in events if isinstance(event, (Ended, Failed)) and event.job is each]
        assert len(results) == 1
        assert isinstance(results[0], Ended) or str(results[0].error) == "lost"
    assert isinstance(results[0], Failed)
    lost = False
    engine.add(fine := job([1], options))
    assert tokens(run(engine), fine) == alone(model, [1], options)


def test_what_cannot_be_done_is_refused_before_it_waits(model):
    engine = Engine(model.session, 1)
    for bad, message in [
        (job([], Options()), "the prompt is empty"),
        (job([0, 50], Options()), "token 50 is not in the vocabulary of 50"),
        (job([1], Options(logit_bias={77: 1.0})), "logit_bias names token 77"),
        (job([1], Options(stop="x")), "stop needs text"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.add(bad)
    assert not engine.busy


def test_a_prompt_is_scored_as_single_steps_score_it(model):
    prompt, session, engine = np.random.default_rng(2).integers(0, 50, 21).tolist(), model.session(), Engine(model.session, 2)
    engine.add(asked := job(prompt, Options(temperature=0.0, max_new_tokens=3), scores=2))
    events = run(engine)
    scores = next(event for event in events if isinstance(event, Read)).scores
    assert [each.token for each in scores] == prompt
    assert scores[0].logprob is None
    for token, scored in zip(prompt[:-1], scores[1:], strict=True):
        expected = log_softmax(session.step([token])[0])
        assert scored.logprob == pytest.approx(expected[scored.token], abs=1e-5)
        assert [value for _, value in scored.top] == pytest.approx(sorted(expected)[:-3:-1], abs=1e-5)
    assert tokens(events, asked) == alone(model, prompt, asked.options[0])


@pytest.mark.parametrize("changes", [{"min_new_tokens": 4}, {"ignore_ends": True}], ids=str)
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"logprobs": 1}], ids=str)
def test_an_end_is_not_chosen_before_its_time(model, monkeypatch, changes, how):
    usual = Options(**({"seed": 1, "max_new_tokens": 12} | how))
    free = alone(model, [3], usual)
    monkeypatch.setitem(vars(model.bundle.manifest), "eos_ids", (free[1],))
    assert alone(model, [3], usual) == free[: free.index(free[1])]
    held = alone(model, [3], Options(**(vars(usual) | changes)))
    early = 4 if "min_new_tokens" in changes else 12
    assert len(held) >= early
    assert free[1] not in held[:early]


def test_prompts_are_read_for_as_long_as_the_step_took_however_short_they_are(model):
    """One for each step kept 64 clients waiting for seconds."""

    def slow(runner):
        step = runner.step
        runner.step = lambda tokens: (time.sleep(1), step(tokens))  # far longer than eight prompts take

    engine = Engine(with_runners(model, slow).session, 12, read_tokens=4)
    options = Options(temperature=0.0, max_new_tokens=40, speculate=0)
    engine.add(job([3, 1, 4], options))
    engine.turn()
    for count in range(8):
        engine.add(job([count + 1] * 4, options))
    assert sum(isinstance(event, Read) for event in engine.turn()) == 8


def test_steps_during_which_prompts_are_read_do_not_say_how_long_a_step_takes(model, monkeypatch):
    """On a GPU, whose steps go on while the next prompt is given to it, they would seem to take no time at all."""
    noted = []
    monkeypatch.setattr(Budget, "note_step", lambda self, sequences, seconds: noted.append(sequences))
    engine, options = Engine(model.session, 2, read_tokens=1), Options(temperature=0.0, max_new_tokens=30)
    engine.add(job([3, 1, 4], options))
    while not engine.generating:
        engine.turn()
    monkeypatch.setattr(History, "guesses", False)  # so that there are steps only
    engine.add(long := job([1] * 10_000, options))
    for _ in range(3):
        engine.turn()
    assert noted == []
    long.cancelled = True
    for _ in range(3):
        engine.turn()
    assert noted == [1, 1, 1]


def test_a_step_during_which_another_sequence_joins_does_not_say_how_long_a_step_takes(model, monkeypatch):
    noted, stats = [], Stats()
    monkeypatch.setattr(Budget, "note_step", lambda self, sequences, seconds: noted.append(sequences))
    monkeypatch.setattr(History, "guesses", False)
    engine = Engine(model.session, 2, stats=stats)
    engine.add(job([3, 1, 4], *(Options(temperature=0.0, max_new_tokens=count) for count in (5, 20, 20))))
    run(engine)
    assert len(noted) == len(stats.total_ms) - 1
