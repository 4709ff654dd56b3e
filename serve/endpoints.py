"""The endpoints, and the application that they make up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.jobs import Job, Read
from retnet_export.serve import page
from retnet_export.serve.answers import AnswerWriter, ChatForm, CompletionForm, Form, TokenTexts
from retnet_export.serve.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generating,
    StateBody,
    TokenizeBody,
    parse,
)
from retnet_export.serve.errors import ApiError
from retnet_export.serve.guards import Guards
from retnet_export.serve.metrics import CONTENT_TYPE, Metrics
from retnet_export.serve.runs import Run
from retnet_export.serve.service import Service

logger = logging.getLogger(__name__)
T = TypeVar("T")
B = TypeVar("B", bound=Body)


class Endpoints:
    """Answers requests; `service` is set once the model is loaded."""

    def __init__(self, most_bytes: int) -> None:
        self.service: Service | None = None
        self.metrics = Metrics()
        self._most_bytes = most_bytes

    def app(self, guards: Guards) -> Starlette:
        """The application."""
        routes = [
            Route("/", self.page, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.figures, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/slots", self.slots, methods=["GET"]),
            Route("/slots/{name}", self.state, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
            ApiError: _api_error,
            UserError: _user_error,
            HTTPException: _http_error,
            Exception: _bug,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.add_middleware(guards.middleware, counted=self._count)
        return app

    async def page(self, request: Request) -> Response:
        return Response(page.HTML, media_type="text/html", headers=page.HEADERS)

    async def health(self, request: Request) -> Response:
        ready = self.service is not None
        return JSONResponse({"status": "ok" if ready else "loading"}, 200 if ready else 503)

    async def figures(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about(name) for name in self._ready.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._ready.check_model(name)
        return JSONResponse(self._about(name))

    async def completions(self, request: Request) -> Response:
        service, (body, ignored) = self._ready, await self._body(request, CompletionBody)
        jobs = await run_in_threadpool(service.completion_jobs, body)
        form = CompletionForm(
            TokenTexts(service),
            prompts=[service.text_of(job.tokens) for job in jobs] if body.echo else None,
            each=body.n or 1,
            logprobs=body.logprobs is not None,
            ids=bool(body.return_token_ids),
        )
        return await self._answer(request, body, form, jobs, ignored)

    async def chat(self, request: Request) -> Response:
        service, (body, ignored) = self._ready, await self._body(request, ChatBody)
        job = await run_in_threadpool(service.chat_job, body)
        form = ChatForm(TokenTexts(service), logprobs=bool(body.logprobs), ids=bool(body.return_token_ids))
        return await self._answer(request, body, form, [job], ignored)

    async def _answer(
        self, request: Request, body: Generating, form: Form, jobs: Sequence[Job], ignored: Sequence[str]
    ) -> Response:
        service, headers = self._ready, _warn(ignored)
        writer = AnswerWriter(form, service, [len(job.options) for job in jobs], sum(len(job.tokens) for job in jobs))
        run = Run(service, jobs)
        if not body.stream:
            with run:
                return JSONResponse(await _unless_gone(request, writer.whole(run)), headers=headers)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        run.__enter__()  # now, so that a full queue is a status and not an event; the stream leaves it
        return _Stream(writer.stream(run, with_usage=with_usage), run, headers)

    async def tokenize(self, request: Request) -> Response:
        service, (body, ignored) = self._ready, await self._body(request, TokenizeBody)
        text = body.prompt if body.content is None else body.content
        if text is None:
            raise ApiError(400, "content: expected a text", param="content")
        tokens = await run_in_threadpool(service.prompts.encode, text, special=body.add_special is not False)
        return JSONResponse({"tokens": tokens, "count": len(tokens)}, headers=_warn(ignored))

    async def detokenize(self, request: Request) -> Response:
        service, (body, ignored) = self._ready, await self._body(request, DetokenizeBody)
        if outside := [token for token in body.tokens if token >= service.vocabulary]:
            raise ApiError(400, f"tokens: {outside[0]} is not in the vocabulary of {service.vocabulary}", param="tokens")
        text = await run_in_threadpool(service.model.tokenizer.decode, body.tokens)
        return JSONResponse({"content": text, "prompt": text}, headers=_warn(ignored))

    async def slots(self, request: Request) -> Response:
        service = self._ready
        load = service.scheduler.load
        states = [] if service.store is None else await run_in_threadpool(service.store.names)
        return JSONResponse(
            {
                "slots": load.slots,
                "generating": load.generating,
                "reading": load.reading,
                "waiting": load.waiting,
                "states": [{"name": name} for name in states],
            }
        )

    async def state(self, request: Request) -> Response:
        """`/slots/NAME?action=save|restore|erase`, of a named state."""
        service, name, action = self._ready, request.path_params["name"], request.query_params.get("action")
        if service.store is None:
            raise ApiError(400, "this server has no named states; start it with --states FOLDER", code="no_states")
        if action == "save":
            body, ignored = await self._body(request, StateBody)
            store, job = service.store, await run_in_threadpool(service.state_job, body)
            store.check_name(name)
            with Run(service, [job]) as run:
                snapshot = await _unless_gone(request, _snapshot_of(run))
            await run_in_threadpool(store.save, name, job.tokens, snapshot)
            return JSONResponse({"name": name, "tokens": len(job.tokens)}, headers=_warn(ignored))
        if action == "restore":
            tokens = await run_in_threadpool(service.restore, name)
            return JSONResponse({"name": name, "tokens": len(tokens)})
        if action == "erase":
            await run_in_threadpool(service.store.delete, name)
            return JSONResponse({"name": name})
        raise ApiError(400, "action: expected save, restore or erase", param="action")

    @property
    def _ready(self) -> Service:
        if self.service is None:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"})
        return self.service

    def _about(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._ready.created, "owned_by": "retnet-export"}

    async def _body(self, request: Request, kind: type[B]) -> tuple[B, list[str]]:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self._most_bytes:
                raise ApiError(413, f"the body has more than {self._most_bytes} bytes (--max-body)", code="body_too_large")
        return parse(kind, bytes(content))

    def _count(self, path: str, status: int) -> None:
        self.metrics.requests.labels(path, str(status)).inc()


class _Stream(StreamingResponse):
    """A stream whose source is closed, and whose run is left, when the client goes away, also while there is nothing to send."""

    def __init__(self, source: AsyncGenerator[bytes], run: Run, headers: Mapping[str, str]) -> None:
        super().__init__(source, media_type="text/event-stream", headers={"Cache-Control": "no-store", **headers})
        self._source, self._run = source, run

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._run.__exit__()  # not in the source: what never began does not come to its end
            gone.cancel()
            if not sending.done():
                sending.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._source.aclose()


async def _gone(receive: Any) -> None:
    """Returns when the client has gone away; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of work, which is cancelled if the client goes away.

    Raises:
        ApiError: it went away; nobody reads the answer.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client disconnected", code="gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _snapshot_of(run: Run) -> Any:
    snapshot = None
    async for _, event in run.events():
        if isinstance(event, Read):
            snapshot = event.snapshot
    return snapshot


def _warn(ignored: Sequence[str]) -> dict[str, str]:
    """A header that names ignored fields, which are logged, too."""
    if not ignored:
        return {}
    names = json.dumps(", ".join(name[:40] for name in ignored[:8]))
    logger.warning("ignored fields: %s", names)
    return {"X-Ignored-Fields": names}


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _user_error(request: Request, error: UserError) -> Response:
    return await _api_error(request, ApiError(400, str(error)))


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = {
        404: f"no endpoint {request.url.path[:100]!r}",
        405: f"{request.url.path[:100]!r} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _bug(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "the server failed; its log says why", code="internal_error"))
