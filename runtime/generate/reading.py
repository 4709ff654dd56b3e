"""Prompts on their way into the state: several side by side, with snapshots where the cache wants them; those with scores alone.

Rule: prompts lie in the first slots of a session of their own. When one is done, the last one takes its place, and a pass costs
what the prompts in it cost. A piece costs a pass over the prompt's state, so that short prompts are read whole.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from retnet_export.runtime.backends.base import top_of
from retnet_export.runtime.generate.generation import Piece
from retnet_export.runtime.generate.jobs import Cache, Event, Job, Read, failure
from retnet_export.runtime.generate.sampling import Logits, log_softmax
from retnet_export.runtime.generate.session import Session
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats

OpenSession = Callable[[int], Session]
"""Opens a session of so many sequences: `Model.session`."""

READERS = 4
"""Prompts that are read side by side; more wait for their turn."""

_Row = TypeVar("_Row")


@dataclass(eq=False)
class _Reading:
    """A prompt on its way: `done` of its tokens are read, and at `stops` the cache wants a snapshot."""

    job: Job
    done: int
    cached: int
    stops: deque[int] = field(default_factory=deque)
    scores: list[Piece] = field(default_factory=list)

    @property
    def ahead(self) -> int:
        """Tokens up to where the reading must pause."""
        return (self.stops[0] if self.stops else len(self.job.tokens)) - self.done

    def read_to_the_end(self, snapshot: Snapshot) -> Read:
        return Read(self.job, self.cached, snapshot, self.scores)


class Reader:
    """Reads prompts.

    Args:
        open_session: of the model.
        slots: sequences that may generate together; at most so many prompts are read side by side.
        cache: remembers prompts.
        stats: receives the times.

    Attributes:
        session: where they are read.
    """

    def __init__(self, open_session: OpenSession, slots: int, cache: Cache | None, stats: Stats) -> None:
        self.session = open_session(min(slots, READERS))
        self._open_session, self._cache, self._stats = open_session, cache, stats
        self._start = self.session.snapshot()
        self._scorer: Session | None = None
        self._readings: list[_Reading] = []
        self._scoring: deque[_Reading] = deque()

    @property
    def jobs(self) -> list[Job]:
        """Those whose prompts are being read."""
        return [reading.job for reading in (*self._readings, *self._scoring)]

    def has_room_for(self, job: Job, budget: int) -> bool:
        """Whether a prompt may begin now: it fits into the next piece beside the others, or they are all far from their ends.

        Each piece costs a pass over the prompt's state. So prompts that fit into one piece are read whole, one after another.
        """
        if not self._readings or job.scores is not None:
            return True
        left = [len(reading.job.tokens) - reading.done for reading in self._readings]
        if len(left) == self.session.batch or min(left) > budget:
            return len(left) < self.session.batch
        cache = self.cache_of(job)
        known = 0 if cache is None else cache.find(job.tokens)[0]
        return sum(min(each, budget) for each in left) + len(job.tokens) - known <= budget

    def cache_of(self, job: Job) -> Cache | None:
        """The cache, if a job uses it."""
        return self._cache if job.cached and job.after is None else None

    def begin(self, job: Job) -> Read | None:
        """Take a prompt; the event that it was read, if the cache has all of it."""
        if job.scores is not None:
            self._scoring.append(_Reading(job, 0, 0))
            return None
        known, snapshot, cache = 0, job.after or self._start, self.cache_of(job)
        if cache is not None:
            known, found = cache.find(job.tokens)
            snapshot = found or snapshot
        reading = _Reading(job, known, known)
        if reading.ahead == 0:
            return reading.read_to_the_end(snapshot)
        if cache is not None:
            stops = {*cache.wanted(job.tokens, known), *job.marks, len(job.tokens)}
            reading.stops.extend(sorted(stop for stop in stops if known < stop <= len(job.tokens)))
        self.session.restore(snapshot, len(self._readings))
        self._readings.append(reading)
        return None

    def read(self, budget: int) -> list[Event]:
        """Read so many tokens of the prompts, and of the first one that is to be scored; the events of that."""
        return [*self._read(budget), *self._score(budget)]

    def drop(self, jobs: Set[Job]) -> None:
        """Forget jobs."""
        self._scoring = deque(each for each in self._scoring if each.job not in jobs)
        close_gaps(self.session, self._readings, {row for row, each in enumerate(self._readings) if each.job in jobs})

    def reset(self) -> None:
        """Forget all, whatever has happened."""
        self._readings.clear()
        self._scoring.clear()
        self._scorer = None
        self.session.reset()

    def _read(self, budget: int) -> list[Event]:
        if not self._readings:
            return []
        count = len(self._readings)
        width = min(max(1, budget // count), self.session.chunk, max(reading.ahead for reading in self._readings))
        lengths = np.array([min(width, reading.ahead) for reading in self._readings], np.int64)
        tokens = np.zeros((count, width), np.int64)
        for row, (reading, length) in enumerate(zip(self._readings, lengths, strict=True)):
            tokens[row, :length] = reading.job.tokens[reading.done : reading.done + length]
        began = time.perf_counter()
        try:
            self.session.prefill(tokens, lengths)
        except Exception as error:  # noqa: BLE001 (whatever a backend raises: the jobs are told, others go on)
            failed = [failure(reading.job, error) for reading in self._readings]
            self.session.reset()
            self._readings.clear()
            return [*failed]
        self._stats.add_prompt(int(lengths.sum()), time.perf_counter() - began)
        events: list[Event] = []
        finished = set()
        for row, (reading, length) in enumerate(zip(self._readings, lengths, strict=True)):
            reading.done += int(length)
            if reading.ahead:
                continue
            snapshot = self.session.snapshot(row)
            if reading.stops:
                reading.stops.popleft()
                if (cache := self.cache_of(reading.job)) is not None:
                    cache.keep(reading.job.tokens[: reading.done], snapshot)
            if reading.done == len(reading.job.tokens):
                finished.add(row)
                events.append(reading.read_to_the_end(snapshot))
        close_gaps(self.session, self._readings, finished)
        return events

    def _score(self, budget: int) -> list[Event]:
        """Read a piece of the first prompt whose tokens are to be scored."""
        if not self._scoring:
            return []
        if self._scorer is None:
            self._scorer = self._open_session(1)
        reading, session = self._scoring[0], self._scorer
        job, began = reading.job, time.perf_counter()
        if reading.done == 0:
            session.restore(job.after or self._start)
        part = job.tokens[reading.done : reading.done + min(budget, session.chunk)]
        try:
            before = session.logits
            rows = [None if before is None else before[0].copy(), *session.score(np.array([part], np.int64))[0]]
        except Exception as error:  # noqa: BLE001 (as in _read)
            self._scoring.popleft()
            session.reset()
            return [failure(job, error)]
        self._stats.add_prompt(len(part), time.perf_counter() - began)
        reading.scores += [score(token, row, job.scores or 0) for token, row in zip(part, rows, strict=False)]
        reading.done += len(part)
        if reading.done < len(job.tokens):
            return []
        snapshot = session.snapshot()
        self._scoring.popleft()
        return [reading.read_to_the_end(snapshot)]


def score(token: int, logits: Logits | None, count: int) -> Piece:
    """A token that was read, with its log-probability and those of the most probable ones, from the logits (V,) before it."""
    if logits is None:
        return Piece(token, "")
    own = log_softmax(logits)
    tokens, values = top_of(own[None], count) if count else (np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32))
    return Piece(token, "", float(own[token]), tuple(zip(tokens[0].tolist(), values[0].tolist(), strict=True)))


def close_gaps(session: Session, rows: list[_Row], gone: set[int]) -> None:
    """Remove rows; the last ones take their slots, in the session as in the list."""
    for slot in sorted(gone, reverse=True):
        last = len(rows) - 1
        if slot != last:
            session.move(last, slot)
            rows[slot] = rows[last]
        rows.pop()
