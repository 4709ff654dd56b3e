"""Types of elements as onnx-ir has them, by the names of manifests."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir

from retnet_export.runtime.bundle.manifest import DType
from retnet_export.runtime.element_types import ELEMENT_TYPES


def onnx_type(name: str) -> ir.DataType:
    """ "float16" -> FLOAT16, whose `numpy()` is NumPy's or ml_dtypes'."""
    return ir.DataType[ELEMENT_TYPES[name].onnx]


def name_of_type(kind: ir.DataType) -> DType:
    """FLOAT16 -> "float16"."""
    return cast(DType, next(each.name for each in ELEMENT_TYPES.values() if each.onnx == kind.name))
