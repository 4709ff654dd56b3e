"""Integers and scales: what is stored is within range, loses little, and is what the format says."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_export.graph.weights_file import WeightsFile
from retnet_export.quantize.formats import Format, round_to_nearest


def weights(inputs=128, outputs=24, seed=0):
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


@pytest.mark.parametrize("form", [Format(8), Format(8, 32), Format(4, 32), Format(4, 64, "float16"), Format(4, 16, "bfloat16")])
def test_every_weight_is_within_half_a_step_or_clipped(form):
    weight = weights()
    quantized = round_to_nearest(weight, form)
    step = np.repeat(quantized.scales, form.group(len(weight)), axis=0)
    clipped = (quantized.values == form.largest) | (quantized.values == form.smallest)
    assert quantized.values.min() >= form.smallest
    assert quantized.values.max() <= form.largest
    assert (np.abs(quantized.dequantized() - weight) <= 0.5001 * step)[~clipped].all()


@pytest.mark.parametrize(
    ("form", "most"), [(Format(8), 0.01), (Format(8, 32), 0.006), (Format(4, 32), 0.09), (Format(4, 128), 0.11)]
)
def test_normal_weights_lose_what_the_format_must_lose(form, most):
    weight = weights(256, 64)
    assert round_to_nearest(weight, form).relative_error(weight) < most


def test_the_searched_scale_loses_less_than_the_one_that_keeps_the_largest_weight():
    weight, form = weights(), Format(4, 64)
    extreme = np.abs(weight).reshape(2, 64, -1).max(axis=1, keepdims=True) / form.largest
    plain = (np.clip(np.rint(weight.reshape(2, 64, -1) / extreme), -8, 7) * extreme).reshape(weight.shape)
    assert round_to_nearest(weight, form).relative_error(weight) < 0.97 * np.linalg.norm(plain - weight) / np.linalg.norm(weight)


def test_scales_are_representable_in_the_type_of_the_file():
    for name in ("float16", "bfloat16"):
        form = Format(4, 32, name)
        scales = round_to_nearest(weights(), form).scales
        assert (scales.astype(form.scale_dtype).astype(np.float32) == scales).all()


@given(st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e4]), st.sampled_from([4, 8]))
def test_weights_of_any_size_stay_finite(size, bits):
    weight = weights(32, 3) * np.float32(size)
    restored = round_to_nearest(weight, Format(bits, 32)).dequantized()
    assert np.isfinite(restored).all()
    assert np.abs(restored - weight).max() <= max(0.3 * np.abs(weight).max(), 1e-4)


def test_large_matrices_are_searched_in_pieces_with_the_same_result(monkeypatch):
    weight, form = weights(256, 40), Format(4, 32)
    whole = round_to_nearest(weight, form)
    monkeypatch.setattr("retnet_export.quantize.formats.CHUNK_ELEMENTS", 200)
    pieces = round_to_nearest(weight, form)
    assert (whole.values == pieces.values).all()
    assert (whole.scales == pieces.scales).all()


@pytest.mark.parametrize("shape", [(4, 6), (3, 5)])
def test_four_bit_integers_are_packed_as_onnx_reads_them(tmp_path, shape):
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(ml_dtypes.int4)
    with WeightsFile(tmp_path / "weights.bin") as file:
        reference = file.tensor("w", lambda: values)
    assert reference.dtype == ir.DataType.INT4
    assert (np.asarray(reference.numpy(), np.int8) == values.astype(np.int8)).all()


@pytest.mark.parametrize(
    ("form", "exponent", "most"),
    [
        (Format(8), -40, 1.0),
        (Format(8, 32, "bfloat16"), -40, 1.0),
        (Format(8, None, "float16"), -7, 1.02),
        (Format(8, None, "float16"), -12, 1.02),
        (Format(4, 32, "float16"), -16, 1.02),
        (Format(4, 32, "float16"), -18, 1.1),
        (Format(8, floating=True), -40, 1.0),
    ],
)
def test_small_weights_lose_what_large_ones_lose(form, exponent, most):
    weight = weights(256, 64)
    small = weight * np.float32(2.0**exponent)
    assert round_to_nearest(small, form).relative_error(small) <= most * round_to_nearest(weight, form).relative_error(weight)


@given(st.integers(-24, -1), st.sampled_from([4, 8]))
def test_a_float16_scale_never_costs_a_weight_more_than_its_smallest_step(exponent, bits):
    """Down to the smallest subnormal: no weight is off by more than half a step, or half of 2^-24 times its integer."""
    weight = np.float32(2.0**exponent) * np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    quantized = round_to_nearest(weight, Format(bits, None, "float16"))
    assert (quantized.scales >= 2.0**-24).all()
    step = np.abs(weight).max() / quantized.format.largest
    assert np.abs(quantized.dequantized() - weight).max() <= 1.5 * step + quantized.format.largest * 2.0**-25
