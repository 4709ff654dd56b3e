"""Parameters of the kernels of kernels/*.cuh, as ctypes structures: the fields of each struct there, in its order."""

from __future__ import annotations

import ctypes


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A kernel's parameters: "p" is an address, "i" an int, in the order of the struct in kernels/*.cuh."""
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kinds[kind]) for field, kind in pairs]})


Product = _struct("Product", "weights:p scales:p bias:p x:p y:p tokens:i outputs:i runs:i x_stride:i y_stride:i parts:i placed:i")
Embed = _struct(
    "Embed", "table:p row_scales:p norm_weight:p norm_bias:p phase:p tokens:p slots:p slot_of:p index_of:p x:p angles:p runs:i"
)
Norm = _struct("Norm", "x:p added:p weight:p bias:p out:p rows:p parts:i total:i stride:i normed:i keep:i placed:i")
Inner = _struct("Inner", "hidden:p weight:p bias:p out:p stride:i placed:i")
Heads = _struct(
    "Heads", "o:p projections:p weight:p bias:p log_gamma:p slots:p slot_of:p index_of:p out:p stride:i total:i placed:i"
)
Advance = _struct("Advance", "slots:p lengths:p count:i")
Ring = _struct("Ring", "projections:p angles:p powers:p queries:p weights:p slots:p layer:i")
RetentionStep = _struct("RetentionStep", "slots:p powers:p queries:p weights:p o:p layer:i count:i")
RetentionFew = _struct("RetentionFew", "projections:p angles:p powers:p slots:p o:p lengths:p needed:p starts:p kept:p layer:i")
Rotate = _struct("Rotate", "projections:p angles:p rotated:p")
RetentionPrompt = _struct("RetentionPrompt", "rotated:p projections:p powers:p slots:p o:p lengths:p needed:p starts:p layer:i")
Top = _struct("Top", "logits:p slots:p places:p step:i")
Slots = _struct(
    "Slots",
    "state:p positions:p keys:p values:p counters:p logits:p found:p tokens:p largest:p draft_keys:p draft_values:p batch:i side:i",
)
