"""Runs bundles: NumPy and one backend, never torch. This is what is copied to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retnet_export.runtime.session import Model, Session, load

__all__ = ["Model", "Session", "load"]


def __getattr__(name: str) -> object:
    # Lazily, so that importing one dataclass does not import NumPy-heavy modules: --help stays quick.
    if name in __all__:
        from retnet_export.runtime import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
