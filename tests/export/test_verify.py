"""verify proves a good export and finds a bad one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import EXAMPLE

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.verify import judged, verify
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load
from retnet_export.runtime.numerics import tolerance


@pytest.fixture(scope="module")
def model(example_bundle):
    return load(example_bundle.path, "onnxruntime")


def test_the_bundled_model_agrees_with_its_parallel_form_over_256_tokens(model):
    result = verify(model, open_checkpoint(EXAMPLE), tokens=300)
    assert result.tokens >= 256
    assert result.error.relative <= 1e-4
    assert result.agreements + result.ties == result.tokens
    assert result.passed


def test_a_weight_that_is_off_by_a_thousandth_is_found(model):
    checkpoint = open_checkpoint(EXAMPLE)

    def read(name: str) -> np.ndarray:
        weight = checkpoint.weight(name)
        return weight * np.float16(1.02) if name == "layers.2.ffn.down.weight" else weight

    result = verify(model, dataclasses.replace(checkpoint, weight=read), tokens=64)
    assert not result.passed


def test_a_bundle_of_another_model_is_refused(model):
    checkpoint = open_checkpoint(EXAMPLE)
    other = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, norm_eps=1e-5))
    with pytest.raises(UserError, match=r"was not exported from .*: their model configurations differ"):
        verify(model, other)


def test_a_text_of_one_token_is_refused(model):
    with pytest.raises(UserError, match="the text has 1 tokens, expected at least 2"):
        verify(model, open_checkpoint(EXAMPLE), text=" the")


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_a_tie_is_not_a_disagreement():
    reference = logits([1.0, 0.0, -1.0], [1.0, 0.999999, -1.0], [1.0, 0.5, -1.0])
    actual = logits([1.0, 0.0, -1.0], [0.999999, 1.0, -1.0], [0.5, 1.0, -1.0])
    result = judged(actual, reference, [1, 2, 3], (reference, None), "three rows", tolerance("float32"))
    assert (result.agreements, result.ties, result.disagreements) == (1, 1, (2,))
    assert not result.passed
