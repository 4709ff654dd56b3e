"""Methods over one matrix: calibrated ones lose less of the product, on inputs like those they were shown."""

import numpy as np
import pytest

from retnet_export.quantize.formats import Format
from retnet_export.quantize.methods import METHODS, Gptq, product_error


@pytest.fixture
def matrix():
    """A weight and the Gram matrix of correlated inputs, a few of which are much larger than the rest."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((128, 48)).astype(np.float32)
    mixing = generator.standard_normal((128, 128)) * 0.3 + np.eye(128)
    sizes = np.where(np.arange(128) % 17 == 0, 12.0, 1.0)
    x = generator.standard_normal((2048, 128)) @ mixing * sizes
    return weight, x.T @ x


def error(name, weight, form, gram):
    method = METHODS[name]()
    scales = method.input_scales(weight, form, gram)
    if scales is None:
        return product_error(weight, method.quantize(weight, form, gram).dequantized(), gram)
    folded = method.quantize(weight * scales[:, None], form, gram / np.outer(scales, scales))
    return product_error(weight, folded.dequantized() / scales[:, None], gram)


@pytest.mark.parametrize("form", [Format(4, 32), Format(4, 64), Format(4, 128), Format(4), Format(8)])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_calibrated_method_loses_less_of_the_product_than_rounding(matrix, form, method):
    weight, gram = matrix
    assert error(method, weight, form, gram) < 0.8 * error("rtn", weight, form, gram)


def test_gptq_with_independent_inputs_is_rounding_to_nearest():
    weight = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    form, gram = Format(4, 32), np.eye(64)
    assert (Gptq().quantize(weight, form, gram).values == METHODS["rtn"]().quantize(weight, form, None).values).all()


def test_gptq_takes_inputs_that_are_never_used(matrix):
    weight, gram = matrix
    gram = gram.copy()
    gram[5], gram[:, 5] = 0.0, 0.0
    assert np.isfinite(Gptq().quantize(weight, Format(4, 32), gram).dequantized()).all()


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("size", [2.0**-30, 2.0**30])
def test_inputs_of_any_size_give_the_same_integers(matrix, method, size):
    """A norm a billion times larger with weights a billion times smaller is the same function."""
    weight, gram = matrix
    form = Format(4, 32)
    expected = METHODS[method]().quantize(weight, form, gram)
    actual = METHODS[method]().quantize(weight / np.float32(size), form, gram * size**2)
    assert (actual.values == expected.values).all()
    scales = METHODS[method]().input_scales(weight, form, gram)
    if scales is not None:
        np.testing.assert_array_equal(METHODS[method]().input_scales(weight / np.float32(size), form, gram * size**2), scales)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_inputs_that_are_all_zero_leave_finite_weights(matrix, method):
    weight, form, gram = matrix[0], Format(4, 32), np.zeros((128, 128))
    scales = METHODS[method]().input_scales(weight, form, gram)
    assert scales is None or np.isfinite(scales).all()
    assert np.isfinite(METHODS[method]().quantize(weight, form, gram).dequantized()).all()
