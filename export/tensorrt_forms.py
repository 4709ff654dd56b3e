"""The bundle's graphs in the forms that TensorRT compiles best, in a folder that exists while a build runs.

Rule: weights are not copied. The folder holds a link to the bundle's weights file, and what is new in the forms: the
planes of INT8 matrices, and a second copy of what TensorRT must not see twice.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import FOLDER
from retnet_export.runtime.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from retnet_export.graph.weights_file import WeightsFile

JOINED = "joined"
WEIGHTS = "weights.bin"


@dataclass(frozen=True)
class Forms:
    """Graphs ready to be parsed.

    Attributes:
        files: the ONNX file of each graph, and of both in one ("joined") if asked for.
        tables: rows of each initializer that a Gather reads, by the Gather's name.
        int8: how INT8 weights are read: there are none, as planes, or as they are.
        floats: INT8 matrices that do not fit into planes.
    """

    files: dict[str, Path]
    tables: dict[str, int]
    int8: Literal["none", "planes", "plain"]
    floats: tuple[str, ...]


@contextmanager
def tensorrt_forms(bundle: Bundle, *, join: bool, planes: bool, largest: int | None = None) -> Iterator[Forms]:
    """Write the forms of a bundle's graphs; they are gone when the context ends.

    Args:
        bundle: the bundle, with portable graphs.
        join: both graphs in one as well.
        planes: INT8 weights as two planes of four bits.
        largest: bytes of a product's weight at most; no limit when None.

    Raises:
        UserError: the folder cannot be written, or a package is missing.
    """
    try:
        import onnx
        import onnx_ir as ir
    except ImportError as error:
        raise MissingExtraError("onnx and onnx-ir", "export", "compiling") from error
    from retnet_export.graph.tensorrt.joined import joined
    from retnet_export.graph.tensorrt.largest import LargestWeightPass
    from retnet_export.graph.tensorrt.planes import Int8AsPlanesPass
    from retnet_export.graph.tensorrt.readout import ReadOutAsSumPass
    from retnet_export.graph.variants.element_types import InferElementTypes
    from retnet_export.graph.weights_file import WeightsFile

    folder = _folder(bundle)
    try:
        (folder / WEIGHTS).symlink_to(bundle.file(WEIGHTS).resolve())
        models, tables, left, found = {}, dict[str, int](), list[str](), False
        with WeightsFile(folder / "forms.bin") as file:
            for name, spec in bundle.manifest.graphs.items():
                model = InferElementTypes()(ir.load(bundle.file(spec.file))).model
                ReadOutAsSumPass()(model)
                if largest is not None:
                    LargestWeightPass(file, largest)(model)
                split = Int8AsPlanesPass(file)
                if planes:
                    found |= split(model).modified
                left += split.left
                _finish(model)
                _keep_apart(model, file)
                tables |= _tables(model)
                models[name] = ir.to_proto(model)
        if join:
            models[JOINED] = joined({f"{name}.": model for name, model in models.items()})
        files = {name: folder / f"{name}.onnx" for name in models}
        for name, model in models.items():
            onnx.save(model, files[name])
        any_int8 = any(tensor.data_type == onnx.TensorProto.INT8 for tensor in models["decode"].graph.initializer)
        yield Forms(files, tables, "planes" if found else "plain" if any_int8 else "none", tuple(dict.fromkeys(left)))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; compiling puts its graphs there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not any((bundle.path / FOLDER).iterdir()):
            (bundle.path / FOLDER).rmdir()


def _folder(bundle: Bundle) -> Path:
    """A new folder on the bundle's disk: a Jetson's /tmp is its memory."""
    try:
        (bundle.path / FOLDER).mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="forms-", dir=bundle.path / FOLDER))
    except OSError as error:
        raise UserError(f"{bundle.path / FOLDER}: cannot be written: {error.strerror}; no engine was made") from error


def _finish(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)


def _keep_apart(model: ir.Model, file: WeightsFile) -> None:
    """Give a tensor of its own to what is read in two shapes.

    A quantized embedding that is the output head as well stands in the file once and is read as bytes and as words. TensorRT knows
    weights by their address and refuses one address with two sizes.
    """
    import onnx_ir as ir

    seen: set[tuple[str, int]] = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        place = (str(tensor.location), tensor.offset or 0)
        if place in seen:
            value.const_value = file.tensor(str(value.name), tensor.numpy)
        seen.add(place)


def _tables(model: ir.Model) -> dict[str, int]:
    """Rows of the large constants that a Gather reads, by the Gather's name."""
    import onnx_ir as ir

    return {
        str(node.name): int(node.inputs[0].const_value.shape.numpy()[0])
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] is not None and isinstance(node.inputs[0].const_value, ir.ExternalTensor)
    }
