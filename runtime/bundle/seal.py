"""JSON documents that know their own SHA-256, so that a flipped bit anywhere in them is noticed.

Rule: the hash stands in the document, under `sha256` at its top, and is that of the file's bytes with zeros in its place. So it
covers every byte: the prose, which nothing else checks, as well as the figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from retnet_export.runtime.errors import UserError

KEY = "sha256"
NOTHING = "0" * 64


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
