"""A bundle's graph as onnx-ir has it, with its weights where they really are.

onnx-ir opens no link that leaves the graph's folder, but in the cache of the Hugging Face Hub every file is such a link.
`open_bundle` has looked where the links lead and compared the files with the manifest's hashes, so this is safe.
"""

from __future__ import annotations

import onnx_ir as ir

from retnet_export.runtime.bundle.bundle import Bundle


def load_graph(bundle: Bundle, file: str) -> ir.Model:
    """Read one of a bundle's graphs; its large tensors are read from the bundle's files when they are asked for."""
    model = ir.load(bundle.file(file))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        place = bundle.file(str(tensor.location)).resolve()
        if place.parent != bundle.path.resolve():
            value.const_value = ir.ExternalTensor(
                location=place.name,
                offset=tensor.offset,
                length=tensor.length,
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or "",
                base_dir=str(place.parent),
            )
    return model


def tensor_of(model: ir.Model, name: str) -> ir.TensorProtocol:
    """The tensor of one of a graph's initializers."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor
