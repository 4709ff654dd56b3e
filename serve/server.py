"""From settings to a running server: the port opens at once, the model is loaded behind it, and a signal ends it in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from retnet_export.runtime.bundle.files import read_text
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.templates import ChatTemplate, PlainTemplate, Template
from retnet_export.runtime.model import load
from retnet_export.serve.cache import PrefixCache
from retnet_export.serve.endpoints import Endpoints
from retnet_export.serve.guards import LOOPBACK, Guards
from retnet_export.serve.metrics import Metrics
from retnet_export.serve.prompts import Prompts
from retnet_export.serve.scheduler import Scheduler
from retnet_export.serve.service import Limits, Service
from retnet_export.serve.store import Store, name_of

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model

logger = logging.getLogger(__name__)

LAST_SECONDS = 5
"""For connections to end, once nothing generates any more."""


@dataclass(frozen=True)
class Settings:
    """How to serve a bundle.

    Attributes:
        bundle: its folder.
        host, port: where to listen; port 0 takes a free one.
        backend, threads, low_memory: as for `load`.
        names: further names of the model.
        slots: sequences that generate together.
        queue: texts that may wait beyond those.
        read_tokens: prompt tokens between two steps.
        cache_bytes: of the prefix cache; 0: none.
        cache_folder: keeps the cache over restarts.
        states: folder of named states.
        template: file of a chat template, instead of the bundle's.
        before, after: text around each message of the user's, if there is no template.
        keys: of clients; none: no key is needed.
        hosts: further names by which clients reach the server.
        origins: sites whose pages may ask.
        limits: of a request.
        patience: seconds that running requests get when the server ends.
    """

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000
    backend: str = "auto"
    threads: int | None = None
    low_memory: bool | None = None
    names: Sequence[str] = ()
    slots: int = 8
    queue: int = 64
    read_tokens: int | None = None
    cache_bytes: int = 512_000_000
    cache_folder: Path | None = None
    states: Path | None = None
    template: Path | None = None
    before: str = ""
    after: str = "\n"
    keys: Sequence[str] = ()
    hosts: Collection[str] = ()
    origins: Collection[str] = ()
    limits: Limits = field(default_factory=Limits)
    patience: float = 30.0


def run(settings: Settings, tell: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: what and how.
        tell: hears where the server listens, and when it is ready.

    Raises:
        UserError: the port cannot be opened, or the bundle cannot be loaded.
    """
    listener = _listen(settings.host, settings.port)
    with listener:
        asyncio.run(_serve(settings, listener, tell))


def build(settings: Settings, model: Model) -> Service:
    """What serves a loaded model.

    Raises:
        UserError: a folder cannot be made.
    """
    manifest = model.bundle.manifest
    cache = PrefixCache(settings.cache_bytes) if settings.cache_bytes else None
    if cache is not None and settings.cache_folder is not None:
        _fill(cache, Store(settings.cache_folder, manifest))
    template = _template(settings, model)
    metrics = Metrics()
    scheduler = Scheduler(
        model, slots=settings.slots, queue=settings.queue, read_tokens=settings.read_tokens, cache=cache, observer=metrics
    )
    metrics.watch(scheduler, cache)
    return Service(
        model=model,
        names=(manifest.name, *settings.names),
        scheduler=scheduler,
        prompts=Prompts(model, template),
        metrics=metrics,
        limits=settings.limits,
        cache=cache,
        store=None if settings.states is None else Store(settings.states, manifest),
    )


def _template(settings: Settings, model: Model) -> Template:
    """How chats are written: as the settings say, as the bundle says, or plainly."""
    if settings.template is not None:
        spec = model.bundle.manifest.tokenizer
        return ChatTemplate(read_text(settings.template), spec.special_tokens if spec else None, str(settings.template))
    return model.chat_template or PlainTemplate(settings.before, settings.after)


def guards(settings: Settings) -> Guards:
    """What requests must show: on a loopback address, names in Host are checked, too."""
    hosts = {*LOOPBACK, *settings.hosts} if settings.host in ("127.0.0.1", "::1", "localhost") else None
    return Guards(keys=settings.keys, hosts=hosts, origins=settings.origins)


class _Server(uvicorn.Server):
    """uvicorn, whose handling of signals is ours: it ends by raising them again, and we end with 0."""

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


async def _serve(settings: Settings, listener: socket.socket, tell: Callable[[str], None]) -> None:
    endpoints = Endpoints(settings.limits.body)
    config = uvicorn.Config(
        endpoints.app(guards(settings)),
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    server = _Server(config)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set() and endpoints.service is not None:  # the second one: no patience
            loop.run_in_executor(None, endpoints.service.scheduler.close)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    tell(f"listening on {address}; the model is being loaded")
    stopping = asyncio.create_task(stop.wait())
    loading = asyncio.create_task(asyncio.to_thread(_load, settings))
    try:
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            endpoints.service = service = await loading
            tell(
                f"ready: {service.names[0]} on {service.model.backend.name}, {address} (page), {address}/v1 (for OpenAI's clients)"
            )
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            if not await asyncio.to_thread(service.scheduler.close, settings.patience):
                logger.warning("requests were cut off: they took more than %g s to end", settings.patience)
    finally:
        server.should_exit = True
        stopping.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)
    if not loading.done():
        await asyncio.wait({loading})  # a thread cannot be cancelled
    elif endpoints.service is not None and settings.cache_folder is not None:
        await asyncio.to_thread(_save, endpoints.service, settings.cache_folder)


def _load(settings: Settings) -> Service:
    model = load(settings.bundle, settings.backend, threads=settings.threads, low_memory=settings.low_memory)
    return build(settings, model)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port") from error


def _fill(cache: PrefixCache, store: Store) -> None:
    """Put what a folder holds into a cache, the last saved last, so that it is the last to go."""
    names: list[str] = []
    total = 0
    for name in store.names():
        total += store.bytes_of(name)
        if total > cache.budget:
            break
        names.append(name)
    for name in reversed(names):
        try:
            cache.keep(*store.load(name))
        except UserError as error:
            logger.warning("the cache leaves a state out: %s", error)


def _save(service: Service, folder: Path) -> None:
    """Write a cache to a folder, and remove from it what the cache no longer holds."""
    if service.cache is None:
        return
    store = Store(folder, service.model.bundle.manifest)
    entries = {name_of(tokens): (tokens, snapshot) for tokens, snapshot in reversed(service.cache.entries())}
    for name in set(store.names()) - set(entries):
        store.delete(name)
    known = set(store.names())
    for name, (tokens, snapshot) in entries.items():
        if name in known:
            store.touch(name)
        else:
            store.save(name, tokens, snapshot)
