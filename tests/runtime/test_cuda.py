"""The CUDA module on a machine without a GPU; tests/gpu/test_cuda.py has the rest."""

from __future__ import annotations

import pytest

from retnet_export.runtime import cuda
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

    monkeypatch.setattr(cuda, "_runtime", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'retnet-export\[cuda\]'"):
        cuda.device_count()
