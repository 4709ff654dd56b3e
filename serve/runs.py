"""A request's jobs while they run: their events come from the scheduler's thread to the coroutine that waits in the event loop."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.jobs import Ended, Event, Failed, Job, is_the_jobs
from retnet_export.serve.errors import ApiError
from retnet_export.serve.scheduler import BusyError, ClosedError, Ticket

if TYPE_CHECKING:
    from retnet_export.serve.service import Service


class Courier:
    """Brings events from the scheduler's thread into the event loop's queues.

    Rule: the loop is woken once for all that a step of the batch brings, not for each token of it.

    Args:
        loop: the event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._bag: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._called = False

    def bring(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """Put an event into a queue; from any thread."""
        self._bag.append((queue, event))
        # The loop may be gone: the server was killed while the scheduler was in a step.
        if not self._called and not self._loop.is_closed():
            self._called = True
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._called = False  # first, so that what comes from here on calls again
        while self._bag:
            queue, event = self._bag.popleft()
            queue.put_nowait(event)


class Run:
    """Jobs of one request, and their events as they come; leaving the block cancels what is not done.

    Args:
        service: what runs them.
        jobs: from the service.
    """

    def __init__(self, service: Service, jobs: Sequence[Job]) -> None:
        self._service, self._jobs = service, jobs
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tickets: list[Ticket] = []

    def __enter__(self) -> Run:
        listen = functools.partial(self._service.courier.bring, self._events)
        try:
            self._tickets = self._service.scheduler.submit(self._jobs, listen)
        except BusyError as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise ApiError(429, str(error), code="queue_full", headers=headers) from error
        except ClosedError as error:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"}) from error
        return self

    def __exit__(self, *fault: object) -> None:
        self._service.scheduler.cancel(self._tickets)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the number of its job, until all jobs are over.

        Raises:
            ApiError: one failed.
        """
        numbers = {id(job): number for number, job in enumerate(self._jobs)}
        open_texts = sum(len(job.options) for job in self._jobs)
        while open_texts:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise failure(event.error)
            open_texts -= isinstance(event, Ended)
            yield numbers[id(event.job)], event


def failure(error: Exception) -> ApiError:
    """What a client hears of a job that failed."""
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="shutting_down")
    if is_the_jobs(error):
        return ApiError(400, str(error))
    why = str(error) if isinstance(error, UserError) else "the model failed; the server's log says why"
    return ApiError(500, why, code="model_failed")
