"""Sessions, states, batches, chats and text streams behave on the TensorRT backend as on ONNX Runtime: the same tests, again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
SUITE = ("test_session.py", "test_state.py", "test_batching.py", "test_conversation.py", "test_text.py")
OF_ONNX_RUNTIME_ALONE = (
    "test_session.py::test_a_batch_too_large_for_memory_is_refused_with_its_size",  # an engine has a largest batch of its own
    "test_conversation.py::test_a_message_whose_reply_is_not_finite_is_taken_back",  # looks into that stream's buffers
)


def test_the_runtime_suite_passes_on_the_tensorrt_double():
    options = [f"--deselect=tests/runtime/{test}" for test in OF_ONNX_RUNTIME_ALONE]
    paths = [f"tests/runtime/{name}" for name in SUITE]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "on_double",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-W",
        "error::pytest.PytestUnraisableExceptionWarning",  # a finalizer that fails has nobody else to tell
        *options,
        *paths,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
