"""The runtime and its commands behave on the TensorRT backend as on ONNX Runtime: the same tests, again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
SUITE = (
    "runtime/generate/test_session.py",
    "runtime/generate/test_speculation.py",
    "runtime/generate/test_state.py",
    "runtime/generate/test_batching.py",
    "runtime/generate/test_conversation.py",
    "runtime/generate/test_text.py",
    "commands/test_sessions.py",
)
OF_ONNX_RUNTIME_ALONE = (
    # an engine has a largest batch of its own
    "runtime/generate/test_session.py::test_a_batch_too_large_for_memory_is_refused_with_its_size",
    # a process of its own, where there is no double
    "commands/test_sessions.py::test_interrupting_a_reply_keeps_the_conversation",
    "commands/test_sessions.py::test_sigterm_leaves_nothing_half_written",
)


@pytest.mark.parametrize("name", SUITE)
def test_the_runtime_suite_passes_on_the_tensorrt_double(name):
    options = [f"--deselect=tests/{test}" for test in OF_ONNX_RUNTIME_ALONE]
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
        f"tests/{name}",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
