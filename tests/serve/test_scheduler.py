"""Many clients of one engine: each gets its own text, the queue is bounded, and whoever goes away frees a slot."""

from __future__ import annotations

import queue
import random
import threading

import pytest

from retnet_export.runtime.device import cuda
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate import jobs
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.jobs import Ended, Failed, Job, Made
from retnet_export.serve.metrics import Metrics
from retnet_export.serve.runs import failure
from retnet_export.serve.scheduler import BusyError, ClosedError, Scheduler


@pytest.fixture
def scheduler(model):
    scheduler = Scheduler(model, slots=3, queue=5)
    yield scheduler
    scheduler.close()


def job(prompt, **options) -> Job:
    return Job(prompt, [Options(**({"temperature": 0.0, "max_new_tokens": 8} | options))], with_text=False)


def collect(events) -> list[int]:
    """Tokens up to the end of one job."""
    tokens = []
    while not isinstance(event := events.get(timeout=60), (Ended, Failed)):
        if isinstance(event, Made):
            tokens.append(event.piece.token)
    assert isinstance(event, Ended), event.error
    return tokens


def alone(model, job) -> list[int]:
    session = model.session()
    session.feed(job.tokens)
    return list(session.generate_tokens(job.options[0]))


def test_clients_in_threads_of_their_own_get_what_each_would_get_alone(model):
    scheduler, jobs, results = Scheduler(model, slots=3), [job([seed, 1], seed=seed, temperature=1.3) for seed in range(20)], {}

    def ask(each):
        events = queue.Queue()
        scheduler.submit([each], events.put)
        results[each] = collect(events)

    threads = [threading.Thread(target=ask, args=(each,)) for each in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in jobs:
        assert results[each] == alone(model, each)
    assert scheduler.close()


def test_beyond_the_queue_there_is_no_room_until_somebody_is_done(scheduler):
    events = queue.Queue()
    long = [job([1], max_new_tokens=10**9) for _ in range(8)]
    tickets = scheduler.submit(long, events.put)
    with pytest.raises(BusyError, match="try again in") as refusal:
        scheduler.submit([job([1])], events.put)
    assert 1 <= refusal.value.retry_after <= 60
    with pytest.raises(UserError, match="9 texts in one request, this server takes at most 8"):
        scheduler.submit([job([1]) for _ in range(9)], events.put)
    scheduler.cancel(tickets[:6])
    collect(finished(scheduler, job([2])))


def test_every_token_of_every_answer_is_counted(model):
    metrics, events = Metrics(), queue.Queue()
    scheduler = Scheduler(model, slots=2, observer=metrics)
    scheduler.submit([Job([1, 2], [Options(max_new_tokens=count) for count in (4, 5, 6)], with_text=False)], events.put)
    for _ in range(3):
        collect(events)
    assert scheduler.close()
    assert b"retnet_generated_tokens_total 15.0" in metrics.text()


def finished(scheduler, job) -> queue.Queue:
    events = queue.Queue()
    scheduler.submit([job], events.put)
    return events


def test_a_thousand_that_go_away_at_random_leave_no_slot_taken(model, scheduler):
    dice, held = random.Random(1), []
    for _ in range(1000):
        try:
            held += scheduler.submit([job([dice.randrange(50)] * dice.randrange(1, 30), max_new_tokens=50)], lambda event: None)
        except BusyError:
            dice.shuffle(held)
            for _ in range(dice.randrange(1, 8)):
                scheduler.cancel([held.pop()] if held else [])
    scheduler.cancel(held)
    expected = job([7, 8, 9])
    assert collect(finished(scheduler, expected)) == alone(model, expected)
    # There is room for as many as at first.
    scheduler.cancel(scheduler.submit([job([1], max_new_tokens=50) for _ in range(scheduler.most)], lambda event: None))
    assert collect(finished(scheduler, expected)) == alone(model, expected)
    assert scheduler.load.waiting == scheduler.load.reading == scheduler.load.generating == 0


def test_closing_waits_for_what_runs_and_cuts_off_what_takes_too_long(model):
    scheduler = Scheduler(model, slots=2)
    short = finished(scheduler, job([1], max_new_tokens=30))
    assert scheduler.close(60)
    assert len(collect(short)) == 30
    with pytest.raises(ClosedError):
        scheduler.submit([job([1])], print)
    scheduler = Scheduler(model, slots=2)
    endless = finished(scheduler, job([1], max_new_tokens=10**9))
    assert not scheduler.close(0.2)
    *_, last = list(endless.queue)
    assert isinstance(last, Failed)
    assert "shutting down" in str(last.error)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("top_k is -1"), 400),
        (RuntimeError("a bug"), 500),
        (cuda.CudaMemoryError("the GPU has no memory for 8 bytes"), 500),
        (cuda.failure("cudaStreamSynchronize", "cudaErrorLaunchFailure", "unspecified launch failure"), 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_a_request_asks_for_is_the_requests_fault(error, status, caplog):
    told = failure(error)
    assert told.status == status
    assert (str(error) in told.message) == isinstance(error, UserError)
    jobs.failure(job([1]), error)
    assert bool(caplog.records) == (status == 500)


def test_a_listener_that_fails_ends_its_own_job_only(model, scheduler):
    def bad(event):
        raise ValueError("I do not listen")

    scheduler.submit([job([1], max_new_tokens=10**9)], bad)
    expected = job([4, 5])
    assert collect(finished(scheduler, expected)) == alone(model, expected)
