"""Where there is no GPU: the backend says so, and `auto` takes the CPU. What it does on a GPU is in tests/gpu."""

import numpy as np
import pytest
import tiny

from retnet_export.runtime.backends import open_backend
from retnet_export.runtime.backends.cuda.backend import unavailable
from retnet_export.runtime.errors import UserError

pytestmark = pytest.mark.skipif(unavailable() is None, reason="this machine has a GPU that the backend works on")


@pytest.fixture
def bundle(tmp_path):
    return tiny.bundle(tmp_path, tiny.CONFIGS["fla"])


def test_the_backend_is_refused_with_what_would_mend_it(bundle):
    with pytest.raises(UserError, match=r"'cuda' does not work here|NVIDIA GPU|CUDA"):
        open_backend("cuda", bundle)


def test_auto_takes_the_cpu(bundle):
    backend = open_backend("auto", bundle)
    assert backend.name == "onnxruntime"
    runner = backend.open_runner(1)
    runner.step(np.array([3]))
    assert np.isfinite(runner.logits()).all()
