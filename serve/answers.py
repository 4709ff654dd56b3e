"""The answers to clients, in OpenAI's form: complete or as a stream of server-sent events.

A token's text is its own where it is whole characters; a token that is a part of one is named as the vocabulary names it, so that
two tokens never look alike.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from retnet_export.runtime.generate.generation import Finish, Piece
from retnet_export.runtime.generate.jobs import Ended, Event, Made, Read
from retnet_export.serve.errors import ApiError

if TYPE_CHECKING:
    from retnet_export.serve.runs import Run
    from retnet_export.serve.service import Service

FINISHES: dict[Finish, str] = {"length": "length", "stop": "stop", "end of text": "stop"}


@dataclass
class Answer:
    """One text of a request.

    Attributes:
        text: so far.
        pieces: the tokens so far, for log-probabilities.
        finish: why it ended, in OpenAI's words.
    """

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish: str | None = None


class Form(Protocol):
    """How one of the two endpoints writes its answers."""

    prefix: str
    whole: str
    chunk: str

    def opening(self, index: int) -> Sequence[dict[str, Any]]:
        """The event of a stream when the prompt has been read."""

    def piece(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The event of a stream for a piece."""

    def closing(self, index: int, finish: str) -> dict[str, Any]:
        """The event of a stream at the end of a text."""

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole text."""

    def read(self, job: int, event: Read) -> None:
        """Take note of a prompt."""


class TokenTexts:
    """Texts of single tokens, and names that no two tokens share."""

    def __init__(self, service: Service) -> None:
        self._tokenizer = service.model.tokenizer if service.has_tokenizer else None

    def text(self, token: int) -> str:
        """A token's text; empty if it is a part of a character, or none."""
        text = "" if self._tokenizer is None else self._tokenizer.decode([token])
        return "" if "\ufffd" in text else text

    def __call__(self, token: int) -> str:
        return self.text(token) or (self._tokenizer.token(token) if self._tokenizer is not None else "") or f"token:{token}"

    def of(self, piece: Piece) -> dict[str, Any]:
        """As in chats' log-probabilities."""
        assert piece.token is not None
        tops = [self._entry(token, value) for token, value in piece.top]
        return {**self._entry(piece.token, piece.logprob or 0.0), "top_logprobs": tops}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        return {"token": self(token), "logprob": _finite(logprob), "bytes": list(text.encode()) if text else None}


