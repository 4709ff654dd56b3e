"""Continuous batching: sequences join and leave a batch between its steps, and prompts are read in between.

Rule: a turn of the engine takes one token for every sequence that generates (or several, where a draft foresaw them), and reads
`read_tokens` tokens of the prompts that wait, shared evenly among them; more only while that took less time than the step did.
So no prompt, however long, keeps the others waiting for more than that, a short one that comes later overtakes it, and reading
gets half of a busy machine. A sequence's text does not depend on its neighbours: slots share nothing but the step.

Sequences lie in the first slots of their session, side by side: when one leaves, the last one takes its place, and a step
costs what the sequences in it cost. Prompts are read by a session of their own, in which the same holds.

The engine is driven from outside, by `turn`, and belongs to one thread; it knows of no clients and no queue limits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from retnet_export.runtime.backends.base import top_of
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Continuation, Finish, Options, Piece
from retnet_export.runtime.generate.loop import Running
from retnet_export.runtime.generate.sampling import Logits, log_softmax
from retnet_export.runtime.generate.session import Session
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats

OpenSession = Callable[[int], Session]
"""Opens a session of so many sequences: `Model.session`."""

logger = logging.getLogger(__name__)

READERS = 4
"""Prompts that are read side by side; more wait for their turn."""
READ_TOKENS = 32
"""Prompt tokens between two steps of others: a step of 148M takes as long as reading some ten tokens."""


@dataclass(eq=False)
class Job:
    """A prompt, and one or more continuations of it.

    Attributes:
        tokens: the prompt.
        options: of each continuation.
        after: what the prompt comes after; None: nothing. Such a job does not use the cache.
        marks: token counts at which the cache should remember the prompt: ends of messages, say.
        with_text: whether pieces carry text.
        cached: whether the cache may be used.
        scores: None for none; n for the log-probability of each token of the prompt and of the n most probable ones there. Such a
            prompt is read from its beginning, alone.
        cancelled: set it, from any thread, and the job is gone at the next turn.
    """

    tokens: Sequence[int]
    options: Sequence[Options]
    after: Snapshot | None = None
    marks: Sequence[int] = ()
    with_text: bool = True
    cached: bool = True
    scores: int | None = None
    cancelled: bool = False


@dataclass(frozen=True)
class Event:
    """Something that became of a job."""

    job: Job


@dataclass(frozen=True)
class Read(Event):
    """The prompt was read.

    Attributes:
        cached: how many of its tokens came from the cache.
        snapshot: after it.
        scores: of its tokens, if asked for; the first has none, because nothing comes before it.
    """

    cached: int
    snapshot: Snapshot
    scores: Sequence[Piece] = ()


@dataclass(frozen=True)
class Made(Event):
    """A piece of the continuation of that number."""

    index: int
    piece: Piece


@dataclass(frozen=True)
class Ended(Event):
    """The continuation of that number ended."""

    index: int
    finish: Finish


@dataclass(frozen=True)
class Failed(Event):
    """The job cannot be done, or not to its end; nothing more will come of it."""

    error: Exception


class Cache(Protocol):
    """Remembers sequences by their tokens."""

    def find(self, tokens: Sequence[int]) -> tuple[int, Snapshot | None]:
        """How many of the first tokens are remembered, and the snapshot after them; 0 and None if none are."""

    def wanted(self, tokens: Sequence[int], start: int) -> Sequence[int]:
        """Token counts beyond `start` at which a snapshot will be of use, ascending, if the tokens are read from there."""

    def keep(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Remember a sequence."""


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


@dataclass(frozen=True)
class _Ready:
    """A continuation that waits for a slot."""

    job: Job
    index: int
    snapshot: Snapshot


@dataclass(eq=False)
class _Sequence:
    """A continuation in its slot."""

    job: Job
    index: int
    running: Running


_Row = TypeVar("_Row", _Reading, _Sequence)


