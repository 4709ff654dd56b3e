"""Runs bundles: NumPy and one backend, never torch. This is what is copied to the device."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retnet_export.runtime.errors import ArgumentError, UserError
    from retnet_export.runtime.generate.batching import Completion, Prompt, generate_many
    from retnet_export.runtime.generate.conversation import Conversation
    from retnet_export.runtime.generate.generation import Options, Piece
    from retnet_export.runtime.generate.session import Session
    from retnet_export.runtime.generate.state import Snapshot
    from retnet_export.runtime.generate.stats import Stats
    from retnet_export.runtime.generate.templates import ChatTemplate
    from retnet_export.runtime.model import Model, load

__all__ = [
    "ArgumentError",
    "ChatTemplate",
    "Completion",
    "Conversation",
    "Model",
    "Options",
    "Piece",
    "Prompt",
    "Session",
    "Snapshot",
    "Stats",
    "UserError",
    "generate_many",
    "load",
]

MODULES = {
    "ArgumentError": "errors",
    "ChatTemplate": "generate.templates",
    "Completion": "generate.batching",
    "Conversation": "generate.conversation",
    "Model": "model",
    "Options": "generate.generation",
    "Piece": "generate.generation",
    "Prompt": "generate.batching",
    "Session": "generate.session",
    "Snapshot": "generate.state",
    "Stats": "generate.stats",
    "UserError": "errors",
    "generate_many": "generate.batching",
    "load": "model",
}


def __getattr__(name: str) -> object:
    # Lazily, so that importing one dataclass does not import NumPy-heavy modules: --help stays quick.
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
