"""Sizes of models for benchmarks on a GPU, and a weights file of random numbers: 15 GB are written in less than a minute.

Speed does not depend on the weights' values, so one block of random numbers is written repeatedly; matrices are written in the
layout of the graph, without a checkpoint to transpose. Norms and other vectors are random as in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.weights_file import ALIGNMENT, WeightsFile
from retnet_export.runtime.bundle.config import ModelConfig

RANDOM_BYTES = 1 << 26


def paper_config(layers: int, width: int, heads: int, ffn_size: int, vocab_size: int = 32_000) -> ModelConfig:
    """A RetNet of the paper's proportions: Dk = width / heads, Dv twice that."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        head_key_dim=width // heads,
        head_value_dim=2 * width // heads,
        ffn_size=ffn_size,
        num_kv_heads=heads,
    )


MODELS = {
    "tiny": paper_config(2, 512, 2, 1024, vocab_size=512),
    "148M": paper_config(12, 768, 3, 1536),
    "1.5B": paper_config(24, 2048, 8, 4096),
    "7.8B": paper_config(32, 4096, 16, 8192),
}


class RandomWeightsFile(WeightsFile):
    """A weights file that fills itself, with normal numbers in float16.

    Args:
        path: as for `WeightsFile`.
        matrices: shapes of the matrices, (inputs, outputs), and of the embedding, (V, D); the caller makes everything else.
    """

    def __init__(self, path: Path, matrices: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(path)
        self._matrices = matrices
        self._random = np.random.default_rng(0)
        self._blocks: dict[float, memoryview] = {}

    def tensor(self, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.ExternalTensor:
        if name in self._tensors or name not in self._matrices:
            return super().tensor(name, make)
        shape = self._matrices[name]
        size, block = 2 * math.prod(shape), self._block(1.0 if name == "embedding.weight" else shape[0] ** -0.5)
        self._write(memoryview(bytes(-self._size % ALIGNMENT)))
        tensor = self._tensors[name] = self._reference(name, self._size, size, ir.DataType.FLOAT16, shape)
        for start in range(0, size, len(block)):
            self._write(block[: min(len(block), size - start)])
        return tensor

    def _block(self, deviation: float) -> memoryview:
        if deviation not in self._blocks:
            drawn = self._random.standard_normal(RANDOM_BYTES // 32, dtype=np.float32) * np.float32(deviation)
            self._blocks[deviation] = np.tile(drawn.astype(np.float16), 16).view(np.uint8).data
        return self._blocks[deviation]

    def _write(self, content: memoryview) -> None:
        # Without the hash: the files of a benchmark are read once, here.
        left = content
        while left:
            left = left[self._file.write(left) :]
        self._size += len(content)
