"""Exports trained RetNets to recurrent ONNX graphs, and runs them."""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> object:
    # Lazily: asking for installed packages takes longer than all of `--help`.
    if name == "__version__":
        from importlib.metadata import version

        return version("retnet-export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
