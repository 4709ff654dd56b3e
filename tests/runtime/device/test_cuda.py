"""The CUDA module on a machine without a GPU; tests/gpu/test_cuda.py has the rest."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
from cuda_double import CudaDouble

from retnet_export.runtime.device import cuda
from retnet_export.runtime.errors import MissingExtraError, UserError


@pytest.fixture
def no_gpu():
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if cuda.device_count():
        pytest.skip("this machine has a GPU")


@pytest.mark.usefixtures("no_gpu")
def test_a_machine_without_a_driver_has_no_devices():
    assert cuda.device_count() == 0
    with pytest.raises(UserError, match=r"no CUDA device 0: this machine has 0; is the NVIDIA driver loaded"):
        cuda.device()


@pytest.mark.usefixtures("no_gpu")
def test_a_failed_call_names_the_call_and_the_error():
    with pytest.raises(cuda.CudaError, match=r"cudaStreamCreateWithFlags failed: cudaError\w+ \(.+\)"):
        cuda.Stream()


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    def missing():
        raise MissingExtraError("cuda-bindings", "cuda", "running on an NVIDIA GPU")

    monkeypatch.setattr(cuda, "library", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'retnet-export\[cuda\]'"):
        cuda.device_count()


@pytest.fixture
def another_library():
    """A CUDA that is in place for a while, and whoever takes its place then refuses every call."""
    double, patch = CudaDouble(), pytest.MonkeyPatch()

    def gone():
        raise MissingExtraError("cuda-bindings", "cuda", "running on an NVIDIA GPU")

    patch.setattr(cuda, "library", lambda: double)
    yield double, lambda: patch.setattr(cuda, "library", gone)
    patch.undo()


def allocate_everything() -> list[object]:
    stream = cuda.Stream()
    buffer = cuda.DeviceBuffer(64)
    with stream.capture() as graph:
        stream.fill(buffer, 0)
    return [stream, buffer, graph, cuda.pinned((4, 4), np.float32)]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_everything_is_freed_by_the_library_that_made_it_even_after_another_took_its_place(another_library):
    double, remove = another_library
    everything = allocate_everything()
    assert double.device
    assert double.host
    assert double.pending
    assert double.graphs
    remove()
    everything.clear()
    gc.collect()
    assert (double.device, double.host, double.pending, double.graphs) == ({}, {}, {}, {})


def test_closing_a_buffer_frees_it_by_the_library_that_made_it_and_once(another_library):
    double, remove = another_library
    buffer = cuda.DeviceBuffer(64)
    remove()
    buffer.close()
    buffer.close()
    assert double.device == {}


def test_memory_of_an_array_lives_as_long_as_the_array(another_library):
    double, remove = another_library
    view = cuda.pinned((4, 4), np.float32)[2:]
    remove()
    gc.collect()
    view[:] = 3.0
    assert len(double.host) == 1
    assert view.sum() == 24.0


def test_one_thread_at_a_time_calls_cuda(monkeypatch):
    inside, overlaps = [], []

    class Slow(CudaDouble):
        def cudaMalloc(self, size):  # noqa: N802
            inside.append(size)
            time.sleep(0.01)
            overlaps.append(len(inside) > 1)
            inside.pop()
            return super().cudaMalloc(size)

    double = Slow()
    monkeypatch.setattr(cuda, "library", lambda: double)
    buffers = []
    threads = [threading.Thread(target=lambda: buffers.append(cuda.DeviceBuffer(8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [False] * 4


def test_no_other_thread_calls_cuda_during_a_capture(monkeypatch):
    double = CudaDouble()
    monkeypatch.setattr(cuda, "library", lambda: double)
    stream, order = cuda.Stream(), []

    def allocate():
        cuda.DeviceBuffer(8)
        order.append("allocated")

    with stream.capture():
        other = threading.Thread(target=allocate)
        other.start()
        other.join(0.05)
        order.append("captured")
    other.join()
    assert order == ["captured", "allocated"]
