"""The one error for faults that a user can fix; anything else is a bug and keeps its traceback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """A fault in what the user gave: the message says what, where, what was expected and what to do.

    The command line prints it without a traceback and exits with 1.
    """


class ArgumentError(UserError):
    """An argument of a call that is not one of those allowed.

    The command line spells it as the flag it came from, and exits with 2.

    Args:
        name: of the parameter.
        problem: what is wrong with it: "is 3, expected …".
    """

    def __init__(self, name: str, problem: str) -> None:
        self.name, self.problem = name, problem
        super().__init__(f"{name} {problem}")


class MissingExtraError(UserError):
    """A package of an optional dependency group is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}', which is not installed: pip install 'retnet-export[{extra}]'")


EXTRAS: Mapping[str, tuple[str, str]] = {
    "gguf": ("gguf", "compare"),
    "huggingface_hub": ("huggingface-hub", "hub"),
    "jinja2": ("jinja2", "chat"),
    "matplotlib": ("matplotlib", "compare"),
    "ml_dtypes": ("ml-dtypes", "export"),
    "onnx": ("onnx", "export"),
    "onnx_ir": ("onnx-ir", "export"),
    "onnxruntime": ("onnxruntime", "cpu"),
    "prometheus_client": ("prometheus-client", "serve"),
    "pydantic": ("pydantic", "serve"),
    "starlette": ("starlette", "serve"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
    "sentencepiece": ("sentencepiece", "tokenizers"),
    "tiktoken": ("tiktoken", "tokenizers"),
    "torch": ("torch", "torch"),
    "transformers": ("transformers", "tokenizers"),
    "uvicorn": ("uvicorn", "serve"),
}
"""Modules of optional packages: the package's name, and the extra that brings it."""


def missing_extra(error: ModuleNotFoundError, purpose: str) -> MissingExtraError | None:
    """What to install if an import failed that an extra brings; None: the fault is another, and a bug.

    Args:
        error: the failed import.
        purpose: what needs it, for the message.
    """
    module = (error.name or "").partition(".")[0]
    return MissingExtraError(*EXTRAS[module], purpose) if module in EXTRAS else None


def what_is_missing(modules: Iterable[str]) -> str | None:
    """The command that installs what is missing of some modules of `EXTRAS`; None if all are there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    extras = dict.fromkeys(EXTRAS[module][1] for module in missing)
    packages = ", ".join(EXTRAS[module][0] for module in missing)
    return f"pip install 'retnet-export[{','.join(extras)}]' (missing: {packages})"


class CheckpointWarning(UserWarning):
    """Something in a checkpoint that was not read, and that the user should know of; the command line prints it once."""


class BackendWarning(UserWarning):
    """A backend that could have been used and was not, and why; or something it works around. The command line prints it once."""


class PrecisionWarning(UserWarning):
    """A format that was asked for and that this model is known to suffer from; the command line prints it once."""


def one_of(choices: Iterable[str]) -> str:
    """Choices as a message names them: "int8, int4 or keep"."""
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last
