"""The kernel for drafts and short prompts, compiled as C++ and run on a CPU: outputs and states are those of the recurrence.

What a GPU alone can show (timing of its threads, asynchronous copies) is in tests/gpu.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

SOURCE = """
#include "cuda_on_cpu.h"
alignas(128) float shared[1 << 16];
constexpr int HALF = DK / 2, NP = 2 * (H + G) * HALF + G * DV, VALUE_AT = 2 * (H + G) * HALF, LAYERS = 2, POWERS = 40;
struct Slots { float* state; };
constexpr i64 LAYER_STATE = (i64)H * DK * DV, SLOT_STATE = LAYERS * LAYER_STATE;
#include "kernel.h"
extern "C" void run(const float* projections, const float* angles, const float* powers, float* state, float* o, const i64* lengths,
                    const int* needed, const int* starts, int slots) {
  Slots all{state};
  RetentionFew p{projections, angles, powers, &all, o, lengths, needed, starts, LAYERS - 1};
  launch(retention_few_of<MOST, ACROSS_BLOCK>, {(DV + ACROSS_BLOCK - 1) / ACROSS_BLOCK, H, slots}, FEW_THREADS, p);
}
"""


def compiled(folder: Path, **constants: int) -> ctypes.CDLL:
    kernel = files("retnet_export.runtime.backends.cuda").joinpath("kernels/retention_few.cuh").read_text()
    lines = [
        line
        for line in kernel.splitlines()
        if not line.startswith(("#include", "#pragma once")) and "extern __shared__" not in line
    ]
    (folder / "kernel.h").write_text("\n".join(lines))
    (folder / "run.cpp").write_text(SOURCE)
    definitions = [f"-D{name}={value}" for name, value in constants.items()]
    options = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{Path(__file__).parent}"]
    subprocess.run(["g++", *options, *definitions, str(folder / "run.cpp"), "-o", str(folder / "run.so")], check=True)
    return ctypes.CDLL(str(folder / "run.so"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(
    ("sizes", "lengths", "needed"),
    [
        ({"DK": 64, "DV": 96, "H": 2, "G": 2, "MOST": 16, "ACROSS_BLOCK": 32}, [1, 0, 3], [2, 0, 9]),
        ({"DK": 32, "DV": 40, "H": 4, "G": 2, "MOST": 32, "ACROSS_BLOCK": 32}, [17, 32], [32, 32]),
        ({"DK": 6, "DV": 7, "H": 2, "G": 1, "MOST": 16, "ACROSS_BLOCK": 16}, [7], [16]),
        ({"DK": 54, "DV": 36, "H": 1, "G": 1, "MOST": 8, "ACROSS_BLOCK": 8}, [8], [8]),
        ({"DK": 432, "DV": 16, "H": 1, "G": 1, "MOST": 32, "ACROSS_BLOCK": 32}, [0], [31]),
    ],
    ids=["drafts and an idle slot", "many tokens", "odd sizes", "all taken in", "nothing taken in"],
)
def test_outputs_and_states_are_those_of_the_recurrence(tmp_path, sizes, lengths, needed):
    kernel = compiled(tmp_path, **sizes)
    key_dim, value_dim, heads, kv_heads = (sizes[name] for name in ("DK", "DV", "H", "G"))
    random, rows, half = np.random.default_rng(0), sum(needed), key_dim // 2
    width = 2 * (heads + kv_heads) * half + kv_heads * value_dim
    projections, angles = (random.standard_normal(shape, np.float32) for shape in ((rows, width), (rows, 2, half)))
    before = random.standard_normal((len(lengths), 2, heads, key_dim, value_dim), np.float32)
    gamma = 1 - 2.0 ** -np.linspace(3, 6, heads)
    powers = (gamma[:, None] ** np.arange(40)).astype(np.float32)
    o, state, expected_o, expected = np.zeros((rows, heads, value_dim), np.float32), before.copy(), [], before.astype(np.float64)
    starts = np.cumsum(needed) - needed
    arrays = (
        projections,
        angles,
        powers,
        state,
        o,
        np.array(lengths, np.int64),
        np.array(needed, np.int32),
        starts.astype(np.int32),
    )
    kernel.run(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays), len(lengths))

    for slot, start in enumerate(starts):
        s = before[slot, 1].astype(np.float64)  # (H, Dk, Dv)
        for index in range(needed[slot]):
            row, (cosine, sine) = projections[start + index].astype(np.float64), angles[start + index].astype(np.float64)
            first, second = row[: 2 * (heads + kv_heads) * half].reshape(2, heads + kv_heads, half)
            turned = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=1)
            q, k = turned[:heads], np.repeat(turned[heads:], heads // kv_heads, 0)
            v = np.repeat(row[2 * (heads + kv_heads) * half :].reshape(kv_heads, value_dim), heads // kv_heads, 0)
            s = gamma[:, None, None] * s + k[:, :, None] * v[:, None, :]
            expected_o.append(np.einsum("hk,hkv->hv", q, s))
            if index + 1 == lengths[slot]:
                expected[slot, 1] = s
    np.testing.assert_allclose(o, expected_o, rtol=1e-4, atol=1e-4 * np.std(expected_o))
    np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-4 * expected.std())
