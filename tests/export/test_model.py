"""The three forms of one set of weights agree with the oracle and with one another."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weights

from retnet_export.export.model import RetNet, State
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.numerics import TOLERANCES, measure

CONFIGS = {**tiny.CONFIGS, "odd head sizes": tiny.config(num_heads=2, num_kv_heads=2, head_key_dim=6, head_value_dim=432)}
FORMS = {
    "parallel": lambda model, tokens: model.parallel(tokens, clamp_rows=False),
    "chunkwise": lambda model, tokens: model.chunkwise(tokens, 8)[0],
    "recurrent": lambda model, tokens: model.recurrent(tokens)[0],
}


def tokens_of(config: ModelConfig, length: int, batch: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def run(config: ModelConfig, form: str, tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    model = RetNet.from_weights(config, random_weights(config).__getitem__, dtype)
    with torch.no_grad():
        return FORMS[form](model, torch.from_numpy(tokens)).numpy()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_form_agrees_with_the_oracle(name, form, dtype):
    config = CONFIGS[name]
    tokens = tokens_of(config, 37)
    reference = np.stack([oracle.logits(config, random_weights(config), row) for row in tokens])
    error = measure(run(config, form, tokens, getattr(torch, dtype)), reference)
    assert error.relative < TOLERANCES[f"torch-{dtype}"].relative


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    key_pairs=st.integers(1, 5),
    value_dim=st.integers(1, 9),
    layers=st.integers(1, 3),
    length=st.integers(1, 40),
    chunk=st.integers(1, 12),
    score_norm=st.booleans(),
)
def test_the_forms_agree_at_any_shape_length_and_chunk(heads, key_pairs, value_dim, layers, length, chunk, score_norm):
    config = tiny.config(
        num_heads=heads,
        num_kv_heads=1,
        head_key_dim=2 * key_pairs,
        head_value_dim=value_dim,
        num_layers=layers,
        score_norm=score_norm,
    )
    model = RetNet.from_weights(config, random_weights(config).__getitem__, torch.float64)
    tokens = torch.from_numpy(tokens_of(config, length, batch=1))
    with torch.no_grad():
        parallel = model.parallel(tokens, clamp_rows=False).numpy()
        chunkwise, after_chunks = model.chunkwise(tokens, chunk)
        recurrent, after_steps = model.recurrent(tokens)
    tolerance = TOLERANCES["torch-float64"].relative
    assert measure(chunkwise.numpy(), parallel).relative < tolerance
    assert measure(recurrent.numpy(), parallel).relative < tolerance
    for chunked, stepped in zip(after_chunks.layers, after_steps.layers, strict=True):
        assert measure(chunked.numpy(), stepped.numpy()).relative < tolerance


def test_a_sequence_may_be_cut_anywhere_and_go_on_from_its_state():
    config = tiny.CONFIGS["torchscale"]
    model = RetNet.from_weights(config, random_weights(config).__getitem__, torch.float64)
    tokens = torch.from_numpy(tokens_of(config, 30))
    with torch.no_grad():
        whole = model.parallel(tokens, clamp_rows=False)
        _, state = model.chunkwise(tokens[:, :13], 5)
        rest, _ = model.chunkwise(tokens[:, 13:], 7, state)
    assert measure(rest.numpy(), whole[:, 13:].numpy()).relative < TOLERANCES["torch-float64"].relative


def test_every_weight_changes_the_output():
    for config in CONFIGS.values():
        weights = dict(random_weights(config))
        tokens = torch.from_numpy(tokens_of(config, 12, batch=1))
        model = RetNet.from_weights(config, weights.__getitem__, torch.float64)
        with torch.no_grad():
            before = model.parallel(tokens, clamp_rows=False)
            for name, parameter in model.named_parameters():
                kept = parameter.clone()
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert not torch.allclose(model.parallel(tokens, clamp_rows=False), before, atol=1e-9), f"{name} is not used"
                parameter.copy_(kept)


def test_decay_survives_half_precision():
    # γ = 1 - 2^-12 is 1 in float16: a model cast to half must still forget.
    config = tiny.config(num_heads=8, num_kv_heads=8, head_key_dim=4, head_value_dim=4)
    model = RetNet.from_weights(config, random_weights(config).__getitem__, torch.float16)
    state = model.initial_state(1)
    ones = State(state.position, tuple(torch.ones_like(layer) for layer in state.layers))
    with torch.no_grad():
        weights = {name: torch.zeros_like(p) for name, p in model.named_parameters() if ".retention." in name}
        model.load_state_dict({**model.state_dict(), **weights})
        _, after = model.step(torch.zeros(1, dtype=torch.int64), ones)
    np.testing.assert_allclose(after.layers[0][0, :, 0, 0].numpy(), config.gamma, rtol=1e-6)
