"""Models whose runners do one thing in another way: fail, wait, or note what they are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retnet_export.runtime.model import Model


class _Altered:
    """A backend that lets `alter` change each runner it opens."""

    def __init__(self, backend, alter: Callable[[Any], None]) -> None:
        self._backend, self._alter = backend, alter

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def open_runner(self, batch: int):
        runner = self._backend.open_runner(batch)
        self._alter(runner)
        return runner


def with_runners(model: Model, alter: Callable[[Any], None]) -> Model:
    """The same model with other runners; `alter` may set their methods."""
    return Model(model.bundle, _Altered(model.backend, alter))
