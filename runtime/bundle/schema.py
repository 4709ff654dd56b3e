"""Frozen dataclasses from untrusted JSON: every field is checked, and a fault is named by its path in the document.

Rule: nothing that a manifest says is believed before its type is right. Supported field types are those the manifest
uses: str, int, float, bool, None, Literal, unions with None, tuple[T, ...], Mapping[str, T], nested dataclasses, and
`object` for free-form records that nothing reads back.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from retnet_export.runtime.errors import UserError

T = TypeVar("T")


def decode(kind: type[T], value: object, where: str) -> T:
    """Build a dataclass from a JSON value; `where` is the document's name for messages.

    Raises:
        UserError: a field is missing, unknown, or of the wrong type; the message names its path.
    """
    return typing.cast(T, _decode(kind, value, where))


def encode(value: Any) -> object:
    """The inverse: a JSON value from a dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(entry) for entry in value]
    return value


def not_finite(document: object, where: str = "") -> tuple[str, float] | None:
    """The first NaN or infinity in a JSON document, with its path; None if all its numbers are numbers."""
    if isinstance(document, float) and not math.isfinite(document):
        return where, document
    entries: Iterable[tuple[object, object]] = ()
    if isinstance(document, Mapping):
        entries = document.items()
    elif isinstance(document, (list, tuple)):
        entries = enumerate(document)
    for key, entry in entries:
        inner = f"[{key}]" if isinstance(key, int) else f".{key}" if where else str(key)
        if found := not_finite(entry, where + inner):
            return found
    return None


def _decode(kind: Any, value: object, where: str) -> object:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if kind is object:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, where)
    if origin is typing.Literal:
        # JSON's true equals Python's 1: compare the types too.
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _fault(where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _decode(inner, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _fault(where, "a list", value)
        return tuple(_decode(arguments[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _fault(where, "an object", value)
        return {key: _decode(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise _fault(where, names[kind], value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _fault(where, "a finite number", value)
    return value


def _decode_dataclass(kind: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise _fault(where, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; it may come from a newer version of retnet-export")
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: the field {name!r} is missing")
    try:
        return kind(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _fault(where: str, expected: str, value: object) -> UserError:
    shown = repr(value)
    return UserError(f"{where}: expected {expected}, found {shown if len(shown) <= 60 else shown[:57] + '...'}")
