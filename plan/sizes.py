"""How many bytes a model has, reads and needs, from its configuration alone.

    a step of B sequences reads    every matrix once  +  B rows of the embedding  +  the state of B sequences, and writes it
    memory at rest                 weights  +  state buffers, two sets or one  +  logits
    memory at its peak             that  +  what a chunk of prompt needs while it is read

Sizes of a bundle that exists are taken from its files; the formulas are for models that do not exist yet, and the tests hold
them against exported bundles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import Manifest
from retnet_export.runtime.bundle.weights import weight_shapes
from retnet_export.runtime.element_types import ELEMENT_TYPES
from retnet_export.runtime.errors import UserError

BYTES_PER_WEIGHT: Mapping[str, float] = {each.name: each.bits / 8 for each in ELEMENT_TYPES.values() if each.name != "int64"}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model.

    Attributes:
        parameters: how many weights.
        matrix_bytes: matrices, with the scales of quantized ones: what every step reads. The embedding is among them only if
            it is the output head as well.
        embedding_bytes: the embedding where it is a table of its own, of which a step reads one row a sequence.
        vector_bytes: norms and biases.
        state_bytes: the state of one sequence.
        kv_bytes_per_token: a key-value cache of the same width and depth, float16: what a Transformer keeps for each token.
        config: the model.
    """

    parameters: int
    matrix_bytes: float
    embedding_bytes: float
    vector_bytes: float
    state_bytes: int
    kv_bytes_per_token: int
    config: ModelConfig

    @property
    def weights_bytes(self) -> float:
        """All weights."""
        return self.matrix_bytes + self.embedding_bytes + self.vector_bytes

    def bytes_per_step(self, batch: int = 1, *, state_passes: float = 2.0) -> float:
        """Bytes that one step of `batch` sequences moves.

        Args:
            batch: B.
            state_passes: how often the state crosses the memory bus: 2 if it is read once and written once.
        """
        rows = batch * self.embedding_bytes / self.config.vocab_size
        return self.matrix_bytes + self.vector_bytes + rows + batch * self.state_bytes * state_passes

    def memory_at_rest(self, batch: int = 1, *, state_sets: int = 2) -> float:
        """Weights, sets of state buffers (`Registration.state_sets`), and logits."""
        return self.weights_bytes + batch * (state_sets * self.state_bytes + 4 * self.config.vocab_size)

    def activation_bytes(self, batch: int = 1, chunk: int = 256) -> float:
        """An upper estimate of what a chunk of prompt needs while it is read.

        The kernels' own workspace; a layer's widest activations, in float32 and once more in the format of the products, and
        the scores of all heads, (H, C, C), twice; and the state three times over. Fitted to what TensorRT-RTX reports for two
        models, docs/lab/plan.md.
        """
        config = self.config
        projections = config.key_size * 2 + config.value_size * 3
        widest = projections + 3 * config.hidden_size + config.ffn_size * 3
        scores = config.num_heads * chunk * 2
        return 41e6 + batch * chunk * 4.4 * (widest * 1.5 + scores) + 3.0 * batch * self.state_bytes

    def memory_at_peak(self, batch: int = 1, chunk: int = 256, *, state_sets: int = 2) -> float:
        """At rest, plus a chunk of prompt."""
        return self.memory_at_rest(batch, state_sets=state_sets) + self.activation_bytes(batch, chunk)


def sizes_of_model(
    config: ModelConfig,
    weights: str = "float16",
    *,
    compute: str | None = None,
    state: str = "float32",
    group_size: int | None = None,
) -> Sizes:
    """Sizes of a model that need not exist.

    Args:
        config: the architecture.
        weights: format of the matrices: float32, float16, bfloat16, int8, int4, float8 or float4.
        compute: format of the products, of scales, and of the embedding; that of the weights if these are floating point,
            else float16.
        state: float32 or float16.
        group_size: weights that share a scale in a quantized matrix; one scale for each output if None.
    """
    if weights not in BYTES_PER_WEIGHT:
        raise UserError(f"weights {weights!r}: expected one of {', '.join(BYTES_PER_WEIGHT)}")
    quantized = weights not in ("float32", "float16", "bfloat16")
    compute = compute or ("float16" if quantized else weights)
    matrices = _matrices(config)
    matrix_bytes = 0.0
    for outputs, inputs in matrices:
        matrix_bytes += outputs * inputs * BYTES_PER_WEIGHT[weights]
        if quantized:
            matrix_bytes += outputs * (inputs / group_size if group_size else 1) * BYTES_PER_WEIGHT[compute]
    table = config.vocab_size * config.hidden_size
    matrix_weights = sum(outputs * inputs for outputs, inputs in matrices)
    if config.tied_embeddings:
        matrix_bytes += table * BYTES_PER_WEIGHT[compute]
        embedding_bytes = 0.0
    else:
        embedding_bytes = table * BYTES_PER_WEIGHT[compute]
    vectors = _vector_elements(config)
    return Sizes(
        parameters=matrix_weights + table + vectors,
        matrix_bytes=matrix_bytes,
        embedding_bytes=embedding_bytes,
        vector_bytes=4.0 * vectors,
        state_bytes=config.state_elements * (2 if state == "float16" else 4) + 8,
        kv_bytes_per_token=2 * 2 * config.num_layers * config.hidden_size,
        config=config,
    )


def sizes_of_bundle(manifest: Manifest) -> Sizes:
    """Sizes of a bundle: its weights file as it is, split as its precision says."""
    config, compute = manifest.model, manifest.precision.compute
    vectors = 4.0 * _vector_elements(config)
    table = config.vocab_size * config.hidden_size
    stored = str((manifest.quantization or {}).get("embedding", "keep"))
    embedding = 0.0 if config.tied_embeddings else table * BYTES_PER_WEIGHT[compute if stored == "keep" else stored]
    return Sizes(
        parameters=sum(outputs * inputs for outputs, inputs in _matrices(config)) + table + _vector_elements(config),
        matrix_bytes=manifest.weights_bytes - embedding - vectors,
        embedding_bytes=embedding,
        vector_bytes=vectors,
        state_bytes=manifest.state_bytes,
        kv_bytes_per_token=2 * 2 * config.num_layers * config.hidden_size,
        config=config,
    )


def _matrices(config: ModelConfig) -> list[tuple[int, ...]]:
    """(outputs, inputs) of every matrix but the embedding."""
    return [shape for name, shape in weight_shapes(config).items() if len(shape) == 2 and name != "embedding.weight"]


def _vector_elements(config: ModelConfig) -> int:
    """Elements of norms and biases."""
    return sum(shape[0] for shape in weight_shapes(config).values() if len(shape) == 1)
