"""Device memory under one address, made of pieces: for a GPU where one large allocation fails though enough memory is free.

On a Jetson the system's memory is the GPU's, and after a while its free part is in fragments: an output head of 32,000 x 4,096 in
fp16 asks for 262 MB at once. CUDA's virtual memory management maps several allocations side by side, so kernels see one range of
addresses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from retnet_export.runtime.device import cuda, kernels
from retnet_export.runtime.errors import UserError

LARGEST_VARIABLE = "RETNET_EXPORT_LARGEST_ALLOCATION_MB"
"""Environment variable: no allocation on the GPU is larger; without it, an allocation is cut only if it fails whole."""


def largest_allocation() -> int | None:
    """Bytes of one allocation at most, if the user says so.

    Raises:
        UserError: what the user says is no number of megabytes.
    """
    text = os.environ.get(LARGEST_VARIABLE)
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{LARGEST_VARIABLE} is {text!r}, expected a number of megabytes, such as 64")
    return int(text) << 20


def cut(total: int, largest: int, grain: int, create: Callable[[int], None]) -> None:
    """Create pieces that add up to `total`, a multiple of `grain`; halve them when one does not fit.

    Args:
        total: bytes.
        largest: bytes of a piece at most.
        grain: pieces are multiples of so many bytes.
        create: makes the next piece of so many bytes.

    Raises:
        CudaError: not even a piece of `grain` bytes fits, or something else went wrong.
    """
    piece = max(grain, min(total, largest) // grain * grain)
    left = total
    while left:
        try:
            create(min(piece, left))
        except cuda.CudaError as error:
            if error.code not in cuda.OUT_OF_MEMORY or piece == grain:
                raise
            piece = max(grain, min(piece, left) // 2 // grain * grain)
        else:
            left -= min(piece, left)


class Pieces:
    """Memory of several allocations under one address; freed with `close`.

    Args:
        size: bytes, at least.
        largest: bytes of one allocation, at most.

    Attributes:
        address: of the first byte.
        count: how many allocations there are.

    Raises:
        CudaError: they do not fit, or this GPU cannot map them.
    """

    def __init__(self, size: int, largest: int) -> None:
        driver = kernels._driver()
        cuda.call("cudaFree", 0)  # the runtime's context, if nothing has made it current yet in this thread
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = 0
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        grain = int(kernels.call("cuMemGetAllocationGranularity", properties, minimum))
        self._reserved = -(-max(size, 1) // grain) * grain
        self._range = kernels.call("cuMemAddressReserve", self._reserved, 0, 0, 0)
        self.address, self._mapped, self.count = int(self._range), 0, 0

        def create(piece: int) -> None:
            handle = kernels.call("cuMemCreate", piece, properties, 0)
            try:
                kernels.call("cuMemMap", self.address + self._mapped, piece, 0, handle, 0)
            finally:
                kernels.call("cuMemRelease", handle)  # what is mapped stays until it is unmapped
            self._mapped += piece
            self.count += 1

        try:
            cut(self._reserved, largest, grain, create)
            access = driver.CUmemAccessDesc()
            access.location.type, access.location.id = properties.location.type, properties.location.id
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            kernels.call("cuMemSetAccess", self.address, self._reserved, [access], 1)
        except BaseException:
            self.close()
            raise

    def close(self, _: Any = None) -> None:
        """Free it, after everything that the GPU has to do. Errors are not looked at: a driver that shuts down has freed it."""
        for call, arguments in (
            (cuda.call, ("cudaDeviceSynchronize",)),
            (kernels.call, ("cuMemUnmap", self.address, self._mapped)),
            (kernels.call, ("cuMemAddressFree", self.address, self._reserved)),
        ):
            with contextlib.suppress(cuda.CudaError):
                call(*arguments)
