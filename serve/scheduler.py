"""One engine for many clients: a thread that runs it, a bounded queue in front, and a ticket for each who waits.

Rule: nothing here knows of HTTP. Whoever submits jobs gets their events by a callback, in the scheduler's thread, and must not
hold it up; a ticket that is cancelled frees its slot at the next token.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.engine import READ_TOKENS, Engine
from retnet_export.runtime.generate.jobs import Cache, Ended, Event, Failed, Job, Made, Read

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model

logger = logging.getLogger(__name__)

Listener = Callable[[Event], None]


class BusyError(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"the queue is full; try again in {retry_after} s")


class ClosedError(Exception):
    """The scheduler takes no more jobs: it is about to end."""


class Observer(Protocol):
    """Hears what happens, for measurements."""

    def read(self, tokens: int, cached: int) -> None:
        """A prompt was read, a part of it from the cache."""

    def first_token(self, seconds: float) -> None:
        """A job gave its first token, so long after it was submitted."""

    def token(self, seconds: float | None) -> None:
        """A sequence gave a token, so long after the one before; None if it is the first of a further answer."""

    def ended(self, result: str, tokens: int) -> None:
        """A job is over: "done", "failed" or "cancelled"."""


@dataclass(eq=False)
class Ticket:
    """A job that was submitted.

    Attributes:
        job: the job.
        listener: hears its events.
        submitted: by the clock of `time.perf_counter`.
        open: continuations that have not ended.
        tokens: generated so far.
    """

    job: Job
    listener: Listener
    submitted: float
    open: int
    tokens: int = 0
    last: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """How busy a scheduler is: jobs waiting, prompts being read, sequences generating, and slots."""

    waiting: int
    reading: int
    generating: int
    slots: int


class Scheduler:
    """Runs jobs of many clients on one model.

    Args:
        model: the model.
        slots: sequences that generate together.
        queue: continuations that may wait beyond those.
        read_tokens: prompt tokens between two steps of others.
        cache: remembers prompts and replies.
        observer: hears what happens.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        queue: int = 64,
        read_tokens: int = READ_TOKENS,
        cache: Cache | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.most = slots + queue
        self._engine = Engine(model.session, slots, read_tokens=read_tokens, cache=cache)
        self._observer = observer
        self._tickets: dict[Job, Ticket] = {}
        self._inbox: deque[Job] = deque()
        self._changed = threading.Condition()
        self._claims = 0
        self._seconds_a_job = 1.0
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """How busy it is."""
        engine = self._engine
        return Load(len(self._inbox) + engine.waiting, engine.reading, engine.generating, engine.slots)

    def submit(self, jobs: Sequence[Job], listener: Listener) -> list[Ticket]:
        """Take jobs, all or none of them.

        Args:
            jobs: what to do.
            listener: is called with each event, in the scheduler's thread.

        Raises:
            UserError: a job cannot be done, or there are more than ever fit.
            BusyError: the queue is full.
            ClosedError: no more jobs are taken.
        """
        for job in jobs:
            self._engine.check(job)
        claims = sum(len(job.options) for job in jobs)
        if claims > self.most:
            raise UserError(f"{claims} texts in one request, this server takes at most {self.most}")
        now = time.perf_counter()
        with self._changed:
            if self._closing:
                raise ClosedError
            if self._claims + claims > self.most:
                raise BusyError(self._retry_after())
            tickets = [Ticket(job, listener, now, len(job.options)) for job in jobs]
            self._tickets |= {ticket.job: ticket for ticket in tickets}
            self._claims += claims
            self._inbox.extend(jobs)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Let go of jobs; those that are over stay over."""
        with self._changed:
            for ticket in tickets:
                if ticket.job in self._tickets:
                    ticket.job.cancelled = True
                    self._finish(ticket, "cancelled")
            self._changed.notify()

    def close(self, patience: float = 0.0) -> bool:
        """Take no more jobs, and end when those that run are done, or after so many seconds; whether all were done."""
        with self._changed:
            self._closing = True
            done = self._changed.wait_for(lambda: not self._tickets, patience)
            left = list(self._tickets.values())
        for ticket in left:
            self._tell(ticket, Failed(ticket.job, ClosedError("the server is shutting down")))
        self.cancel(left)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._engine.busy or self._ended)
                if self._ended:
                    return
                while self._inbox:
                    job = self._inbox.popleft()
                    if not job.cancelled:
                        self._engine.add(job)
            for event in self._engine.turn():
                self._pass_on(event)

    def _pass_on(self, event: Event) -> None:
        ticket = self._tickets.get(event.job)
        if ticket is None:
            return
        if isinstance(event, Made) and event.piece.token is not None:
            self._count(ticket, event.index)
        elif isinstance(event, Read) and self._observer is not None:
            self._observer.read(len(event.job.tokens), event.cached)
        elif isinstance(event, Ended):
            ticket.open -= 1
        # Before the listener is called, so that it can submit the next job.
        if isinstance(event, Failed) or ticket.open == 0:
            with self._changed:
                self._finish(ticket, "failed" if isinstance(event, Failed) else "done")
        self._tell(ticket, event)

    def _count(self, ticket: Ticket, index: int) -> None:
        now = time.perf_counter()
        if self._observer is not None:
            if not ticket.last:
                self._observer.first_token(now - ticket.submitted)
            else:
                self._observer.token(now - ticket.last[index] if index in ticket.last else None)
        ticket.last[index] = now
        ticket.tokens += 1

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.listener(event)
        except Exception:  # one who listens badly must not end the thread for all
            logger.exception("a listener failed; its job is cancelled")
            ticket.job.cancelled = True

    def _finish(self, ticket: Ticket, result: str) -> None:
        """Forget a ticket; the lock is held."""
        if self._tickets.pop(ticket.job, None) is None:
            return
        self._claims -= len(ticket.job.options)
        seconds = time.perf_counter() - ticket.submitted
        self._seconds_a_job += 0.1 * (seconds - self._seconds_a_job)
        if self._observer is not None:
            self._observer.ended(result, ticket.tokens)
        self._changed.notify_all()

    def _retry_after(self) -> int:
        """When a slot should be free: jobs last as long as they lately did, and one in `slots` of them ends in that time."""
        return min(60, max(1, math.ceil(self._seconds_a_job / self._engine.slots)))
