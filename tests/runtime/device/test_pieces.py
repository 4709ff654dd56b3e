from __future__ import annotations

import pytest

from retnet_export.runtime.device import cuda, pieces


def cut(total: int, largest: int, fits: int, grain: int = 2) -> list[int]:
    """Pieces of a device on which an allocation of up to `fits` bytes succeeds."""
    made: list[int] = []

    def create(size: int) -> None:
        if size > fits:
            raise cuda.failure("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
        made.append(size)

    pieces.cut(total, largest, grain, create)
    return made


def test_pieces_are_as_large_as_allowed_and_add_up():
    assert cut(100, 32, fits=1000) == [32, 32, 32, 4]
    assert cut(100, 1000, fits=1000) == [100]
    assert cut(6, 1, fits=1000) == [2, 2, 2]  # never below what the device deals in


def test_a_piece_that_does_not_fit_is_halved():
    assert cut(100, 100, fits=26) == [24, 24, 24, 24, 4]


def test_the_smallest_piece_that_does_not_fit_is_the_devices_error():
    with pytest.raises(cuda.CudaError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        cut(100, 100, fits=1)


def test_another_error_is_not_taken_for_one_of_memory():
    def create(size: int) -> None:
        raise cuda.failure("cuMemCreate", "CUDA_ERROR_NOT_SUPPORTED", "operation not supported")

    with pytest.raises(cuda.CudaError, match="NOT_SUPPORTED"):
        pieces.cut(100, 100, 2, create)


def test_the_users_limit_is_a_number_of_megabytes(monkeypatch):
    monkeypatch.setenv(pieces.LARGEST_VARIABLE, "64")
    assert pieces.largest_allocation() == 64 << 20
    monkeypatch.setenv(pieces.LARGEST_VARIABLE, "64 MB")
    with pytest.raises(pieces.UserError, match="RETNET_EXPORT_LARGEST_ALLOCATION_MB is '64 MB', expected a number of megabytes"):
        pieces.largest_allocation()


def test_an_error_that_ends_the_process_says_so():
    error = cuda.failure("cudaStreamSynchronize", "cudaErrorIllegalAddress", "an illegal memory access was encountered")
    assert isinstance(error, cuda.DeviceLostError)
    assert "This process cannot use it any more: start the program again" in str(error)
    assert not isinstance(cuda.failure("cudaMalloc", "cudaErrorInvalidValue", "invalid argument"), cuda.DeviceLostError)


def test_every_error_that_is_called_final_exists_in_cuda():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    known = {*runtime.cudaError_t.__members__, *driver.CUresult.__members__}
    assert known >= cuda.LOST
