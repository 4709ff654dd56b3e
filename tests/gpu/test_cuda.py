from __future__ import annotations

import gc

import numpy as np
import pytest

from retnet_export.runtime.device import cuda


def test_a_copy_to_the_device_and_back_changes_nothing():
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer(4096)
    sent = np.arange(1024, dtype=np.float32)
    received = cuda.pinned((1024,), np.float32)
    stream.copy_to_device(buffer, sent)
    stream.copy_to_host(received, buffer)
    stream.synchronize()
    np.testing.assert_array_equal(received, sent)


def test_fill_and_copies_between_buffers_respect_offsets():
    stream, first, second = cuda.Stream(), cuda.DeviceBuffer(8), cuda.DeviceBuffer(8)
    stream.fill(first, 1)
    stream.fill(second, 2)
    stream.copy(second, first, size=2, target_offset=3)
    received = np.empty(8, np.uint8)
    stream.copy_to_host(received, second)
    stream.synchronize()
    assert received.tolist() == [2, 2, 2, 1, 1, 2, 2, 2]


def test_a_captured_graph_runs_when_launched_and_not_before():
    stream, buffer, received = cuda.Stream(), cuda.DeviceBuffer(4), cuda.pinned((4,), np.uint8)
    stream.fill(buffer, 1)
    stream.synchronize()
    with stream.capture() as graph:
        stream.copy_to_host(received, buffer)
        stream.fill(buffer, 2)
    stream.synchronize()
    assert received.tolist() == [0] * 4
    for expected in (1, 2):
        stream.launch(graph)
        stream.synchronize()
        assert received.tolist() == [expected] * 4


def test_a_capture_that_fails_leaves_the_stream_usable():
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer(4)
    with pytest.raises(cuda.CudaError, match="cudaStreamSynchronize"), stream.capture():
        stream.synchronize()  # not allowed while capturing
    stream.fill(buffer, 3)
    stream.synchronize()


def test_an_allocation_that_cannot_fit_says_how_much_is_free():
    with pytest.raises(cuda.CudaMemoryError, match=r"no memory for [\d,]+ bytes: [\d,]+ of [\d,]+ are free"):
        cuda.DeviceBuffer(1 << 45)


def test_memory_comes_back_when_a_buffer_is_closed_or_forgotten():
    size = 1 << 28
    before = cuda.memory_info().free
    kept = cuda.DeviceBuffer(size)
    forgotten = cuda.DeviceBuffer(size)
    assert cuda.memory_info().free <= before - 2 * size
    kept.close()
    kept.close()
    del forgotten
    gc.collect()
    assert cuda.memory_info().free > before - size
    with pytest.raises(ValueError, match="was closed"):
        _ = kept.address


def test_events_measure_the_time_between_two_points():
    stream, buffer, start, end = cuda.Stream(), cuda.DeviceBuffer(1 << 28), cuda.Event(), cuda.Event()
    stream.record(start)
    stream.fill(buffer, 0)
    stream.record(end)
    assert 0 < end.milliseconds_since(start) < 1e3


def test_the_device_describes_itself(gpu):
    assert gpu.name
    assert gpu.compute_capability >= (5, 0)
    assert 0 < cuda.memory_info().free <= gpu.memory_bytes
    assert all(version >= 12000 for version in cuda.versions())
