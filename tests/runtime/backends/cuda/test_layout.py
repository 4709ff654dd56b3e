"""The device's layout of matrices: what is put in comes out, and each element lies where the kernels look for it."""

import numpy as np
import pytest

from retnet_export.runtime.backends.cuda.layout import (
    MatrixLayout,
    device_bytes_from_floats,
    device_bytes_from_integers,
    floats_from_device_bytes,
    place,
    source_rows,
)

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (50, 96), (33, 200)])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_floats_come_back_and_lie_where_the_kernels_read_them(kind, rows, columns):
    weights = RANDOM.standard_normal((rows, columns)).astype(np.float32)
    stored = {
        "float32": weights,
        "float16": weights.astype(np.float16),
        "bfloat16": (weights.view(np.uint32) >> 16).astype(np.uint16),
    }[kind]
    layout = MatrixLayout(rows, columns, kind)
    content = device_bytes_from_floats(layout, stored)
    assert content.size == layout.bytes
    each = 16 // stored.itemsize  # elements of a thread's 16 bytes
    for n, k in RANDOM.integers(0, (rows, columns), (100, 2)):
        run, number = k // (8 * each), k // each % 8
        start = (n // 16 * layout.tile_runs + run) * 2048
        start += n // 8 % 2 * 1024 + number // 4 * 512 + n % 8 * 64 + number % 4 * 16
        assert content[start : start + 16].view(stored.dtype)[k % each] == stored[n, k]
    expected = (stored.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else stored.astype(np.float32)
    np.testing.assert_array_equal(floats_from_device_bytes(layout, content), expected)


@pytest.mark.parametrize("scale", ["float32", "float16"])
@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 128, 192, 256, None])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_and_their_scales_come_back(kind, group, scale):
    rows, columns = 40, {48: 144, 96: 192, 192: 384}.get(group or 0, 256)
    largest = 127 if kind == "int8" else 7
    values = RANDOM.integers(-largest - 1, largest + 1, (rows, columns), np.int8)
    layout = MatrixLayout(rows, columns, kind, group, scale)
    if group is None:
        scales = None
        row_scales = np.zeros(layout.padded_rows, np.float32)
        row_scales[:rows] = RANDOM.uniform(0.1, 1, rows)
        expected = values * row_scales[:rows, None]
    else:
        scales = RANDOM.uniform(0.1, 1, (rows, columns // group)).astype(scale)
        row_scales = None
        expected = values * np.repeat(scales.astype(np.float32), group, axis=1)
    content = device_bytes_from_integers(layout, values, scales)
    assert content.size == layout.bytes
    np.testing.assert_array_equal(floats_from_device_bytes(layout, content, row_scales), expected.astype(np.float32))


def test_every_integer_lies_where_the_kernels_read_it():
    """The rule of the module's docstring, spelt out an element at a time."""
    rows, columns, group = 32, 256, 64
    values = RANDOM.integers(-8, 8, (rows, columns), np.int8)
    scales = RANDOM.uniform(0.1, 1, (rows, columns // group)).astype(np.float16)
    layout = MatrixLayout(rows, columns, "int4", group, "float16")
    content = device_bytes_from_integers(layout, values, scales)
    for n, k in RANDOM.integers(0, (rows, columns), (200, 2)):
        tile, half, g, run, within = n // 16, n % 16 // 8, n % 8, k // 128, k % 128
        word, second, t, element = within // 32, within // 16 % 2, within // 4 % 4, within % 4
        start = (tile * 2 + run) * (1024 + 2 * 16 * 2)
        found = content[start + half * 512 + (g * 4 + t) * 16 + word * 4 :][:4].view("<u4")[0]
        e = second * 4 + element
        assert (found >> (4 * (e // 2) + 16 * (e % 2))) & 15 == values[n, k] + 8
        stored = content[start + 1024 :][:64].view(np.float16)
        assert stored[within // 64 * 16 + g * 2 + half] == scales[n, k // group]


def test_a_threads_eight_activations_are_neighbours():
    k = np.arange(64)
    order = np.empty(64, np.int64)
    order[place(k)] = k
    for t in range(4):
        assert order[8 * t : 8 * t + 8].tolist() == [*range(4 * t, 4 * t + 4), *range(16 + 4 * t, 20 + 4 * t)]


def test_interleaved_rows_pair_gate_and_up_in_a_tile():
    layout = MatrixLayout(2 * 20, 64, "float16", interleaved=True)
    rows = source_rows(layout).reshape(-1, 2, 8)
    assert layout.tiles == 3
    real = rows[:, 0] >= 0
    np.testing.assert_array_equal(rows[:, 1][real], rows[:, 0][real] + 20)
    assert sorted(rows[rows >= 0]) == list(range(40))
    weights = RANDOM.standard_normal((40, 64)).astype(np.float16)
    np.testing.assert_array_equal(floats_from_device_bytes(layout, device_bytes_from_floats(layout, weights)), weights)


def test_a_group_that_no_mma_can_have_is_refused():
    with pytest.raises(ValueError, match="a multiple of 16"):
        MatrixLayout(16, 64, "int4", 8)