class Engine:
    """Runs jobs in sessions of one model.

    Args:
        open_session: of the model.
        slots: sequences that may generate together.
        read_tokens: prompt tokens between two steps; while nothing generates a chunk of the bundle, if that is more.
        cache: remembers prompts and replies.
        stats: receives the times.
    """

    def __init__(
        self,
        open_session: OpenSession,
        slots: int = 8,
        *,
        read_tokens: int = READ_TOKENS,
        cache: Cache | None = None,
        stats: Stats | None = None,
    ) -> None:
        self.slots, self.cache, self.stats, self.read_tokens = slots, cache, stats or Stats(), read_tokens
        self._open_session, self._generator, self._reader = open_session, open_session(slots), open_session(min(slots, READERS))
        self._loop = self._generator.loop(self.stats)
        self._start = self._reader.snapshot()
        self._scorer: Session | None = None
        self._waiting: deque[Job] = deque()
        self._readings: list[_Reading] = []
        self._scoring: deque[_Reading] = deque()
        self._ready: deque[_Ready] = deque()
        self._sequences: list[_Sequence] = []

    @property
    def waiting(self) -> int:
        """Jobs of which nothing was read yet."""
        return len(self._waiting)

    @property
    def reading(self) -> int:
        """Prompts that are being read."""
        return len(self._readings) + len(self._scoring)

    @property
    def generating(self) -> int:
        """Sequences in the batch."""
        return len(self._sequences)

    @property
    def free(self) -> int:
        """Slots that no job has a claim to yet."""
        claims = sum(len(job.options) for job in (*self._waiting, *(each.job for each in (*self._readings, *self._scoring))))
        return self.slots - claims - len(self._ready) - len(self._sequences)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._readings or self._scoring or self._ready or self._sequences)

    def add(self, job: Job) -> None:
        """Take a job.

        Raises:
            UserError: its prompt is empty or not of this vocabulary, or an option does not fit the model.
        """
        self.check(job)
        self._waiting.append(job)

    def check(self, job: Job) -> None:
        """Refuse a job that cannot be done; from any thread.

        Raises:
            UserError: its prompt is empty or not of this vocabulary, or an option does not fit the model.
        """
        manifest = self._reader.manifest
        vocabulary = manifest.model.vocab_size
        if not len(job.tokens):
            raise UserError("the prompt is empty: give at least one character")
        if (outside := next((token for token in job.tokens if not 0 <= token < vocabulary), None)) is not None:
            raise UserError(f"token {outside} is not in the vocabulary of {vocabulary}")
        tokenizer = self._reader.tokenizer if job.with_text else None
        for options in job.options:
            Continuation(options, np.zeros(vocabulary, np.int32), manifest.eos_ids, tokenizer)

    def turn(self) -> list[Event]:
        """A step for all, a share of the prompts, and a token each; what became of the jobs, in order."""
        events: list[Event] = []
        self._drop_cancelled()
        began = time.perf_counter()
        self._advance(events)
        reading_began = time.perf_counter()
        while True:
            self._admit(events)
            self._read(events)
            self._score(events)
            self._join()
            if not self.reading or time.perf_counter() - reading_began >= reading_began - began:
                break
        self._choose(events)
        return events

    def _drop_cancelled(self) -> None:
        for slot, sequence in enumerate(self._sequences):
            if sequence.job.cancelled:
                self._keep(sequence, slot)
        self._drop({job for job in self._jobs() if job.cancelled})

    def _jobs(self) -> set[Job]:
        begun: list[_Reading | _Ready | _Sequence] = [*self._readings, *self._scoring, *self._ready, *self._sequences]
        return {*self._waiting, *(each.job for each in begun)}

    def _drop(self, jobs: set[Job]) -> None:
        """Forget jobs, wherever they are."""
        if not jobs:
            return
        self._waiting = deque(job for job in self._waiting if job not in jobs)
        self._scoring = deque(each for each in self._scoring if each.job not in jobs)
        self._ready = deque(ready for ready in self._ready if ready.job not in jobs)
        _close_gaps(self._reader, self._readings, {row for row, each in enumerate(self._readings) if each.job in jobs})
        _close_gaps(self._generator, self._sequences, {slot for slot, each in enumerate(self._sequences) if each.job in jobs})

    def _fail(self, job: Job, error: Exception, events: list[Event]) -> None:
        if not isinstance(error, UserError):
            logger.error("a request failed by an error that is not its own", exc_info=error)
        events.append(Failed(job, error))

    def _advance(self, events: list[Event]) -> None:
        """Read the chosen tokens."""
        if not self._sequences:
            return
        try:
            self._loop.advance([sequence.running for sequence in self._sequences])
        except Exception as error:  # noqa: BLE001 (whatever a backend raises: the jobs are told, others go on)
            jobs, self._sequences = {sequence.job: None for sequence in self._sequences}, []
            for job in jobs:
                self._fail(job, error, events)
            self._generator.reset()
            self._drop(set(jobs))

    def _admit(self, events: list[Event]) -> None:
        while (
            self._waiting
            and len(self._readings) < self._reader.batch
            and self.reading + len(self._ready) + len(self._sequences) < self.slots
        ):
            job = self._waiting.popleft()
            if job.scores is not None:
                self._scoring.append(_Reading(job, 0, 0))
                continue
            known, snapshot = 0, job.after or self._start
            cache = self._cache_of(job)
            if cache is not None:
                known, found = cache.find(job.tokens)
                snapshot = found or snapshot
            reading = _Reading(job, known, known)
            if reading.ahead == 0:
                self._finish_reading(reading, snapshot, events)
                continue
            if cache is not None:
                stops = {*cache.wanted(job.tokens, known), *job.marks, len(job.tokens)}
                reading.stops.extend(sorted(stop for stop in stops if known < stop <= len(job.tokens)))
            self._reader.restore(snapshot, len(self._readings))
            self._readings.append(reading)

    def _read(self, events: list[Event]) -> None:
        """Read a piece of every prompt that is being read."""
        if not self._readings:
            return
        count = len(self._readings)
        width = min(max(1, self._budget // count), self._reader.chunk, max(reading.ahead for reading in self._readings))
        lengths = np.array([min(width, reading.ahead) for reading in self._readings], np.int64)
        tokens = np.zeros((count, width), np.int64)
        for row, (reading, length) in enumerate(zip(self._readings, lengths, strict=True)):
            tokens[row, :length] = reading.job.tokens[reading.done : reading.done + length]
        began = time.perf_counter()
        try:
            self._reader.prefill(tokens, lengths)
        except Exception as error:  # noqa: BLE001 (as in _advance)
            for reading in self._readings:
                self._fail(reading.job, error, events)
            self._reader.reset()
            self._readings.clear()
            return
        self.stats.add_prompt(int(lengths.sum()), time.perf_counter() - began)
        finished = set()
        for row, (reading, length) in enumerate(zip(self._readings, lengths, strict=True)):
            reading.done += int(length)
            at_end = reading.done == len(reading.job.tokens)
            at_stop = bool(reading.stops) and reading.done == reading.stops[0]
            if at_end or at_stop:
                snapshot = self._reader.snapshot(row)
                if at_stop:
                    reading.stops.popleft()
                    if (cache := self._cache_of(reading.job)) is not None:
                        cache.keep(reading.job.tokens[: reading.done], snapshot)
                if at_end:
                    finished.add(row)
                    self._finish_reading(reading, snapshot, events)
        _close_gaps(self._reader, self._readings, finished)

    def _score(self, events: list[Event]) -> None:
        """Read a piece of the first prompt whose tokens are to be scored."""
        if not self._scoring:
            return
        if self._scorer is None:
            self._scorer = self._open_session(1)
        reading, session = self._scoring[0], self._scorer
        job, began = reading.job, time.perf_counter()
        if reading.done == 0:
            session.restore(job.after or self._start)
        part = job.tokens[reading.done : reading.done + min(self._budget, self._reader.chunk)]
        try:
            before = session.logits
            rows = [None if before is None else before[0].copy(), *session.score(np.array([part], np.int64))[0]]
        except Exception as error:  # noqa: BLE001 (as in _advance)
            self._scoring.popleft()
            self._fail(job, error, events)
            session.reset()
            return
        self.stats.add_prompt(len(part), time.perf_counter() - began)
        reading.scores += [score(token, row, job.scores or 0) for token, row in zip(part, rows, strict=False)]
        reading.done += len(part)
        if reading.done == len(job.tokens):
            self._scoring.popleft()
            self._finish_reading(reading, session.snapshot(), events)

    @property
    def _budget(self) -> int:
        """Prompt tokens to read at once."""
        return self.read_tokens if self._sequences else max(self.read_tokens, self._reader.chunk)

    def _finish_reading(self, reading: _Reading, snapshot: Snapshot, events: list[Event]) -> None:
        job = reading.job
        events.append(Read(job, reading.cached, snapshot, reading.scores))
        self._ready.extend(_Ready(job, index, snapshot) for index in range(len(job.options)))

    def _join(self) -> None:
        """Give free slots to prompts that were read."""
        while self._ready and len(self._sequences) < self.slots:
            ready, slot = self._ready.popleft(), len(self._sequences)
            self._generator.restore(ready.snapshot, slot)
            continuation = self._generator.continuation(ready.job.options[ready.index], ready.job.with_text, slot)
            self._sequences.append(_Sequence(ready.job, ready.index, self._loop.begin(continuation, slot)))

    def _choose(self, events: list[Event]) -> None:
        """A token for every sequence and those that a draft predicted after it, or its end."""
        ended, failed = set(), set()
        for slot, sequence in enumerate(self._sequences):
            job, continuation = sequence.job, sequence.running.continuation
            if job in failed:
                continue
            try:
                while (piece := self._loop.choose(sequence.running, slot)) is not None:
                    events.append(Made(job, sequence.index, piece))
                    if sequence.running.waits:
                        break
                if continuation.finish is not None:
                    if text := continuation.flush():
                        events.append(Made(job, sequence.index, Piece(None, text)))
                    ended.add(slot)
                    events.append(Ended(job, sequence.index, continuation.finish))
                    self._keep(sequence, slot)
            except Exception as error:  # noqa: BLE001 (one request's fault is its own)
                failed.add(job)
                self._fail(job, error, events)
        _close_gaps(self._generator, self._sequences, ended)
        self._drop(failed)

    def _keep(self, sequence: _Sequence, slot: int) -> None:
        """Let the cache remember a reply, as far as it was read: a chat goes on from there."""
        cache, made = self._cache_of(sequence.job), sequence.running.read
        if cache is not None and made and len(sequence.job.options) == 1:
            cache.keep([*sequence.job.tokens, *made], self._generator.snapshot(slot))

    def _cache_of(self, job: Job) -> Cache | None:
        return self.cache if job.cached and job.after is None else None


def score(token: int, logits: Logits | None, count: int) -> Piece:
    """A token that was read, with its log-probability and those of the most probable ones, from the logits (V,) before it."""
    if logits is None:
        return Piece(token, "")
    own = log_softmax(logits)
    tokens, values = top_of(own[None], count) if count else (np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32))
    return Piece(token, "", float(own[token]), tuple(zip(tokens[0].tolist(), values[0].tolist(), strict=True)))


def _close_gaps(session: Session, rows: list[_Row], gone: set[int]) -> None:
    """Remove rows; the last ones take their slots, in the session as in the list."""
    for slot in sorted(gone, reverse=True):
        last = len(rows) - 1
        if slot != last:
            session.move(last, slot)
            rows[slot] = rows[last]
        rows.pop()
