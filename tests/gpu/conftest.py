"""Everything in this folder runs on a real NVIDIA GPU, and skips with the reason where there is none."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def gpu():
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    from retnet_export.runtime.device import cuda

    if cuda.device_count() == 0:
        pytest.skip("this machine has no NVIDIA GPU that CUDA can use")
    return cuda.device()
