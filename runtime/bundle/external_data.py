"""Where an ONNX file says its weights are, without the package onnx: no path in it may leave the bundle.

Recent runtimes refuse such paths themselves, older ones open whatever file they name. An ONNX file is a protobuf message
(onnx.proto): a field is a number, a wire type and a value, and messages are nested as length-delimited fields.

A backend that puts the weights on a device itself, once for several graphs, asks for the graph's initializers one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
    """The files that the tensors of an ONNX file are in."""
    try:
        return set(_locations("Model", memoryview(content), 0))
    except (IndexError, ValueError) as error:
        raise UserError(f"not an ONNX file: {error}") from error


@dataclass(frozen=True)
class StoredInitializer:
    """An initializer of a graph whose bytes are in another file.

    Attributes:
        name: as in the graph.
        element_type: ONNX's number for it, `TensorProto.DataType`.
        shape: its sizes.
        location: the file, as the ONNX file names it.
        offset: where in the file it begins, in bytes.
        length: how many bytes it has there; None if the ONNX file does not say.
        readers: operators that read it, by name.
    """

    name: str
    element_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int | None
    readers: frozenset[str]


def stored_initializers(content: bytes) -> list[StoredInitializer]:
    """The initializers of an ONNX file's main graph that are stored elsewhere."""
    try:
        graph = [value for number, value in _fields(memoryview(content)) if number == 7]
        parts = [part for each in graph for part in _fields(each)]
        readers: dict[str, set[str]] = {}
        for _, node in (part for part in parts if part[0] == 1):
            fields = list(_fields(node))
            operator = next((bytes(value).decode() for number, value in fields if number == 4), "")
            for read in (bytes(value).decode() for number, value in fields if number == 1):
                readers.setdefault(read, set()).add(operator)
        tensors = (_initializer(value, readers) for number, value in parts if number == 5)
        return [tensor for tensor in tensors if tensor is not None]
    except (IndexError, ValueError) as error:
        raise UserError(f"not an ONNX file: {error}") from error


def _initializer(content: memoryview, readers: Mapping[str, set[str]]) -> StoredInitializer | None:
    """A TensorProto: dims 1, data_type 2, name 8, external_data 13."""
    shape: list[int] = []
    element_type, name, place = 0, "", {}
    for number, value in _values(content):
        if number == 1:  # one by one, or packed
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            element_type = value
        elif number == 8 and not isinstance(value, int):
            name = bytes(value).decode()
        elif number == 13 and not isinstance(value, int):
            entry = {key: bytes(text).decode() for key, text in _fields(value)}
            place[entry.get(1, "")] = entry.get(2, "")
    if "location" not in place:
        return None
    length = int(place["length"]) if "length" in place else None
    offset, users = int(place.get("offset", "0")), frozenset(readers.get(name, ()))
    return StoredInitializer(name, element_type, tuple(shape), place["location"], offset, length, users)


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
    """Number and content of each length-delimited field."""
    return ((number, value) for number, value in _values(content) if isinstance(value, memoryview))


def _values(content: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of each length-delimited field and of each integer."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        wire = key & 7
        if wire == VARINT:
            integer, place = _varint(content, place)
            yield key >> 3, integer
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


def _varints(content: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(content):
        value, place = _varint(content, place)
        values.append(value)
    return values


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
