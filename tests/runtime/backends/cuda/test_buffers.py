from __future__ import annotations

import numpy as np
import pytest
from cuda_double import CudaDouble

from retnet_export.runtime.backends.cuda.buffers import Lent
from retnet_export.runtime.device import cuda


@pytest.fixture
def host(monkeypatch):
    """The host memory of a CUDA without a GPU."""
    double = CudaDouble()
    monkeypatch.setattr(cuda, "library", lambda: double)
    return double.host


def test_memory_is_lent_again_only_when_no_view_of_it_is_left(host):
    lent = Lent()
    first = lent.array((4, 10))
    row = first[2:3]
    row[:] = 3.0
    address = first.ctypes.data
    del first
    second = lent.array((4, 10))
    second[:] = 5.0
    assert len(host) == 2
    np.testing.assert_array_equal(row, np.full((1, 10), 3.0))
    del row
    third = lent.array((2, 10))
    assert third.ctypes.data == address
    assert third.shape == (2, 10)
    assert len(host) == 2
