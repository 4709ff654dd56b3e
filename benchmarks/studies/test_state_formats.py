"""The graphs of state_precision.py compute what each format says: pytest benchmarks/studies"""

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from studies.state_formats import (
    FLOAT8,
    FLOAT16,
    FLOAT32,
    INT8,
    INT16,
    Codec,
    StateBackend,
    mixed,
    state_bytes,
    store_state,
    whole,
)

CONFIG = tiny.config(num_layers=1)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.bundle(tmp_path_factory.mktemp("formats"), CONFIG)


def runner_of(bundle, form, every_logit=None):
    paths = []
    for source in (bundle.file("decode.onnx"), *([every_logit] if every_logit else [])):
        model = ir.load(source)
        store_state(model, CONFIG, form)
        paths.append(source.with_name(f"rewritten-{source.name}"))
        ir.save(model, paths[-1])
    return StateBackend(CONFIG, form, *paths).open_runner(1)


def stepped(runner):
    for token in TOKENS:
        runner.step(np.array([token]))
    return runner.logits().copy(), runner.read_state(0)["state.000"][0]


def exact(bundle):
    return stepped(tiny.model(bundle, "portable", threads=1, low_memory=False).backend.open_runner(1))


def test_a_float32_state_in_one_part_or_two_is_the_bundles_own(bundle):
    logits, state = exact(bundle)
    for form in (whole(CONFIG, Codec(FLOAT32)), mixed(CONFIG, Codec(FLOAT32), Codec(FLOAT32), 1)):
        found_logits, found = stepped(runner_of(bundle, form))
        np.testing.assert_array_equal(found, state)
        np.testing.assert_array_equal(found_logits, logits)


def test_a_float16_state_is_that_of_a_bundle_exported_so(bundle, tmp_path):
    logits, state = exact(tiny.bundle(tmp_path, CONFIG, state="fp16"))
    found_logits, found = stepped(runner_of(bundle, whole(CONFIG, Codec(FLOAT16))))
    np.testing.assert_array_equal(found, state)
    np.testing.assert_array_equal(found_logits, logits)


def test_mixed_states_keep_the_slowest_heads_exactly(bundle):
    _, state = exact(bundle)
    _, found = stepped(runner_of(bundle, mixed(CONFIG, Codec(FLOAT16), Codec(FLOAT32), 2)))
    np.testing.assert_array_equal(found[2:], state[2:])
    assert (found[:2] != state[:2]).any((1, 2)).all()


# Of a state whose largest element is some three times its deviation, rounded once in each of the last few dozen steps.
ERRORS = {
    "int16, a scale a row": (Codec(INT16), 1e-5, 2e-4),
    "int8, a scale a row": (Codec(INT8), 3e-3, 5e-2),
    "int8, a scale a column": (Codec(INT8, 2), 3e-3, 5e-2),
    "int8, scales of both": (Codec(INT8, 0), 3e-3, 5e-2),
    "int8, rounded at random": (Codec(INT8, rounding="random"), 3e-3, 7e-2),
    "int8, dithered": (Codec(INT8, rounding="dithered"), 3e-3, 7e-2),
    "fp8, a scale a row": (Codec(FLOAT8), 2e-2, 3e-1),
}


@pytest.mark.parametrize("name", ERRORS)
def test_scaled_states_are_off_by_their_steps_and_no_more(bundle, name):
    codec, least, most = ERRORS[name]
    _, state = exact(bundle)
    _, found = stepped(runner_of(bundle, whole(CONFIG, codec)))
    error = np.linalg.norm(found - state, axis=(1, 2)) / np.linalg.norm(state, axis=(1, 2))
    assert least < error.min()
    assert error.max() < most


def test_prefill_stores_the_state_in_the_same_format(bundle, tmp_path):
    logits, state = exact(bundle)
    form = mixed(CONFIG, Codec(INT16), Codec(FLOAT32), 1)
    runner = runner_of(bundle, form, bundle.file("prefill.onnx"))
    rows = np.concatenate([runner.read(TOKENS[:16]), runner.read(TOKENS[16:])])
    found = runner.read_state(0)["state.000"][0]
    assert rows.shape == (len(TOKENS), CONFIG.vocab_size)
    np.testing.assert_allclose(rows[-1:], logits, atol=1e-3 * logits.std())
    np.testing.assert_allclose(found[3], state[3], atol=1e-5 * state.std())
    assert 1e-6 < np.abs(found[:3] - state[:3]).max() / state.std() < 1e-3


def test_bytes_are_counted_with_their_scales():
    elements = CONFIG.state_elements
    rows, columns = (CONFIG.num_heads * size for size in (CONFIG.head_key_dim, CONFIG.head_value_dim))
    assert state_bytes(CONFIG, whole(CONFIG, Codec(FLOAT16))) == 2 * elements
    assert state_bytes(CONFIG, whole(CONFIG, Codec(INT8))) == elements + 4 * rows
    assert state_bytes(CONFIG, whole(CONFIG, Codec(INT8, 0))) == elements + 4 * (rows + columns)
    assert state_bytes(CONFIG, mixed(CONFIG, Codec(FLOAT16), Codec(FLOAT32), 1)) == 2 * elements + 2 * elements // 4
