"""A bundle's weights in one device buffer, read there by every ONNX Runtime session that runs one of its graphs.

Rule: bytes that two graphs name are on the device once. ONNX Runtime loads the initializers of each session for itself, unless
it is handed a value for one (`SessionOptions.add_initializer`) that lies on the device where the graph wants it and whose
memory belongs to whoever hands it over. Its Python API makes such a value of an address in one place only: an `IOBinding` makes
one of every output that is bound by address. So each weight is bound as the output of a graph that is never run.

Weights that are read by DequantizeLinear are left to the session: ONNX Runtime repacks them when it loads the graph, and what
was put here would be held beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retnet_export.runtime.bundle.external_data import StoredInitializer, stored_initializers
from retnet_export.runtime.device import cuda

if TYPE_CHECKING:
    import onnxruntime

ITEM_BYTES: Mapping[int, int] = {1: 4, 2: 1, 3: 1, 6: 4, 10: 2, 16: 2}
"""Bytes of an element, by ONNX's number: float32, uint8, int8, int32, float16, bfloat16. Others stay with the session."""

SMALLEST = 4096
"""Bytes of a weight worth sharing. Below are vectors and shapes, which a graph may want on the host."""

ALIGNMENT = 256
"""Of addresses, as of CUDA's own allocations."""

IDENTITY = bytes.fromhex("08083a2b0a100a017812017922084964656e746974791201675a090a017812040a02080162090a017912040a0208014202100d")
"""The ONNX file of y = x: a float32 input x, a float32 output y, one node Identity, opset 13."""


class DeviceWeights:
    """The weights of some graphs on the device.

    Args:
        graphs: ONNX files of one bundle, whose external data lies beside them.
        stream: copies to the device; waited for.

    Raises:
        CudaMemoryError: they do not fit.
    """

    def __init__(self, graphs: Mapping[str, Path], stream: cuda.Stream) -> None:
        import onnxruntime

        stored = {
            graph: [each for each in stored_initializers(path.read_bytes()) if _shared(each)] for graph, path in graphs.items()
        }
        folders = {graph: path.parent for graph, path in graphs.items()}
        files: dict[Path, np.memmap[tuple[int], np.dtype[np.uint8]]] = {}
        places: dict[tuple[Path, int, int], int] = {}
        self.bytes = 0
        for graph, tensors in stored.items():
            for each in list(tensors):
                path, size = folders[graph] / each.location, _size(each)
                if path not in files:
                    files[path] = np.memmap(path, np.uint8, "r")
                if each.offset + size > files[path].size:
                    tensors.remove(each)  # the session's own message says that the file is too short
                elif (path, each.offset, size) not in places:
                    places[path, each.offset, size] = self.bytes
                    self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._buffer = cuda.DeviceBuffer(self.bytes)
        for (path, offset, size), place in places.items():
            stream.copy_to_device(self._buffer, files[path][offset : offset + size], place)
        stream.synchronize()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(IDENTITY, options, providers=["CPUExecutionProvider"])
        self._values = {
            graph: {
                each.name: self._value(each, places[folders[graph] / each.location, each.offset, _size(each)]) for each in tensors
            }
            for graph, tensors in stored.items()
        }

    def add_to(self, options: onnxruntime.SessionOptions, graph: str) -> None:
        """Let a session of one of the graphs read its weights here. It must be gone before this object is."""
        for name, value in self._values[graph].items():
            options.add_initializer(name, value)

    def _value(self, tensor: StoredInitializer, place: int) -> onnxruntime.OrtValue:
        binding = self._session.io_binding()
        binding.bind_output("y", "cuda", 0, tensor.element_type, tensor.shape, self._buffer.address + place)
        return binding.get_outputs()[0]


def _shared(tensor: StoredInitializer) -> bool:
    return (
        tensor.element_type in ITEM_BYTES
        and tensor.length in (None, _size(tensor))
        and _size(tensor) >= SMALLEST
        and "DequantizeLinear" not in tensor.readers
    )


def _size(tensor: StoredInitializer) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.element_type]
