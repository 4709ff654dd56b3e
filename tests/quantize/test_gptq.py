"""GPTQ over one matrix loses less of the product than rounding, on inputs like those it was shown."""

import numpy as np
import pytest

from retnet_export.quantize.formats import Format, round_to_nearest
from retnet_export.quantize.gptq import gptq


@pytest.fixture
def matrix():
    """A weight and the Gram matrix of correlated inputs, a few of which are much larger than the rest."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((128, 48)).astype(np.float32)
    mixing = generator.standard_normal((128, 128)) * 0.3 + np.eye(128)
    sizes = np.where(np.arange(128) % 17 == 0, 12.0, 1.0)
    x = generator.standard_normal((2048, 128)) @ mixing * sizes
    return weight, x.T @ x


def product_error(weight, quantized, gram):
    """Σ|XW - XŴ|² over the calibration text."""
    difference = (weight - quantized.dequantized()).astype(np.float64)
    return float(np.einsum("kn,kn->", difference, gram @ difference))


@pytest.mark.parametrize("form", [Format(4, 32), Format(4, 64), Format(4, 128), Format(4), Format(8)])
def test_gptq_loses_less_of_the_product_than_rounding(matrix, form):
    weight, gram = matrix
    rounded = product_error(weight, round_to_nearest(weight, form), gram)
    assert product_error(weight, gptq(weight, form, gram), gram) < 0.8 * rounded


def test_gptq_with_independent_inputs_is_rounding_to_nearest():
    weight = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    form = Format(4, 32)
    assert (gptq(weight, form, np.eye(64)).values == round_to_nearest(weight, form).values).all()


def test_gptq_takes_inputs_that_are_never_used(matrix):
    weight, gram = matrix
    gram = gram.copy()
    gram[5], gram[:, 5] = 0.0, 0.0
    assert np.isfinite(gptq(weight, Format(4, 32), gram).dequantized()).all()


@pytest.mark.parametrize("size", [2.0**-30, 2.0**30])
def test_inputs_of_any_size_give_the_same_integers(matrix, size):
    """A norm a billion times larger with weights a billion times smaller is the same function."""
    weight, gram = matrix
    form = Format(4, 32)
    assert (gptq(weight / np.float32(size), form, gram * size**2).values == gptq(weight, form, gram).values).all()


def test_inputs_that_are_all_zero_leave_finite_weights(matrix):
    assert np.isfinite(gptq(matrix[0], Format(4, 32), np.zeros((128, 128))).dequantized()).all()
