"""What Triton's Python backend loads: the scheduler of `serve` behind Triton's front door, with streamed answers.

A request carries a text or token ids; sampling options are its parameters, by the names of `/v1/completions`. Each piece of text is
a response of its own (a decoupled model). The scheduler's thread never waits for Triton: responses go out from a thread beside it.
"""

from __future__ import annotations

import functools
import json
import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.jobs import Ended, Event, Failed, Made
from retnet_export.runtime.model import load
from retnet_export.serve.answers import FINISHES
from retnet_export.serve.bodies import CompletionBody, parse
from retnet_export.serve.errors import ApiError
from retnet_export.serve.runs import failure
from retnet_export.serve.scheduler import BusyError, ClosedError, Ticket
from retnet_export.serve.service import Limits, Service
from retnet_export.serve.settings import Settings, build

BUNDLE = "bundle.retnet"
"""The bundle's folder beside model.py."""

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """As the backend wants it: `initialize`, `execute` and `finalize`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle beside the model's file."""
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = Settings(
            bundle=folder / BUNDLE,
            backend=given.get("backend", "auto"),
            threads=int(given["threads"]) if given.get("threads") else None,
            slots=int(given.get("max_batch", "8")),
            queue=int(given.get("max_queue", "256")),
            cache_bytes=1_000_000 * int(given.get("cache_mb", "512")),
            limits=Limits(prompt=int(given.get("max_prompt", "32768")), tokens=int(given.get("max_tokens", "4096"))),
        )
        try:
            model = load(settings.bundle, settings.backend, threads=settings.threads)
            self._service: Service = build(settings, model)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._outbox: queue.SimpleQueue[tuple[_Answer, Event] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="sender", daemon=True)
        self._sender.start()

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the scheduler; their answers come later."""
        for request in requests:
            answer = _Answer(self._pb, request.get_response_sender())
            try:
                jobs = self._service.completion_jobs(_body(self._pb, request))
                answer.open = sum(len(job.options) for job in jobs)
                answer.numbers = {id(job): number for number, job in enumerate(jobs)}
                answer.each = len(jobs[0].options)
                answer.tickets = self._service.scheduler.submit(jobs, functools.partial(self._post, answer))
            except (ApiError, UserError) as error:
                answer.fail(str(error), self._pb.TritonError.INVALID_ARG)
            except (BusyError, ClosedError) as error:
                answer.fail(str(error) or "the model is being unloaded", self._pb.TritonError.UNAVAILABLE)

    def _post(self, answer: _Answer, event: Event) -> None:
        self._outbox.put((answer, event))

    def finalize(self) -> None:
        """Let what runs end, for a while, and stop."""
        self._service.scheduler.close(10.0)
        self._outbox.put(None)
        self._sender.join()

    def _send_all(self) -> None:
        while (item := self._outbox.get()) is not None:
            answer, event = item
            try:
                if not answer.closed and answer.sender.is_cancelled():
                    answer.close()
                if answer.closed:
                    self._service.scheduler.cancel(answer.tickets)
                answer.take(event)
            except Exception:  # one client's connection must not end the answers of all
                logger.exception("a response could not be sent")
                self._service.scheduler.cancel(answer.tickets)
                answer.closed = True


class _Answer:
    """The responses of one request."""

    def __init__(self, pb_utils: Any, sender: Any) -> None:
        self._pb, self.sender = pb_utils, sender
        self.tickets: list[Ticket] = []
        self.numbers: dict[int, int] = {}
        self.open, self.each, self.closed = 0, 1, False

    def take(self, event: Event) -> None:
        """Send what happened to a job."""
        if self.closed:
            return
        if isinstance(event, Failed):
            error, codes = failure(event.error), self._pb.TritonError
            self.fail(error.message, {400: codes.INVALID_ARG, 503: codes.UNAVAILABLE}.get(error.status, codes.INTERNAL))
        elif isinstance(event, Made):
            index = self.numbers[id(event.job)] * self.each + event.index
            self._send(index, event.piece.text, -1 if event.piece.token is None else event.piece.token, "")
        elif isinstance(event, Ended):
            self.open -= 1
            self._send(self.numbers[id(event.job)] * self.each + event.index, "", -1, FINISHES[event.finish])
            if self.open == 0:
                self.close()

    def fail(self, message: str, code: int) -> None:
        """End with an error."""
        error = self._pb.TritonError(message, code)
        self.sender.send(self._pb.InferenceResponse(output_tensors=[], error=error), flags=self._final)
        self.closed = True

    def close(self) -> None:
        """End."""
        self.sender.send(flags=self._final)
        self.closed = True

    @property
    def _final(self) -> int:
        return int(self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send(self, index: int, text: str, token: int, finish: str) -> None:
        tensors = {
            "text": np.array([text.encode()], np.object_),
            "token": np.array([token], np.int64),
            "index": np.array([index], np.int32),
            "finish_reason": np.array([finish.encode()], np.object_),
        }
        self.sender.send(self._pb.InferenceResponse([self._pb.Tensor(name, value) for name, value in tensors.items()]))


def _body(pb_utils: Any, request: Any) -> CompletionBody:
    """A request as the body of a completion.

    Raises:
        ApiError: it has no text and no tokens, or a parameter is wrong.
    """
    text, tokens = (pb_utils.get_input_tensor_by_name(request, name) for name in ("prompt", "tokens"))
    if (text is None) == (tokens is None):
        raise ApiError(400, "expected one of the inputs prompt (BYTES) and tokens (INT64)")
    prompt = (
        text.as_numpy().reshape(-1)[0].decode("utf-8", "replace") if text is not None else tokens.as_numpy().reshape(-1).tolist()
    )
    fields = {name: _value(value) for name, value in json.loads(request.parameters() or "{}").items()}
    body, ignored = parse(CompletionBody, json.dumps({**fields, "prompt": prompt}).encode())
    if ignored:
        logger.warning("ignored parameters: %s", ", ".join(ignored))
    return body


def _value(value: Any) -> Any:
    """Parameters of Triton's are strings, whole numbers and booleans: what else a field wants is JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
