"""The backend `cuda` on a GPU: what it computes in every format and family, where it keeps it, and how it fails.

The oracle rounds the operands of products as the kernels do, so the tolerances are those of float32 sums in another order. With
RETNET_EXPORT_TEST_PTX=8.7 all of this runs as another GPU's code.
"""

import gc
import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import tiny
from bundle_weights import canonical

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.base import top_of
from retnet_export.runtime.backends.cuda.backend import CudaBackend, unavailable
from retnet_export.runtime.device import cuda
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import measure

PTX = (
    tuple(int(part) for part in os.environ["RETNET_EXPORT_TEST_PTX"].split(".")) if "RETNET_EXPORT_TEST_PTX" in os.environ else None
)
MEDIUM = tiny.config(
    vocab_size=1100, hidden_size=128, num_heads=2, head_key_dim=64, head_value_dim=128, ffn_size=256, num_kv_heads=2
)
ROUNDED = {"float32": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FORMATS = {
    "int8": QuantizeOptions(weights="int8"),
    "int8 in groups": QuantizeOptions(weights="int8", group_size=32, embedding="keep", head="keep"),
    "int4": QuantizeOptions(weights="int4"),
    "int4, all of it in groups of 16": QuantizeOptions(weights="int4", group_size=16, embedding="int4", head="int4"),
    "int4 in groups of 128": QuantizeOptions(weights="int4", group_size=128, embedding="keep", head="int4"),
}
GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / "expected.npz").is_file() and len([*path.glob("*.pt")]) < 2)
LIMIT = {"float32": 2e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
"""Relative error of logits. An operand that lies between two 16-bit numbers may be rounded to either, and a head's norm makes the
difference larger where its output is small."""


@pytest.fixture(autouse=True)
def kernels(gpu):
    if reason := unavailable():
        pytest.skip(reason)


def opened(bundle):
    return CudaBackend(bundle, ptx=PTX)


def expected(bundle, tokens, monkeypatch):
    """Logits (T, V) of the oracle with the bundle's own weights and rounding."""
    dtype = ROUNDED[bundle.manifest.precision.compute]
    plain = oracle.linear
    monkeypatch.setattr(oracle, "linear", lambda x, w, name: plain(np.asarray(x, dtype).astype(np.float64), w, name))
    return oracle.logits(bundle.manifest.model, canonical(bundle), tokens)


def steps(runner, tokens):
    rows = []
    for token in tokens:
        runner.step(np.array([token]))
        rows.append(runner.logits()[0].copy())
    return np.stack(rows)


def check(bundle, monkeypatch, count=16):
    tokens = np.random.default_rng(5).integers(0, bundle.manifest.model.vocab_size, count)
    logits = steps(opened(bundle).open_runner(1), tokens)
    wanted = expected(bundle, tokens, monkeypatch)
    assert measure(logits, wanted).relative < LIMIT[bundle.manifest.precision.compute]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_familys_settings_agree_with_the_oracle(tmp_path, monkeypatch, name, precision):
    check(tiny.bundle(tmp_path, tiny.CONFIGS[name], precision=precision), monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_agrees_with_the_oracle_on_the_same_integers(tmp_path, monkeypatch, form, precision):
    check(quantize_bundle(tiny.bundle(tmp_path, MEDIUM, precision=precision), tmp_path / "q.retnet", FORMATS[form]), monkeypatch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_value_dim": 432, "num_heads": 3, "num_kv_heads": 3, "hidden_size": 96, "ffn_size": 200},
        {"head_key_dim": 432, "head_value_dim": 54, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 2001},
        {"head_key_dim": 512, "head_value_dim": 64, "num_heads": 1, "num_kv_heads": 1},
        {"head_key_dim": 6, "head_value_dim": 7, "num_heads": 5, "num_kv_heads": 5, "ffn_size": 50},
        {"num_heads": 40, "num_kv_heads": 10, "head_key_dim": 16, "head_value_dim": 36, "hidden_size": 160},
    ],
    ids=["values 432", "keys 432", "keys 512", "odd values", "forty heads"],
)
def test_odd_sizes_agree_with_the_oracle(tmp_path, monkeypatch, sizes):
    check(tiny.bundle(tmp_path, tiny.config(**sizes), precision="fp16"), monkeypatch)


def test_a_tied_quantized_embedding_is_one_matrix(tmp_path, monkeypatch):
    tied = tiny.config(**{**MEDIUM.__dict__, "tied_embeddings": True})
    bundle = quantize_bundle(tiny.bundle(tmp_path, tied, precision="fp16"), tmp_path / "q.retnet", QuantizeOptions())
    assert opened(bundle).weights.places.embedding == opened(bundle).weights.places.head
    check(bundle, monkeypatch)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_reference_implementations_logits_come_out(tmp_path, monkeypatch, name):
    """Golden files of flash-linear-attention, torchscale and jamie-stirling's code, against the oracle that their tests hold."""
    bundle = export_bundle(open_checkpoint(GOLDEN / name), tmp_path / "golden.retnet", ExportOptions())
    check(bundle, monkeypatch)


def test_the_largest_logits_are_chosen_on_the_device(tmp_path):
    runner = opened(tiny.bundle(tmp_path, MEDIUM, precision="fp16")).open_runner(1)
    for token in range(5):
        runner.step(np.array([token]))
        for k in (1, 10, 64, 100):
            for found, wanted in zip(runner.top(k), top_of(runner.logits(), k), strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_equal_logits_come_in_the_order_of_their_tokens(tmp_path):
    from random_weights import random_weights

    weights = dict(random_weights(MEDIUM))
    weights["head.weight"] = np.repeat(weights["head.weight"][:1], MEDIUM.vocab_size, 0)  # all logits are equal
    runner = opened(tiny.bundle(tmp_path, MEDIUM, weights)).open_runner(1)
    runner.step(np.array([3]))
    np.testing.assert_array_equal(runner.top(64)[0][0], np.arange(64))


def test_a_logit_that_is_not_finite_shows(tmp_path):
    from random_weights import random_weights

    weights = dict(random_weights(MEDIUM))
    weights["head.weight"] = weights["head.weight"].copy()
    weights["head.weight"][[700, 30]] = np.inf
    runner = opened(tiny.bundle(tmp_path, MEDIUM, weights)).open_runner(1)
    runner.step(np.array([3]))
    tokens, values = runner.top(2)
    assert not np.isfinite(values).all()
    assert set(tokens[0]) <= {30, 700}


def test_two_runs_give_the_same_bits(tmp_path):
    backend = opened(tiny.bundle(tmp_path, MEDIUM, precision="fp16"))
    first, second = (steps(backend.open_runner(1), range(20)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_prefill_score_and_snapshots_are_those_of_steps(tmp_path):
    backend = opened(tiny.bundle(tmp_path, MEDIUM, precision="fp16"))
    tokens = np.random.default_rng(0).integers(0, MEDIUM.vocab_size, (2, 12))
    stepped = [backend.open_runner(1) for _ in range(2)]
    rows = [steps(runner, row) for runner, row in zip(stepped, tokens, strict=True)]
    read = backend.open_runner(2)
    read.prefill(tokens, np.array([12, 7]))
    np.testing.assert_allclose(read.logits(), [rows[0][11], rows[1][6]], atol=2e-2)
    scored = backend.open_runner(2)
    scores = scored.score(tokens, np.array([5, 12]), np.array([[4, 11], [0, 3]]))
    np.testing.assert_allclose(scores, [[rows[0][4], rows[0][11]], [rows[1][0], rows[1][3]]], atol=2e-2)
    assert scored.read_state(0)["position"][0] == 5
    other = backend.open_runner(1)
    other.write_state(0, scored.read_state(0))
    np.testing.assert_allclose(steps(other, tokens[0, 5:]), rows[0][5:], atol=2e-2)


def test_runners_in_two_threads_do_not_disturb_each_other(tmp_path):
    backend = opened(tiny.bundle(tmp_path, MEDIUM, precision="fp16"))
    alone = [steps(backend.open_runner(1), range(start, start + 60)) for start in (0, 100)]
    together = [None, None]

    def run(index, start):
        together[index] = steps(backend.open_runner(1), range(start, start + 60))

    threads = [threading.Thread(target=run, args=pair) for pair in ((0, 0), (1, 100))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(alone, together)


def test_thousands_of_runners_leave_nothing_behind(tmp_path):
    backend = opened(tiny.bundle(tmp_path, MEDIUM, precision="fp16"))
    for _ in range(20):
        backend.open_runner(1).step(np.array([1]))
    backend.stream.synchronize()
    gc.collect()
    before = cuda.memory_info().free
    for _ in range(3000):
        backend.open_runner(1).step(np.array([1]))
    backend.stream.synchronize()
    gc.collect()
    assert cuda.memory_info().free >= before - (8 << 20)


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(tmp_path):
    bundle = tiny.bundle(tmp_path, MEDIUM, precision="fp16")
    hog = cuda.DeviceBuffer(cuda.memory_info().free - (64 << 20))
    with pytest.raises(cuda.CudaMemoryError, match=r"needs [\d,]+ bytes on the GPU \([\d,]+ of weights, .* are free"):
        opened(bundle)
    hog.close()
    opened(bundle)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    runner = opened(tiny.bundle(tmp_path, MEDIUM)).open_runner(1)
    with pytest.raises(UserError, match="token 1100: the vocabulary has 1100"):
        runner.step(np.array([1100]))


def test_a_damaged_kernel_in_the_cache_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RETNET_EXPORT_CACHE", str(tmp_path / "kernels"))
    bundle = tiny.bundle(tmp_path, MEDIUM)
    first = steps(opened(bundle).open_runner(1), range(3))
    for path in (tmp_path / "kernels").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged, compiling it again"):
        second = steps(opened(bundle).open_runner(1), range(3))
    np.testing.assert_array_equal(first, second)
