"""What goes into the engine and what comes out of it: jobs, their events, and the cache that it asks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from retnet_export.runtime.device.cuda import CudaMemoryError, DeviceLostError
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Finish, Options, Piece
from retnet_export.runtime.generate.state import Snapshot

logger = logging.getLogger(__name__)


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
    """Something that happened to a job."""

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
    """The job cannot be done, or not finished; no other event follows."""

    error: Exception


class Cache(Protocol):
    """Remembers sequences by their tokens."""

    def find(self, tokens: Sequence[int]) -> tuple[int, Snapshot | None]:
        """How many of the first tokens are remembered, and the snapshot after them; 0 and None if none are."""

    def wanted(self, tokens: Sequence[int], start: int) -> Sequence[int]:
        """Token counts beyond `start` at which a snapshot will be of use, ascending, if the tokens are read from there."""

    def keep(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Remember a sequence."""


def is_the_jobs(error: Exception) -> bool:
    """Whether a job is at fault, and not the backend or the GPU."""
    return isinstance(error, UserError) and not isinstance(error, (CudaMemoryError, DeviceLostError))


def failure(job: Job, error: Exception) -> Failed:
    """What a job's clients are told; a fault that is not the job's own goes to the log, too."""
    if not is_the_jobs(error):
        logger.error("a request failed by an error that is not its own", exc_info=error)
    return Failed(job, error)