class ChatForm:
    """`/v1/chat/completions`.

    Args:
        texts: of tokens.
        logprobs, ids: whether log-probabilities and token ids are wanted.
    """

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, *, logprobs: bool, ids: bool) -> None:
        self._texts, self._logprobs, self._ids = texts, logprobs, ids

    def opening(self, index: int) -> Sequence[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if not piece.text and not ((self._logprobs or self._ids) and piece.token is not None):
            return None
        delta = self._delta(index, {"content": piece.text})
        if self._logprobs and piece.token is not None:
            delta["logprobs"] = {"content": [self._texts.of(piece)]}
        return delta | _token_ids([piece], self._ids)

    def closing(self, index: int, finish: str) -> dict[str, Any]:
        return self._delta(index, {}) | {"finish_reason": finish}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            logprobs = {"content": [self._texts.of(piece) for piece in answer.pieces if piece.token is not None]}
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": logprobs,
            "finish_reason": answer.finish,
            **_token_ids(answer.pieces, self._ids),
        }

    def read(self, job: int, event: Read) -> None:
        pass

    def _delta(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class CompletionForm:
    """`/v1/completions`.

    Args:
        texts: of tokens.
        prompts: text of each prompt, to be repeated before its answers; None if that is not wanted.
        each: answers a prompt.
        logprobs, ids: whether log-probabilities and token ids are wanted.
    """

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts, *, prompts: Sequence[str] | None, each: int, logprobs: bool, ids: bool) -> None:
        self._texts, self._prompts, self._each, self._logprobs, self._ids = texts, prompts, each, logprobs, ids
        self._scores: dict[int, Sequence[Piece]] = {}
        self._lengths: dict[int, int] = {}

    def read(self, job: int, event: Read) -> None:
        self._scores[job] = event.scores

    def opening(self, index: int) -> Sequence[dict[str, Any]]:
        if self._prompts is None:
            return []
        job = index // self._each
        return [self._choice(index, self._prompts[job], self._scored(self._scores.get(job, ()), 0))]

    def piece(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if not piece.text and not ((self._logprobs or self._ids) and piece.token is not None):
            return None
        job = index // self._each
        start = self._lengths.get(index, len(self._prompts[job]) if self._prompts else 0)
        self._lengths[index] = start + len(piece.text)
        choice = self._choice(index, piece.text, self._scored([piece] if piece.token is not None else [], start))
        return choice | _token_ids([piece], self._ids)

    def closing(self, index: int, finish: str) -> dict[str, Any]:
        return self._choice(index, "", None) | {"finish_reason": finish}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        job = index // self._each
        pieces = [*(self._scores.get(job, ()) if self._prompts is not None else ()), *answer.pieces]
        text = (self._prompts[job] if self._prompts is not None else "") + answer.text
        tokens = [piece for piece in pieces if piece.token is not None]
        choice = self._choice(index, text, self._scored(tokens, 0)) | {"finish_reason": answer.finish}
        return choice | _token_ids(answer.pieces, self._ids)

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _scored(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens, offsets = [piece.token for piece in pieces if piece.token is not None], []
        for token in tokens:
            offsets.append(offset)
            offset += len(self._texts.text(token))
        tops = [
            {self._texts(token): _finite(value) for token, value in piece.top} if piece.logprob is not None else None
            for piece in pieces
        ]
        return {
            "tokens": [self._texts(token) for token in tokens],
            "token_logprobs": [None if piece.logprob is None else _finite(piece.logprob) for piece in pieces],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class AnswerWriter:
    """Writes one request's answers.

    Args:
        form: of the endpoint.
        service: the server.
        counts: answers of each job.
        prompt_tokens: of all jobs together.
    """

    def __init__(self, form: Form, service: Service, counts: Sequence[int], prompt_tokens: int) -> None:
        self._form, self._prompt_tokens = form, prompt_tokens
        self._first = [sum(counts[:job]) for job in range(len(counts))]
        self._counts = counts
        self._about = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": service.names[0]}
        self._generated = self._cached = 0
        self._answers = [Answer() for _ in range(sum(counts))]

    async def whole(self, run: Run) -> dict[str, Any]:
        """All answers at once.

        Raises:
            ApiError: a job failed.
        """
        async for job, event in run.events():
            self._take(job, event)
        choices = [self._form.choice(index, answer) for index, answer in enumerate(self._answers)]
        return {**self._about, "object": self._form.whole, "choices": choices, "usage": self._usage}

    async def stream(self, run: Run, *, with_usage: bool) -> AsyncGenerator[bytes]:
        """Server-sent events, the last of which says `[DONE]`; a fault is one, too."""
        rest = {"usage": None} if with_usage else {}
        try:
            async for job, event in run.events():
                choices = self._take(job, event)
                if choices:
                    # One choice a chunk, as OpenAI has it: some clients look at the first only.
                    yield b"".join(self._event({"choices": [choice], **rest}) for choice in choices)
            if with_usage:
                yield self._event({"choices": [], "usage": self._usage})
        except ApiError as error:
            yield _sse(error.body)
        yield b"data: [DONE]\n\n"

    @property
    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._generated,
            "total_tokens": self._prompt_tokens + self._generated,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def _take(self, job: int, event: Event) -> list[dict[str, Any]]:
        """Process an event; returns the event of the stream."""
        if isinstance(event, Read):
            self._form.read(job, event)
            self._cached += event.cached
            first = self._first[job]
            return [choice for index in range(first, first + self._counts[job]) for choice in self._form.opening(index)]
        if isinstance(event, Made):
            index = self._first[job] + event.index
            answer = self._answers[index]
            answer.text += event.piece.text
            answer.pieces.append(event.piece)
            self._generated += event.piece.token is not None
            choice = self._form.piece(index, event.piece)
            return [] if choice is None else [choice]
        if isinstance(event, Ended):
            index, finish = self._first[job] + event.index, FINISHES[event.finish]
            self._answers[index].finish = finish
            return [self._form.closing(index, finish)]
        return []

    def _event(self, content: dict[str, Any]) -> bytes:
        return _sse({**self._about, "object": self._form.chunk, **content})


def _token_ids(pieces: Sequence[Piece], wanted: bool) -> dict[str, list[int]]:
    """A field of a choice, by vLLM's name."""
    return {"token_ids": [piece.token for piece in pieces if piece.token is not None]} if wanted else {}


def _sse(content: object) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def _finite(value: float) -> float:
    """JSON has no infinities: an impossible token has OpenAI's -9999."""
    return max(value, -9999.0)
