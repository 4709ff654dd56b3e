"""Where an ONNX file says its weights are, without the package onnx: no path in it may leave the bundle.

Recent runtimes refuse such paths themselves, older ones open whatever file they name. An ONNX file is a protobuf message
(onnx.proto): a field is a number, a wire type and a value, and messages are nested as length-delimited fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from retnet_export.runtime.errors import UserError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""


MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
"""Which fields lead to a tensor's external data, by message; all others are skipped."""

DEPTH_LIMIT = 64
"""Nested subgraphs beyond this are an attack, not a model."""


def external_locations(content: bytes) -> set[str]:
    """The files that the tensors of an ONNX file are in.

    Raises:
        UserError: it is not an ONNX file.
    """
    try:
        return set(_locations("Model", memoryview(content), 0))
    except (IndexError, ValueError) as error:
        raise UserError(f"not an ONNX file: {error}") from error


def _locations(message: str, content: memoryview, depth: int) -> Iterator[str]:
    if depth > DEPTH_LIMIT:
        raise ValueError("messages nested too deeply")
    if message == "Entry":
        entry = dict(_fields(content))
        if bytes(entry.get(1, b"")) == b"location":
            yield bytes(entry.get(2, b"")).decode()
        return
    inner = MESSAGES[message]
    for number, value in _fields(content):
        if number in inner:
            yield from _locations(inner[number], value, depth + 1)


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and value of each length-delimited field."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        wire = key & 7
        if wire == VARINT:
            _, place = _varint(content, place)
        elif wire == BYTES:
            size, place = _varint(content, place)
            if place + size > len(content):
                raise ValueError("a field is longer than its message")
            yield key >> 3, content[place : place + size]
            place += size
        elif wire in (FIXED32, FIXED64):
            place += 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
