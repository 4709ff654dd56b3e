"""What a server does, apart from HTTP: bodies become jobs."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.jobs import Job
from retnet_export.serve.bodies import ChatBody, CompletionBody, Generating, StateBody, text_of
from retnet_export.serve.errors import ApiError
from retnet_export.serve.prompts import Encoded
from retnet_export.serve.runs import Courier
from retnet_export.serve.scheduler import Scheduler

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model
    from retnet_export.serve.cache import PrefixCache
    from retnet_export.serve.prompts import Prompts
    from retnet_export.serve.store import Store

USUAL_TOKENS, USUAL_CHAT_TOKENS = 16, 512
"""Tokens of an answer to a body that does not say: OpenAI's number for completions, and for chats, where it has none."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body: bytes.
        prompt: tokens of one prompt.
        tokens: of one answer.
    """

    body: int = 4_000_000
    prompt: int = 32_768
    tokens: int = 4_096


@dataclass
class Service:
    """A model and all that serves it.

    Attributes:
        names: under which the model is known; the first is its own.
        store: named states, if there is a folder for them.
        speculate: tokens to guess ahead, as in `Options`.
        closing: set when the server is about to end.
    """

    model: Model
    names: Sequence[str]
    scheduler: Scheduler
    prompts: Prompts
    limits: Limits = field(default_factory=Limits)
    cache: PrefixCache | None = None
    store: Store | None = None
    speculate: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here.

        Raises:
            ApiError: 404.
        """
        if name not in (None, "", *self.names):
            message = f"the model {str(name)[:100]!r} is not served here; expected {', '.join(map(repr, self.names))}"
            raise ApiError(404, message, param="model", code="model_not_found")

    @functools.cached_property
    def courier(self) -> Courier:
        """Brings events into the event loop that asks for it first."""
        return Courier(asyncio.get_running_loop())

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.model.bundle.manifest.model.vocab_size

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of a prompt."""
        return self.model.tokenizer.decode(tokens) if self.has_tokenizer else ""

    def restore(self, name: str) -> list[int]:
        """Put a named state into the cache; its tokens.

        Raises:
            ApiError, UserError: there is no cache, or no such state.
        """
        if self.store is None or self.cache is None:
            raise ApiError(400, "state: this server has no named states; start it with --states FOLDER and a cache", param="state")
        tokens, snapshot = self.store.load(name)
        self.cache.keep(tokens, snapshot)
        return tokens

    def completion_jobs(self, body: CompletionBody) -> list[Job]:
        """A job a prompt.

        Raises:
            ApiError: a limit is exceeded.
            UserError: a prompt cannot be encoded, or an option is out of its range.
        """
        self.check_model(body.model)
        before = self.restore(body.state) if body.state else []
        given = body.prompt
        prompts: Sequence[str | list[int]] = given if _is_list_of_prompts(given) else [given]  # type: ignore[list-item,assignment]
        with_text = self.has_tokenizer
        jobs = []
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                tokens = [*before, *self.prompts.encode_after(before, prompt)] if before else self.prompts.encode(prompt)
            else:
                tokens = [*before, *prompt]
            self._check_length(tokens)
            logprobs = body.logprobs
            options = self._options(
                body, number * (body.n or 1), logprobs, self._allowed(body.max_tokens, USUAL_TOKENS, "max_tokens")
            )
            scores = logprobs if body.echo and logprobs is not None else None
            jobs.append(Job(tokens, options, with_text=with_text, cached=body.cache_prompt is not False, scores=scores))
        if not jobs:
            raise ApiError(400, "prompt: an empty list, expected at least one prompt", param="prompt")
        return jobs

    def chat_job(self, body: ChatBody) -> Job:
        """The job of a chat.

        Raises:
            ApiError, UserError: as `completion_jobs`; a message holds something other than text.
        """
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: it needs logprobs: true", param="top_logprobs")
        encoded = self._chat(body)
        before = self.restore(body.state) if body.state else []
        tokens = [*before, *encoded.tokens]
        self._check_length(tokens)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        most = self._allowed(getattr(body, field), USUAL_CHAT_TOKENS, field)
        options = self._options(body, 0, (body.top_logprobs or 0) if body.logprobs else None, most)
        marks = tuple(len(before) + mark for mark in encoded.marks)
        return Job(tokens, options, marks=marks, cached=body.cache_prompt is not False)

    def state_job(self, body: StateBody) -> Job:
        """The job that reads what a named state is to hold.

        Raises:
            ApiError, UserError: as above.
        """
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "expected either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = self._chat(body).tokens
        else:
            tokens = self.prompts.encode(body.prompt) if isinstance(body.prompt, str) else list(body.prompt or ())
        self._check_length(tokens)
        return Job(tokens, [Options(max_new_tokens=0)], with_text=False)

    def _chat(self, body: ChatBody | StateBody) -> Encoded:
        messages = [
            {"role": "system" if each.role == "developer" else each.role, "content": text_of(each, place)}
            for place, each in enumerate(body.messages or ())
        ]
        return self.prompts.chat(messages)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle reads and writes text."""
        return self.model.bundle.manifest.tokenizer is not None

    def _check_length(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.limits.prompt:
            message = f"the prompt has {len(tokens)} tokens, this server reads at most {self.limits.prompt} (--max-prompt)"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")

    def _allowed(self, asked: int | None, usual: int, field: str) -> int:
        if asked is None:
            return min(usual, self.limits.tokens)
        if asked > self.limits.tokens:
            message = f"{field}: {asked}, this server generates at most {self.limits.tokens} (--max-tokens)"
            raise ApiError(400, message, param=field, code="invalid_value")
        return asked

    def _options(self, body: Generating, first: int, logprobs: int | None, most: int) -> list[Options]:
        """Options of each of the `n` answers; the `first` is the number of the first among those of the request."""
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        biases = {}
        for token, bias in (body.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > 12:
                raise ApiError(400, f"logit_bias: {token[:40]!r} is not a token id", param="logit_bias")
            biases[int(token)] = bias

        def given(value: float | None, usual: float) -> float:
            return usual if value is None else value

        temperature = given(body.temperature, 1.0)
        return [
            Options(
                max_new_tokens=most,
                min_new_tokens=min(body.min_tokens or 0, most),
                ignore_ends=bool(body.ignore_eos),
                temperature=0.0 if temperature < 1e-6 else temperature,
                top_p=given(body.top_p, 1.0),
                top_k=min(max(body.top_k or 0, 0), self.vocabulary),
                min_p=given(body.min_p, 0.0),
                presence_penalty=given(body.presence_penalty, 0.0),
                frequency_penalty=given(body.frequency_penalty, 0.0),
                repetition_penalty=given(body.repetition_penalty, 1.0),
                logit_bias=biases,
                seed=None if body.seed is None else (body.seed + first + number) % 2**63,
                stop=stop,
                stop_tokens=tuple(body.stop_token_ids or ()),
                logprobs=logprobs,
                speculate=self.speculate,
            )
            for number in range(body.n or 1)
        ]


def _is_list_of_prompts(prompt: str | Sequence[object]) -> bool:
    return isinstance(prompt, list) and not all(isinstance(each, int) for each in itertools.islice(prompt, 1))
