"""A session does not care what runs it: states move between backends, and one seed gives one text on all of them."""

from __future__ import annotations

import gc

import pytest
import tensorrt_double
import tiny

from retnet_export.export.tensorrt import CompileOptions, compile_bundle
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.model import load

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@pytest.fixture
def backends(tmp_path, monkeypatch):
    """One bundle on ONNX Runtime and on TensorRT's double, whose arithmetic is ONNX Runtime's too."""
    tensorrt_double.install(monkeypatch)
    compile_bundle(tiny.bundle(tmp_path, tiny.config(), chunk=8), CompileOptions(max_batch=3, candidates=5))
    path = tmp_path / "tiny.retnet"
    yield load(path, "onnxruntime", threads=1), load(path, "tensorrt")
    gc.collect()  # buffers return to the double that they came from


def fed(model):
    session = model.session()
    session.feed(PROMPT)
    return session


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=0.0, max_new_tokens=20),
        Options(temperature=1.2, top_k=4, seed=3, max_new_tokens=20),
        Options(temperature=1.2, top_k=9, seed=3, max_new_tokens=20),
        Options(temperature=1.2, top_p=0.9, seed=3, max_new_tokens=20),
        Options(temperature=1.2, repetition_penalty=1.3, seed=3, max_new_tokens=20),
    ],
    ids=["greedy", "top-k on the device", "top-k beyond it", "top-p", "penalty"],
)
def test_one_seed_gives_one_text(backends, options):
    one, other = (list(fed(model).generate_tokens(options)) for model in backends)
    assert one == other
    assert len(one) == 20


def test_a_state_saved_on_one_backend_continues_on_the_other(backends, tmp_path):
    options = Options(temperature=1.0, seed=8, max_new_tokens=15)
    for source, target in (backends, backends[::-1]):
        session = fed(source)
        session.snapshot().save(tmp_path / "moved.state")
        moved = target.session()
        moved.restore(Snapshot.load(tmp_path / "moved.state"))
        assert moved.position == len(PROMPT)
        assert list(moved.generate_tokens(options)) == list(session.generate_tokens(options))


def test_a_batch_gives_on_a_device_what_single_runs_give(backends):
    _, model = backends
    prompts, options = [PROMPT[:n] for n in (1, 12, 5, 8)], Options(temperature=0.0, max_new_tokens=6)
    for completion in model.generate_many(prompts, options, batch=2):
        session = model.session()
        session.feed(completion.prompt)
        assert completion.tokens == list(session.generate_tokens(options))
