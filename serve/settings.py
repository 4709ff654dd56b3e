"""From settings and a model to a service, for the HTTP server or Triton."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_export.runtime.bundle.files import read_text
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.engine import READ_TOKENS
from retnet_export.runtime.generate.templates import ChatTemplate, PlainTemplate, Template
from retnet_export.serve.cache import PrefixCache
from retnet_export.serve.prompts import Prompts
from retnet_export.serve.scheduler import Observer, Scheduler
from retnet_export.serve.service import Limits, Service
from retnet_export.serve.store import Store, name_of

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model

logger = logging.getLogger(__name__)


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
        speculate: tokens to guess ahead, as in `Options`.
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
    read_tokens: int = READ_TOKENS
    speculate: int | None = None
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


def build(settings: Settings, model: Model, observer: Observer | None = None) -> Service:
    """What serves a loaded model; an observer hears what happens.

    Raises:
        UserError: a folder cannot be made.
    """
    manifest = model.bundle.manifest
    cache = PrefixCache(settings.cache_bytes) if settings.cache_bytes else None
    if cache is not None and settings.cache_folder is not None:
        _fill(cache, Store(settings.cache_folder, manifest))
    template = _template(settings, model)
    scheduler = Scheduler(
        model, slots=settings.slots, queue=settings.queue, read_tokens=settings.read_tokens, cache=cache, observer=observer
    )
    return Service(
        model=model,
        names=(manifest.name, *settings.names),
        scheduler=scheduler,
        prompts=Prompts(model, template),
        limits=settings.limits,
        cache=cache,
        store=None if settings.states is None else Store(settings.states, manifest),
        speculate=settings.speculate,
    )


def _template(settings: Settings, model: Model) -> Template:
    """How chats are written: as the settings say, as the bundle says, or plainly."""
    if settings.template is not None:
        spec = model.bundle.manifest.tokenizer
        return ChatTemplate(read_text(settings.template), spec.special_tokens if spec else None, str(settings.template))
    return model.chat_template or PlainTemplate(settings.before, settings.after)


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
            logger.warning("the cache skips a state: %s", error)


def save_cache(service: Service, folder: Path) -> None:
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
