"""JSON documents that know their own SHA-256, so that a flipped bit anywhere in them is noticed: manifests, and records of engines.

Rule: the hash stands in the document, under `sha256` at its top, and is that of the file's bytes with zeros in its place. So it
covers every byte: the prose, which nothing else checks, as well as the figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from retnet_export.runtime.bundle.schema import decode
from retnet_export.runtime.errors import UserError

KEY = "sha256"
NOTHING = "0" * 64
LARGEST = 16 << 20
"""Bytes of a file; a real one has some ten thousand."""
T = TypeVar("T")


def sealed(document: Mapping[str, object]) -> bytes:
    """The file of a document, with its hash."""
    content = json.dumps({KEY: NOTHING, **document}, indent=2) + "\n"
    return content.replace(NOTHING, hashlib.sha256(content.encode()).hexdigest(), 1).encode()


def check_seal(document: dict[str, object], content: bytes) -> None:
    """Take the hash out of a document that was read, and compare it with the file's content."""
    found = document.pop(KEY, None)
    if not isinstance(found, str) or len(found) != len(NOTHING):
        raise UserError("it has no checksum of itself, so it is damaged or was written by hand")
    if hashlib.sha256(content.replace(found.encode(), NOTHING.encode(), 1)).hexdigest() != found:
        raise UserError("it was changed: its content does not match its own SHA-256")


def read_sealed(
    kind: type[T], path: Path, form: str, version: int, damaged: str, other_version: Callable[[Mapping[str, object]], str]
) -> T:
    """Read a document that `sealed` wrote, whose fields `format` and `format_version` must be these.

    Raises:
        UserError: it cannot be read, is damaged, or is something else; `damaged` or `other_version` says what to do about it.
    """
    what = form.removeprefix("retnet-export ")
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path}: {size:,} bytes, the description of a {what} has at most {LARGEST:,}")
        content = path.read_bytes()
        document = json.loads(content, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {damaged}") from error
    if not isinstance(document, dict) or document.get("format") != form:
        raise UserError(f"{path}: not a description of a {what}: the field 'format' is not {form!r}; {damaged}")
    if (found := document.get("format_version")) != version:
        raise UserError(
            f"{path}: {what} format {found!r}, this version of retnet-export reads {version}; {other_version(document)}"
        )
    try:
        check_seal(document, content)
    except UserError as error:
        raise UserError(f"{path}: {error}; {damaged}") from error
    return decode(kind, document, str(path))


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object without equal keys; of two, Python would take the last, other readers the first."""
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
