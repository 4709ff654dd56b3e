"""Compares what a runtime loaded with the manifest, for every backend, before buffers are allocated.

Rule: names, element types and sizes of all inputs and outputs are compared. The hashes of a bundle's files say that nothing has
changed since the manifest was written; this check says that the manifest is true.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from retnet_export.runtime.bundle.manifest import GraphSpec, TensorSpec
from retnet_export.runtime.errors import UserError


def check_agrees(
    path: Path, spec: GraphSpec, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], *, added: Collection[str] = ()
) -> None:
    """Compare a loaded graph or engine with the manifest.

    Args:
        path: its file, for messages.
        spec: what the manifest says.
        inputs, outputs: what the runtime found, -1 for a size that it leaves open.
        added: outputs that the manifest need not name.

    Raises:
        UserError: a name, type or size differs.
    """
    for kind, expected, found in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        actual = {tensor.name: tensor for tensor in found}
        for tensor in expected:
            other = actual.pop(tensor.name, None)
            if other != tensor:
                raise UserError(
                    f"{path}: the manifest has {kind} {tensor.name!r} as {tensor.dtype}{list(tensor.shape)}, it has "
                    + ("none of that name" if other is None else f"{other.dtype}{list(other.shape)}")
                    + "; the bundle is damaged: export it again"
                )
        if unnamed := sorted(set(actual) - set(added)):
            raise UserError(
                f"{path}: has an {kind} {unnamed[0]!r} that is not in the manifest; the bundle is damaged: export it again"
            )
