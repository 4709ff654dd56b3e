"""Portable bundle in, the same model in a runtime's own dialect out: graphs rewritten, weights copied or packed anew.

Rule: the portable bundle, quantized or not, is what is kept and handed on; a dialect is made from it for one runtime. Where
the rewrites leave the weights alone, weights.bin is copied byte by byte, so that saved states fit both bundles; where they
pack matrices anew (`MatMulNBits` on CUDA), tensors are streamed one at a time, and those that no graph reads stay behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from retnet_export.runtime.bundle.bundle import MANIFEST, Bundle, open_bundle
from retnet_export.runtime.bundle.files import new_folder
from retnet_export.runtime.bundle.manifest import Dialect, FileRecord
from retnet_export.runtime.errors import MissingExtraError, UserError, one_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from retnet_export.graph.weights_file import WeightsFile

WEIGHTS = "weights.bin"


def convert_bundle(
    source: Bundle,
    target: str | Path,
    dialect: Dialect,
    *,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> Bundle:
    """Write a copy of a portable bundle in another dialect.

    Args:
        source: the portable bundle.
        target: the folder to make.
        dialect: "onnxruntime-cpu" or "onnxruntime-cuda".
        force: replace an existing bundle.
        progress: is told what is being done, and the share done.

    Raises:
        UserError: the source is no portable bundle, the dialect is unknown, or the target cannot be written; nothing is left
            behind.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingExtraError("onnx-ir", "export", "converting") from error
    from retnet_export.graph.derived import write_derived_bundle
    from retnet_export.graph.dialects import DIALECTS, rewrite

    _check(source, target, dialect)
    manifest = source.manifest
    graphs = {name: rewrite(ir.load(source.file(spec.file)), DIALECTS[dialect]) for name, spec in manifest.graphs.items()}
    with new_folder(target, marker=MANIFEST, force=force) as folder:
        weights = _write_weights(source, folder, graphs, progress)
        write_derived_bundle(source, folder, target, graphs, weights, dialect=dialect)
    return open_bundle(target, check_hashes=False)


def _check(source: Bundle, target: str | Path, dialect: str) -> None:
    choices = [name for name in get_args(Dialect) if name != "portable"]
    if dialect not in choices:
        raise UserError(f"--dialect is {dialect!r}, expected {one_of(choices)}")
    if source.manifest.dialect != "portable":
        raise UserError(
            f"{source.path}: its graphs are in the {source.manifest.dialect} dialect already; "
            "give the portable bundle that it was made from, or export the checkpoint without --dialect"
        )
    activations = (source.manifest.quantization or {}).get("activations")
    if activations is not None and dialect == "onnxruntime-cuda":
        raise UserError(
            f"{source.path}: its activations are {activations}, for TensorRT, and the products of {dialect} take them as floats; "
            "give a bundle quantized without --activations"
        )
    if Path(target).resolve() == source.path.resolve():
        raise UserError(f"{target}: the output is the input; choose another name")


def _write_weights(source: Bundle, folder: Path, graphs: dict[str, ir.Model], progress: Callable[[str, float], None]) -> FileRecord:
    """Let every large tensor of the graphs refer to a weights file in `folder`, and write that file."""
    from retnet_export.graph.weights_file import WeightsFile

    external, packed = _large_tensors(graphs)
    if not packed:
        shutil.copyfile(source.file(WEIGHTS), folder / WEIGHTS)
        for value, tensor in external:
            value.const_value = _moved(tensor, folder)
        return source.manifest.files[WEIGHTS]
    with WeightsFile(folder / WEIGHTS) as file:
        written: dict[tuple[int, int], ir.ExternalTensor] = {}
        for done, value in enumerate([value for value, _ in external] + packed):
            value.const_value = _stored(value, file, written)
            progress("packing weights", (done + 1) / (len(external) + len(packed)))
        return file.record()


def _large_tensors(graphs: dict[str, ir.Model]) -> tuple[list[tuple[ir.Value, ir.ExternalTensor]], list[ir.Value]]:
    """Initializers in the source's weights file, and those that a rewrite makes of them."""
    import onnx_ir as ir

    external: list[tuple[ir.Value, ir.ExternalTensor]] = []
    packed = []
    for model in graphs.values():
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                external.append((value, value.const_value))
            elif isinstance(value.const_value, ir.LazyTensor):
                packed.append(value)
    return external, packed


def _moved(tensor: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    import onnx_ir as ir

    return ir.ExternalTensor(
        location=WEIGHTS,
        offset=tensor.offset,
        length=tensor.length,
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir=str(folder),
    )


def _stored(value: ir.Value, file: WeightsFile, written: dict[tuple[int, int], ir.ExternalTensor]) -> ir.ExternalTensor:
    """A tensor of the new file; bytes that the source holds once under two names (a tied embedding) are held once again."""
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    assert tensor.name is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return file.tensor(tensor.name, tensor.numpy)
    place = (tensor.offset or 0, tensor.length or 0)
    if place not in written:
        written[place] = file.tensor(tensor.name, tensor.numpy)
    first = written[place]
    if first.name == tensor.name:
        return first
    return file.view(tensor.name, first, tensor.dtype, [int(size) for size in tensor.shape])  # type: ignore[arg-type]
