"""Random models for benchmarks on a GPU: 7.8B parameters in fp16 are written in less than a minute.

Speed does not depend on the weights' values, so one block of random numbers is written repeatedly; matrices are written in the
layout of the graph, without a checkpoint to transpose. Norms and other vectors are random as in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from retnet_export.graph.decode import build_decode
from retnet_export.graph.inserter import Inserter
from retnet_export.graph.prefill import build_prefill
from retnet_export.graph.retnet import graph_spec
from retnet_export.graph.variants import rewrite
from retnet_export.graph.variants.pattern import MICROSOFT, substitute
from retnet_export.graph.weights import retention_inputs, weight_shapes
from retnet_export.graph.weights_file import ALIGNMENT, WeightsFile
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import FORMAT_VERSION, PORTABLE, FileRecord, Manifest, Precision, Variant, state_specs

INT4_BLOCK = 32
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


@dataclass(frozen=True)
class BenchmarkBundle:
    """A bundle and what a step of it moves.

    Attributes:
        bundle: the bundle; its hashes are not filled in.
        weight_bytes: bytes of weights that one step reads: all but the embedding, of which it reads a row per sequence.
    """

    bundle: Bundle
    weight_bytes: int

    def bytes_per_step(self, batch: int) -> int:
        """The least a step can move: weights read once, the state of each sequence read once and written once."""
        return self.weight_bytes + 2 * batch * self.bundle.manifest.state_bytes


class RandomWeightsFile(WeightsFile):
    """A weights file that fills itself.

    Args:
        path: as for `WeightsFile`.
        matrices: shapes of the matrices; the caller makes everything else.
        fmt: "fp16", or "int4": then matrices are declared but not written; `QuantizeAtRandom` writes what replaces them.
    """

    def __init__(self, path: Path, matrices: Mapping[str, tuple[int, int]], fmt: str) -> None:
        super().__init__(path)
        self._matrices = matrices
        self._written_as_is = {"embedding.weight"} if fmt == "int4" else set(self._matrices)
        self._random = np.random.default_rng(0)
        self._blocks: dict[tuple[str, float], memoryview] = {}
        self.read_bytes = 0

    def tensor(self, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.ExternalTensor:
        if name in self._tensors:
            return self._tensors[name]
        if name not in self._matrices:
            tensor = super().tensor(name, make)
            self.read_bytes += tensor.nbytes
            return tensor
        shape = self._matrices[name]
        if name not in self._written_as_is:
            self._tensors[name] = self._reference(name, 0, 2 * shape[0] * shape[1], ir.DataType.FLOAT16, shape)
            return self._tensors[name]
        deviation = 1.0 if name == "embedding.weight" else shape[0] ** -0.5
        return self.random(name, ir.DataType.FLOAT16, shape, deviation, read=name != "embedding.weight")

    def random(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], deviation: float, *, read: bool = True
    ) -> ir.ExternalTensor:
        """Write a random tensor, once: normal fp16 of the given deviation, or uniform uint8."""
        if name in self._tensors:
            return self._tensors[name]
        size = int(np.prod(shape)) * dtype.itemsize
        self._write(memoryview(bytes(-self._size % ALIGNMENT)))
        tensor = self._reference(name, self._size, int(size), dtype, shape)
        block = self._block(dtype, deviation)
        for start in range(0, int(size), len(block)):
            self._write(block[: min(len(block), int(size) - start)])
        self._tensors[name] = tensor
        self.read_bytes += int(size) if read else 0
        return tensor

    def _block(self, dtype: ir.DataType, deviation: float) -> memoryview:
        key = (dtype.name, deviation)
        if key not in self._blocks:
            if dtype == ir.DataType.UINT8:
                array: NDArray[np.generic] = np.frombuffer(self._random.bytes(RANDOM_BYTES), np.uint8)
            else:
                drawn = self._random.standard_normal(RANDOM_BYTES // 32, dtype=np.float32) * np.float32(deviation)
                array = np.tile(np.abs(drawn).astype(np.float16) if deviation < 0.01 else drawn.astype(np.float16), 16)
            self._blocks[key] = array.view(np.uint8).data
        return self._blocks[key]

    def _write(self, content: memoryview) -> None:
        # Without the hash: the files of a benchmark are read once, here.
        left = content
        while left:
            left = left[self._file.write(left) :]
        self._size += len(content)


class QuantizeAtRandom(ir.passes.InPlacePass):
    """Every MatMul with a weight becomes MatMulNBits with random INT4 weights, blocks of 32."""

    def __init__(self, file: RandomWeightsFile) -> None:
        self._file = file

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in list(graph):
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            if weight is None or weight.const_value is None or weight.shape is None or node.inputs[0] is None:
                continue
            inputs, outputs = (int(str(size)) for size in weight.shape)
            blocks = inputs // INT4_BLOCK
            packed = (outputs, blocks, INT4_BLOCK // 2)
            scale = inputs**-0.5 / 8
            values = [
                _initializer(graph, self._file.random(f"{weight.name}.packed", ir.DataType.UINT8, packed, 0.0)),
                _initializer(graph, self._file.random(f"{weight.name}.scales", ir.DataType.FLOAT16, (outputs, blocks), scale)),
            ]
            w = Inserter(graph, node, str(weight.name).removesuffix(".weight"))
            attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": INT4_BLOCK}
            product = w.op(
                "MatMulNBits",
                node.inputs[0],
                *values,
                name="int4_product",
                dtype=ir.DataType.FLOAT16,
                domain=MICROSOFT,
                **attributes,
            )
            substitute(node.outputs[0], product)
            graph.remove(node)
            del graph.initializers[str(weight.name)]
        return ir.passes.PassResult(model, True)


def write_bundle(
    folder: Path, config: ModelConfig, fmt: str, variants: dict[str, Sequence[type[ir.passes.InPlacePass]]], chunk: int = 256
) -> dict[str, BenchmarkBundle]:
    """Write one random model, and a decode and a prefill graph of it for each variant, over one weights file.

    Args:
        folder: an empty folder.
        config: the model.
        fmt: "fp16" or "int4".
        variants: rewrites, by name.
        chunk: the prefill graph's chunk size.
    """
    bundles = {}
    shapes = weight_shapes(config)
    random = np.random.default_rng(1)

    def read(name: str) -> NDArray[np.generic]:
        return 1 + 0.1 * random.standard_normal(shapes[name], dtype=np.float32)

    file = RandomWeightsFile(folder / "weights.bin", matrix_shapes(config), fmt)
    with file:
        for variant, passes in variants.items():
            graphs = {}
            for name, build, size in (("decode", build_decode, 1), ("prefill", build_prefill, chunk)):
                model = build(config, read, file, "float16")
                if fmt == "int4":
                    QuantizeAtRandom(file)(model)
                rewrite(model, passes)
                path = folder / f"{variant}.{name}.onnx"
                ir.save(model, path)
                graphs[name] = graph_spec(model, path.name, size)
            manifest = Manifest(
                format="retnet-export bundle",
                format_version=FORMAT_VERSION,
                name=variant,
                model=config,
                precision=Precision("float16" if fmt == "fp16" else fmt, "float16", "float32"),
                variants={PORTABLE: Variant(graphs)},
                state=state_specs(config, "float32"),
                files={"weights.bin": FileRecord(0, "")},
            )
            bundles[variant] = BenchmarkBundle(Bundle(folder, manifest), 0)
    return {name: BenchmarkBundle(each.bundle, file.read_bytes) for name, each in bundles.items()}


def _initializer(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    if tensor.name not in graph.initializers:
        graph.register_initializer(value)
    return graph.initializers[tensor.name]


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Matrices as the graphs store them, (inputs, outputs), joined where they share an input; the embedding is (V, D)."""
    width = config.hidden_size
    shapes = {"embedding.weight": (config.vocab_size, width), "head.weight": (width, config.vocab_size)}
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.retention.projections.weight": (width, sum(retention_inputs(config).values())),
            f"{layer}.retention.out.weight": (config.value_size, width),
            f"{layer}.ffn.gate_up.weight": (width, 2 * config.ffn_size),
            f"{layer}.ffn.down.weight": (config.ffn_size, width),
        }
    return shapes
