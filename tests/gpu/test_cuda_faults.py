"""What goes wrong around the backend `cuda`: memory that others take, memory in pieces, a kernel that fails amid a step."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny

from retnet_export.runtime.backends.cuda import buffers
from retnet_export.runtime.backends.cuda.backend import CudaBackend, unavailable
from retnet_export.runtime.device import cuda, pieces

CONFIG = tiny.config(
    vocab_size=8000, hidden_size=512, num_heads=4, num_kv_heads=4, head_key_dim=128, head_value_dim=256, ffn_size=1024
)
HOLDER = """
import sys
from cuda.bindings import runtime as cuda
left, held = int(sys.argv[1]), 0
size = 1 << 30
while size >= 1 << 20:
    free = cuda.cudaMemGetInfo()[1]
    if free - size < left or cuda.cudaMalloc(size)[0] != 0:
        size //= 2
print("held", flush=True)
sys.stdin.read()
"""
OPENING = """
import sys
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load
try:
    load(sys.argv[1], "cuda")
except UserError as error:
    print(f"{type(error).__name__}: {error}")
"""
LAUNCH_THAT_FAILS = """
import sys
import numpy as np
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load
model = load(sys.argv[1], "cuda")
opened, open_runner = [], model.backend.open_runner
model.backend.open_runner = lambda batch: opened.append(open_runner(batch)) or opened[-1]
session = model.session()
session.step([1])
opened[0]._arguments.structure.state = 64  # no memory is there
for attempt in range(2):
    try:
        session.step([2])
    except UserError as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(autouse=True)
def kernels(gpu):
    if reason := unavailable():
        pytest.skip(reason)


@pytest.fixture
def bundle(tmp_path):
    return tiny.bundle(tmp_path, CONFIG, precision="fp16")


@contextlib.contextmanager
def another_process_that_leaves(size: int):
    """A process that takes all of the GPU's memory but for so many bytes."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.stdin.close()
        process.wait()


def python(program: str, bundle) -> str:
    """What a program prints, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(bundle.path)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout


def rows_of(runner, tokens):
    found = []
    for token in tokens:
        runner.step(np.array([token]))
        found.append(runner.logits()[0].copy())
    return np.stack(found)


def test_a_bundle_is_refused_while_another_process_has_the_memory(bundle):
    assert cuda.memory_info().free > 1 << 30  # from here on this process has the memory that CUDA itself needs
    with (
        another_process_that_leaves(40 << 20),
        pytest.raises(cuda.CudaMemoryError, match=r"needs [\d,]+ bytes on the GPU .* are free"),
    ):
        CudaBackend(bundle)
    CudaBackend(bundle)


def test_a_process_that_comes_when_all_memory_is_taken_says_so(bundle):
    with another_process_that_leaves(8 << 20):
        result = python(OPENING, bundle)
    assert re.search(r"CudaMemoryError: .*(no free memory for CUDA itself|needs [\d,]+ bytes on the GPU)", result), result


def test_a_batch_that_does_not_fit_is_refused_with_numbers_and_a_smaller_one_is_not(bundle):
    backend = CudaBackend(bundle)
    with another_process_that_leaves(60 << 20):
        with pytest.raises(cuda.CudaMemoryError, match=r"64 sequences need [\d,]+ bytes on the GPU beside the weights, [\d,]+ of"):
            backend.open_runner(64)
        runner = backend.open_runner(2)
        runner.step(np.array([1, 2]))
        assert np.isfinite(runner.logits()).all()


def test_a_prompt_is_read_in_smaller_runs_while_another_process_has_the_memory(bundle):
    backend, other = CudaBackend(bundle), CudaBackend(bundle)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 900))
    whole = backend.open_runner(1)
    whole.prefill(tokens, np.array([900]))
    runner = other.open_runner(1)
    runner.step(np.array([1]))
    runner.write_state(0, backend.open_runner(1).read_state(0))
    with another_process_that_leaves(24 << 20):
        runner.prefill(tokens, np.array([900]))
    assert buffers.LEAST_ROWS <= other.many.rows_at_once < 900
    np.testing.assert_allclose(runner.logits(), whole.logits(), atol=5e-2)


def test_work_that_finds_no_memory_leaves_the_runner_usable(bundle):
    backend = CudaBackend(bundle)
    runner = backend.open_runner(1)
    runner.step(np.array([1]))
    hog = []
    for size in (1 << 30, 32 << 20, 1 << 20):
        with contextlib.suppress(cuda.CudaMemoryError):
            while True:
                hog.append(cuda.DeviceBuffer(size))
    with pytest.raises(cuda.CudaMemoryError, match="the GPU has no memory for"):
        runner.prefill(np.array([[2, 3, 4]]), np.array([3]))
    hog.clear()
    expected = rows_of(CudaBackend(bundle).open_runner(1), [1, 2, 3])
    np.testing.assert_array_equal(rows_of(runner, [2, 3]), expected[1:])


def test_weights_in_pieces_compute_the_same_bits(bundle, monkeypatch):
    whole = rows_of(CudaBackend(bundle).open_runner(1), range(20))
    monkeypatch.setenv(pieces.LARGEST_VARIABLE, "2")
    made = []

    class Counted(pieces.Pieces):
        def __init__(self, size, largest):
            super().__init__(size, largest)
            made.append(self.count)

    monkeypatch.setattr(pieces, "Pieces", Counted)
    backend = CudaBackend(bundle)
    runner = backend.open_runner(1)
    np.testing.assert_array_equal(rows_of(runner, range(20)), whole)
    assert max(made) >= backend.weights.bytes >> 21 > 4
    free = cuda.memory_info().free
    size = backend.weights.bytes
    del runner, backend
    assert cuda.memory_info().free >= free + size


def test_a_buffer_that_fits_in_pieces_only_is_made_of_them(monkeypatch):
    """`cudaMalloc` answers as on a GPU whose memory is in fragments."""
    call = cuda.call

    def fragmented(name, *arguments):
        if name == "cudaMalloc" and arguments[0] > 8 << 20:
            raise cuda.CudaError(name, "cudaErrorMemoryAllocation", "out of memory")
        return call(name, *arguments)

    monkeypatch.setattr(cuda, "call", fragmented)
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer((64 << 20) + 3)
    sent = np.random.default_rng(0).integers(0, 256, buffer.bytes, np.uint8)
    received = np.empty_like(sent)
    stream.copy_to_device(buffer, sent)
    stream.copy_to_host(received, buffer)
    stream.synchronize()
    np.testing.assert_array_equal(received, sent)
    buffer.close()


def test_a_kernel_that_fails_in_the_middle_of_a_step_says_what_to_do(bundle):
    first, second = python(LAUNCH_THAT_FAILS, bundle).splitlines()
    assert "DeviceLostError: the GPU stopped in the middle of its work" in first
    assert "start the program again" in first
    assert "start the program again" in second or "an earlier step of this session failed" in second
