"""A server on the loopback, in a thread of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import uvicorn

from retnet_export.runtime.model import Model
from retnet_export.serve.endpoints import Endpoints
from retnet_export.serve.server import guards
from retnet_export.serve.service import Service
from retnet_export.serve.settings import Settings, build


@contextlib.contextmanager
def server(model: Model, **settings: object) -> Iterator[tuple[str, Service]]:
    """Its address and what serves."""
    chosen = replace(Settings(bundle=Path("."), port=0), **settings)
    endpoints = Endpoints(chosen.limits.body)
    config = uvicorn.Config(endpoints.app(guards(chosen)), lifespan="off", log_level="warning", access_log=False)
    uvicorn_server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        while httpx.get(f"{address}/health").status_code != 503:
            time.sleep(0.01)
        service = build(chosen, model, endpoints.metrics)
        endpoints.metrics.watch(service.scheduler, service.cache)
        endpoints.service = service
        yield address, endpoints.service
    finally:
        if endpoints.service is not None:
            endpoints.service.scheduler.close()
        uvicorn_server.should_exit = True
        thread.join()
        listener.close()
