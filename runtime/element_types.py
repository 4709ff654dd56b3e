"""The types of elements that manifests and graphs name: one table, from which every other module takes bits and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Computed = Literal["float32", "float16", "bfloat16"]
Stored = Literal["float32", "float16"]


@dataclass(frozen=True)
class ElementType:
    """One type.

    Attributes:
        name: in manifests, and in NumPy where it has the type.
        short: on the command line.
        onnx: in ONNX; ONNX Runtime writes it small, as in tensor(float16).
        bits: of one element.
    """

    name: str
    short: str
    onnx: str
    bits: int


ELEMENT_TYPES: Mapping[str, ElementType] = {
    each.name: each
    for each in (
        ElementType("float32", "fp32", "FLOAT", 32),
        ElementType("float16", "fp16", "FLOAT16", 16),
        ElementType("bfloat16", "bf16", "BFLOAT16", 16),
        ElementType("int64", "int64", "INT64", 64),
        ElementType("int8", "int8", "INT8", 8),
        ElementType("int4", "int4", "INT4", 4),
        ElementType("float8", "fp8", "FLOAT8E4M3FN", 8),
        ElementType("float4", "fp4", "FLOAT4E2M1", 4),
    )
}
COMPUTED: Mapping[str, Computed] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What products are computed in, by the short name."""
STORED: Mapping[str, Stored] = {"fp32": "float32", "fp16": "float16"}
"""What states are stored in, by the short name."""
