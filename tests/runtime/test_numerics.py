"""Every backend has a tolerance for every format that it computes with; an error is a number, or a message says why not."""

from __future__ import annotations

import typing

import ml_dtypes
import numpy as np
import pytest

from retnet_export.runtime.backends import MODULES, NAMES, registered
from retnet_export.runtime.bundle.manifest import Precision
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import Computation, first_not_finite, measure, tolerance

COMPUTATIONS = typing.get_args(Computation)
BACKENDS = sorted({*MODULES, "not-yet-written"})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_every_pair_of_computation_and_backend_has_a_tolerance_with_a_reason(computation, backend):
    allowed = tolerance(computation, backend)
    assert 0 < allowed.relative < 1
    assert allowed.reason
    own = registered(backend).tolerances if backend in MODULES else {}
    assert allowed == own.get(computation, tolerance(computation))


def test_every_backend_of_the_command_line_is_registered_under_its_name():
    assert set(MODULES) == set(NAMES) - {"auto"}
    assert [registered(name).name for name in MODULES] == list(MODULES)


def test_whatever_a_manifest_computes_with_has_a_tolerance():
    assert set(typing.get_args(typing.get_type_hints(Precision)["compute"])) <= set(COMPUTATIONS)


def test_less_precise_products_are_allowed_more():
    for backend in BACKENDS:
        exact, half, coarse = (tolerance(name, backend).relative for name in ("float32", "float16", "bfloat16"))
        assert exact < half < coarse


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 599_999])
def test_the_first_value_that_is_not_finite_is_found_in_every_format(dtype, value, place):
    array = np.ones((600, 1000), dtype)
    assert first_not_finite(array) is None
    array.reshape(-1)[[place, -1]] = value
    assert first_not_finite(array) == place
    assert first_not_finite(array.T) == place % 1000 * 600 + place // 1000


def test_the_largest_numbers_are_finite():
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        limits = ml_dtypes.finfo(dtype)
        assert first_not_finite(np.array([limits.max, limits.min, limits.tiny, 0], dtype)) is None
    assert first_not_finite(np.array([2**62])) is None


@pytest.mark.parametrize(("actual", "reference", "what"), [([np.nan, 1], [1, 1], "result"), ([1, 1], [np.inf, 1], "reference")])
def test_neither_side_of_a_comparison_may_be_other_than_finite(actual, reference, what):
    with pytest.raises(UserError, match=f"the {what} holds 1 values of 2 that are not finite"):
        measure(np.array(actual, np.float32), np.array(reference, np.float32))


def test_a_reference_without_spread_is_measured_by_its_size():
    assert measure(np.array([2.0, 3.0]), np.array([2.0, 2.0])).relative == 0.5
    assert measure(np.array([0.0, 3.0]), np.array([0.0, 0.0])).relative == 3.0
