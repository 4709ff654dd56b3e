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
constexpr int HALF = DK / 2, NP = 2 * (H + G) * HALF + G * DV, VALUE_AT = 2 * (H + G) * HALF, LAYERS = 2, POWERS = 40, DRAFTS = 4;
struct Slots { float *state, *draft_keys, *draft_values; int batch, side; };
constexpr i64 LAYER_STATE = (i64)H * DK * DV, SLOT_STATE = LAYERS * LAYER_STATE;
#include "kernel.h"
extern "C" void run(const float* projections, const float* angles, const float* powers, float* state, float* o, const i64* lengths,
                    const int* needed, const int* starts, const int* kept, float* keys, float* values, int slots, int side) {
  Slots all{state, keys, values, slots, side};
  RetentionFew p{projections, angles, powers, &all, o, lengths, needed, starts, kept, LAYERS - 1};
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


class Passes:
    """The kernel with a state of its own, and beside it the recurrence in float64, token by token."""

    def __init__(self, folder: Path, slots: int, **sizes: int) -> None:
        self.kernel = compiled(folder, **sizes)
        self.key_dim, self.value_dim, self.heads, self.kv_heads = (sizes[name] for name in ("DK", "DV", "H", "G"))
        self.random, self.slots, self.side = np.random.default_rng(0), slots, 0
        self.gamma = 1 - 2.0 ** -np.linspace(3, 6, self.heads)
        self.powers = (self.gamma[:, None] ** np.arange(40)).astype(np.float32)
        self.state = self.normal(slots, 2, self.heads, self.key_dim, self.value_dim)
        self.expected = self.state.astype(np.float64)
        self.drafts = [
            np.full((2, 2, slots, self.kv_heads, 4, size), np.nan, np.float32) for size in (self.key_dim, self.value_dim)
        ]

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32)

    def tokens(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Projections (count, NP) and angles (count, 2, Dk / 2) of random tokens."""
        width = (self.heads + self.kv_heads) * self.key_dim + self.kv_heads * self.value_dim
        return self.normal(count, width), self.normal(count, 2, self.key_dim // 2)

    def read(self, tokens: list[tuple[np.ndarray, np.ndarray]], lengths: list[int], kept: list[int]) -> None:
        """A pass over tokens of each slot, of which the state takes `lengths`, and the first `kept` have no row; compared."""
        needed = [len(projections) - count for (projections, _), count in zip(tokens, kept, strict=True)]
        rows = [np.concatenate([each[part][count:] for each, count in zip(tokens, kept, strict=True)]) for part in (0, 1)]
        o = np.zeros((sum(needed), self.heads, self.value_dim), np.float32)
        starts = np.cumsum(needed) - needed
        counts = [np.array(lengths, np.int64), *(np.array(each, np.int32) for each in (needed, starts, kept))]
        arrays = (*rows, self.powers, self.state, o, *counts, *self.drafts)
        self.kernel.run(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays), self.slots, self.side)
        self.side ^= 1
        wanted = [self.recur(slot, *each, lengths[slot])[kept[slot] :] for slot, each in enumerate(tokens)]
        wanted_o = np.concatenate(wanted)
        np.testing.assert_allclose(o, wanted_o, rtol=1e-4, atol=1e-4 * np.std(wanted_o))
        np.testing.assert_allclose(self.state, self.expected, rtol=1e-4, atol=1e-4 * self.expected.std())

    def recur(self, slot: int, projections: np.ndarray, angles: np.ndarray, length: int) -> np.ndarray:
        """Outputs (n, H, Dv) after each token; the slot keeps the state after `length`."""
        s, half, outputs = self.expected[slot, 1], self.key_dim // 2, [np.empty((0, self.heads, self.value_dim))]
        group, turned = self.heads // self.kv_heads, 2 * (self.heads + self.kv_heads) * half
        for index, (row, (cosine, sine)) in enumerate(zip(projections.astype(np.float64), angles.astype(np.float64), strict=True)):
            first, second = row[:turned].reshape(2, -1, half)
            both = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=1)
            q, k = both[: self.heads], np.repeat(both[self.heads :], group, 0)
            v = np.repeat(row[turned:].reshape(self.kv_heads, self.value_dim), group, 0)
            s = self.gamma[:, None, None] * s + k[:, :, None] * v[:, None, :]
            outputs.append(np.einsum("hk,hkv->hv", q, s)[None])
            if index + 1 == length:
                self.expected[slot, 1] = s
        return np.concatenate(outputs)


def has_compiler() -> bool:
    """Whether there is a g++ with C++20's barriers."""
    if shutil.which("g++") is None:
        return False
    command = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="#include <barrier>", capture_output=True, text=True).returncode == 0


pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no g++ with C++20's barriers")


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
    passes = Passes(tmp_path, len(lengths), **sizes)
    passes.read([passes.tokens(count) for count in needed], lengths, [0] * len(lengths))


def test_drafts_that_were_right_enter_the_state_from_what_was_kept(tmp_path):
    passes = Passes(tmp_path, 2, DK=16, DV=24, H=4, G=2, MOST=16, ACROSS_BLOCK=16)
    first = [passes.tokens(7), passes.tokens(3)]
    passes.read(first, [2, 1], [0, 0])  # of the five and the two drafts, four are kept at most
    second = [
        tuple(np.concatenate([old[2:5], new]) for old, new in zip(first[0], passes.tokens(4), strict=True)),  # three were right
        tuple(np.concatenate([old[1:1], new]) for old, new in zip(first[1], passes.tokens(2), strict=True)),  # none was
    ]
    passes.read(second, [4, 1], [3, 0])
    third = [tuple(old[4:] for old in second[0]), passes.tokens(1)]
    passes.read(third, [3, 0], [2, 0])
