"""From settings to a running server: the port opens at once, the model is loaded behind it, and a signal ends it in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load
from retnet_export.serve.endpoints import Endpoints
from retnet_export.serve.guards import LOOPBACK, Guards
from retnet_export.serve.metrics import Metrics
from retnet_export.serve.service import Service
from retnet_export.serve.settings import Settings, build, save_cache

logger = logging.getLogger(__name__)

LAST_SECONDS = 5
"""For connections to end, once nothing generates any more."""


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
    loading = asyncio.create_task(asyncio.to_thread(_load, settings, endpoints.metrics))
    try:
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            endpoints.service = service = await loading
            tell(
                f"ready: {service.names[0]} on {service.model.backend.name}, {address} (page), {address}/v1 (for OpenAI's clients)"
            )
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            if not await asyncio.to_thread(service.scheduler.close, settings.patience):
                logger.warning("requests were cancelled: they did not finish within %g s", settings.patience)
    finally:
        server.should_exit = True
        stopping.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)
    if not loading.done():
        await asyncio.wait({loading})  # a thread cannot be cancelled
    elif endpoints.service is not None and settings.cache_folder is not None:
        await asyncio.to_thread(save_cache, endpoints.service, settings.cache_folder)


def _load(settings: Settings, metrics: Metrics) -> Service:
    model = load(settings.bundle, settings.backend, threads=settings.threads, low_memory=settings.low_memory)
    service = build(settings, model, metrics)
    metrics.watch(service.scheduler, service.cache)
    return service


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another host or port") from error
