"""Continuous batching: sequences join and leave a batch between its steps, and prompts are read in between.

Rule: a turn of the engine takes one token for every sequence that generates (or several, where a draft predicted them), and reads
`read_tokens` tokens of the prompts that wait, shared evenly among them; more only while that took less time than the step did.
So no prompt, however long, keeps the others waiting for more than that, a short one that comes later overtakes it, and reading
gets half of a busy machine. A sequence's text does not depend on its neighbours: slots share nothing but the step.

Sequences lie in the first slots of their session, side by side: when one leaves, the last one takes its place, and a step
costs what the sequences in it cost. Prompts are read by a session of their own, in which the same holds.

The engine is driven from outside, by `turn`, and belongs to one thread; it knows of no clients and no queue limits.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Continuation, Piece
from retnet_export.runtime.generate.jobs import Cache, Ended, Event, Failed, Job, Made, Read, failure
from retnet_export.runtime.generate.loop import Running
from retnet_export.runtime.generate.reading import OpenSession, Reader, close_gaps
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats

READ_TOKENS = 32
"""Prompt tokens between two steps of others: a step of 148M takes as long as reading some ten tokens."""


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
        self.slots, self.cache, self.read_tokens = slots, cache, read_tokens
        self.stats = Stats(keep_steps=False) if stats is None else stats
        self._generator, self._reader = open_session(slots), Reader(open_session, slots, cache, self.stats)
        self._loop = self._generator.loop(self.stats)
        self._waiting: deque[Job] = deque()
        self._ready: deque[_Ready] = deque()
        self._sequences: list[_Sequence] = []

    @property
    def waiting(self) -> int:
        """Jobs of which nothing was read yet."""
        return len(self._waiting)

    @property
    def reading(self) -> int:
        """Prompts that are being read."""
        return len(self._reader.jobs)

    @property
    def generating(self) -> int:
        """Sequences in the batch."""
        return len(self._sequences)

    @property
    def free(self) -> int:
        """Slots that no job needs yet."""
        claims = sum(len(job.options) for job in (*self._waiting, *self._reader.jobs))
        return self.slots - claims - len(self._ready) - len(self._sequences)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self.reading or self._ready or self._sequences)

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
        manifest = self._generator.manifest
        vocabulary = manifest.model.vocab_size
        if not len(job.tokens):
            raise UserError("the prompt is empty: give at least one character")
        if (outside := next((token for token in job.tokens if not 0 <= token < vocabulary), None)) is not None:
            raise UserError(f"token {outside} is not in the vocabulary of {vocabulary}")
        tokenizer = self._generator.tokenizer if job.with_text else None
        for options in job.options:
            Continuation(options, np.zeros(vocabulary, np.int32), manifest.eos_ids, tokenizer)

    def turn(self) -> list[Event]:
        """A step for all, a share of the prompts, and a token each; what became of the jobs, in order.

        It does not raise: if a backend fails, the jobs that this concerns have failed.
        """
        events: list[Event] = []
        try:
            self._turn(events)
        except Exception as error:  # noqa: BLE001 (whatever a backend raises, and wherever: the jobs are told)
            self._lose_all(error, events)
        return events

    def _turn(self, events: list[Event]) -> None:
        self._drop_cancelled()
        began = time.perf_counter()
        self._advance(events)
        reading_began = time.perf_counter()
        if self.reading or self._waiting or (self._ready and len(self._sequences) < self.slots):
            self._loop.interrupted()
        while True:
            self._admit(events)
            self._take(self._reader.read(self._budget), events)
            self._join()
            if not (self.reading or self._may_begin) or time.perf_counter() - reading_began >= reading_began - began:
                break
        self._choose(events)

    def _lose_all(self, error: Exception, events: list[Event]) -> None:
        """A backend failed between two passes, so no state is known: all jobs fail, and the next ones start anew."""
        ended = {(event.job, event.index) for event in events if isinstance(event, Ended)}
        told = {event.job for event in events if isinstance(event, Failed)}
        begun: list[_Ready | _Sequence] = [*self._ready, *self._sequences]
        unfinished = [each.job for each in begun if (each.job, each.index) not in ended]
        lost = dict.fromkeys((*self._waiting, *self._reader.jobs, *unfinished))
        events += [failure(job, error) for job in lost if job not in told]
        self._waiting.clear()
        self._ready.clear()
        self._sequences.clear()
        for reset in (self._generator.reset, self._reader.reset):
            # A backend that is lost does not take an initial state either: then the next turn fails, and its jobs are told.
            with contextlib.suppress(Exception):
                reset()

    def _drop_cancelled(self) -> None:
        for slot, sequence in enumerate(self._sequences):
            if sequence.job.cancelled:
                self._keep(sequence, slot)
        begun = (*(each.job for each in self._ready), *(each.job for each in self._sequences))
        jobs = (*self._waiting, *self._reader.jobs, *begun)
        self._drop({job for job in jobs if job.cancelled})

    def _drop(self, jobs: Set[Job]) -> None:
        """Forget jobs, wherever they are."""
        if not jobs:
            return
        self._waiting = deque(job for job in self._waiting if job not in jobs)
        self._reader.drop(jobs)
        self._ready = deque(ready for ready in self._ready if ready.job not in jobs)
        close_gaps(self._generator, self._sequences, {slot for slot, each in enumerate(self._sequences) if each.job in jobs})

    def _advance(self, events: list[Event]) -> None:
        """Read the chosen tokens."""
        if not self._sequences:
            return
        try:
            self._loop.advance([sequence.running for sequence in self._sequences])
        except Exception as error:  # noqa: BLE001 (whatever a backend raises: the jobs are told, others go on)
            jobs, self._sequences = {sequence.job: None for sequence in self._sequences}, []
            events += [failure(job, error) for job in jobs]
            self._generator.reset()
            self._drop(jobs.keys())

    @property
    def _may_begin(self) -> bool:
        """Whether the first prompt that waits can be read beside the others, and will have a slot."""
        return bool(
            self._waiting
            and self.reading + len(self._ready) + len(self._sequences) < self.slots
            and self._reader.has_room_for(self._waiting[0], self._budget)
        )

    def _admit(self, events: list[Event]) -> None:
        """Begin as many prompts as can be read side by side."""
        while self._may_begin:
            known = self._reader.begin(self._waiting[0])
            self._waiting.popleft()
            self._take([] if known is None else [known], events)

    def _take(self, found: Sequence[Event], events: list[Event]) -> None:
        """Take what became of prompts: those that were read wait for slots."""
        events += found
        for event in found:
            if isinstance(event, Read):
                self._ready.extend(_Ready(event.job, index, event.snapshot) for index in range(len(event.job.options)))

    @property
    def _budget(self) -> int:
        """Prompt tokens to read at once."""
        return self.read_tokens if self._sequences else max(self.read_tokens, self._reader.session.chunk)

    def _join(self) -> None:
        """Give free slots to prompts that were read."""
        while self._ready and len(self._sequences) < self.slots:
            ready, slot = self._ready[0], len(self._sequences)
            self._generator.restore(ready.snapshot, slot)
            self._ready.popleft()
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
            except Exception as error:  # noqa: BLE001 (one request's fault is its own)
                failed.add(job)
                events.append(failure(job, error))
            if slot in ended:
                self._keep(sequence, slot)
        close_gaps(self._generator, self._sequences, ended)
        self._drop(failed)

    def _keep(self, sequence: _Sequence, slot: int) -> None:
        """Let the cache remember a reply, as far as it was read: a chat goes on from there."""
        cache, made = self._reader.cache_of(sequence.job), sequence.running.read
        if cache is not None and made and len(sequence.job.options) == 1:
            cache.keep([*sequence.job.tokens, *made], self._generator.snapshot(slot))
