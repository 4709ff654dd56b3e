"""Sessions, states, batches, chats and text streams behave on a GPU as on the CPU: the same tests, again; and both go together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
from random_weights import random_weights

from retnet_export.runtime.bundle.manifest import state_name
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import measure, tolerance

TESTS = Path(__file__).parents[1]
SUITE = (
    "generate/test_session.py",
    "generate/test_state.py",
    "generate/test_batching.py",
    "generate/test_conversation.py",
    "generate/test_text.py",
)
OF_THE_CPU_ALONE = (
    "generate/test_session.py::test_a_batch_too_large_for_memory_is_refused_with_its_size",  # a GPU's message says how much is free
    "generate/test_conversation.py::test_a_message_whose_reply_is_not_finite_is_taken_back",  # looks into that runner's buffers
)
CONFIG = tiny.config(vocab_size=300, hidden_size=128, num_heads=2, num_kv_heads=2, head_key_dim=64, head_value_dim=128)
WEIGHTS = random_weights(CONFIG, seed=4)
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 70).tolist()


@pytest.fixture
def models(tmp_path):
    """One portable bundle on the CPU and on the GPU."""
    path = tiny.bundle(tmp_path, CONFIG, WEIGHTS, chunk=16).path
    return load(path, "onnxruntime", threads=1), load(path, "cuda")


def fed(model, tokens=TOKENS[:40]):
    session = model.session()
    session.feed(tokens)
    return session


def test_the_runtime_suite_passes_on_the_gpu():
    options = [f"--deselect=tests/runtime/{test}" for test in OF_THE_CPU_ALONE]
    paths = [f"tests/runtime/{name}" for name in SUITE]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "on_gpu", "-p", "no:xdist", "-p", "no:cacheprovider", *options, *paths]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-1000:]


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=0.0, max_new_tokens=20),
        Options(temperature=1.2, top_k=4, seed=3, max_new_tokens=20),
        Options(temperature=1.2, top_k=80, seed=3, max_new_tokens=20),
        Options(temperature=1.2, top_p=0.9, seed=3, max_new_tokens=20),
        Options(temperature=1.2, repetition_penalty=1.3, seed=3, max_new_tokens=20),
    ],
    ids=["greedy", "top-k", "top-k beyond what the device chooses", "top-p", "penalty"],
)
def test_one_seed_gives_one_text_on_the_cpu_and_on_the_gpu(models, options):
    one, other = (list(fed(model).generate_tokens(options)) for model in models)
    assert one == other
    assert len(one) == 20


def test_a_state_saved_on_one_continues_on_the_other(models, tmp_path):
    options = Options(temperature=1.0, seed=8, max_new_tokens=15)
    for source, target in (models, models[::-1]):
        session = fed(source)
        session.snapshot().save(tmp_path / "moved.state")
        moved = target.session()
        moved.restore(Snapshot.load(tmp_path / "moved.state"))
        assert list(moved.generate_tokens(options)) == list(session.generate_tokens(options))


@pytest.mark.parametrize(("precision", "compute"), [("fp32", "float32"), ("fp16", "float16")])
def test_a_prompt_read_in_chunks_leaves_the_oracles_logits_and_state(tmp_path, precision, compute):
    """A prompt of 70 tokens is one run."""
    path = tiny.bundle(tmp_path, CONFIG, WEIGHTS, chunk=16, precision=precision).path
    session = fed(load(path, "cuda"), TOKENS)
    state = oracle.initial_state(CONFIG)
    weights = {name: np.asarray(value, np.float64) for name, value in WEIGHTS.items()}
    for position, token in enumerate(TOKENS):
        logits, state = oracle.step(CONFIG, weights, token, position, state)
    assert measure(session.logits[0], logits).relative < tolerance(compute, "cuda").relative
    snapshot = session.snapshot()
    for index, expected in enumerate(state):
        read = snapshot.state[state_name(index)][0]
        assert measure(read, expected).relative < tolerance(compute, "cuda").relative


def test_the_gpu_reads_a_prompt_as_the_cpu_does(models):
    cpu, gpu = (fed(model, TOKENS) for model in models)
    assert measure(gpu.logits, cpu.logits).relative < tolerance("float32", "cuda").relative
    for name, array in cpu.snapshot().state.items():
        np.testing.assert_allclose(gpu.snapshot().state[name], array, atol=1e-4)
