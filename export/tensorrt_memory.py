"""What a build leaves behind on the heap goes back to the system while it still builds.

Rule: TensorRT lays weights out in many temporary buffers. glibc keeps freed ones of up to 32 MB for later, which on a device whose
memory is shared is memory that the build cannot have a second time. With a fixed threshold they are mapped and unmapped one by one:
a quarter less at the peak of an INT4 build, and no slower (docs/lab/tensorrt.md).
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

MAPPED_FROM = 64 << 10
"""Bytes of a buffer that is mapped on its own."""


def return_freed_memory() -> None:
    """Let large buffers go back to the system as they are freed, for the rest of this process. Does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        library.mallopt(M_TRIM_THRESHOLD, 2 * MAPPED_FROM)
