"""A bundle's manifest: the dataclasses behind manifest.json, the contract between export and every host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.layout import AXES, Axis, StateLayout
from retnet_export.runtime.element_types import ELEMENT_TYPES

FORMAT = "retnet-export bundle"
FORMAT_VERSION = 4
"""2: states are named `state.007` and say their layer and axes; graphs say how they keep them. 3: a bundle holds variants of its
graphs, and the manifest its own hash."""
DType = Literal["float32", "float16", "bfloat16", "int64"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: as in the ONNX file.
        dtype: its element type.
        shape: sizes; -1 where the host chooses (the batch, and in prefill the number of tokens).
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a host carries from step to step: feed what the graph gives as `output` back as `input`.

    Attributes:
        input: the graph input's name.
        output: the graph output's name.
        dtype: element type.
        shape: sizes, -1 for the batch, which is always the first axis.
        axes: what each axis is: `AXES` for a layer's state, in every snapshot and on every backend. How a graph keeps it instead
            is said by its `state_layout`.
        layer: whose state it is; None for the position.
        initial: the value of every element before the first token.
    """

    input: str
    output: str
    dtype: DType
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    layer: int | None = None
    initial: int = 0


POSITION = "position"
"""The state that belongs to no layer: the number of tokens a sequence has read."""


def state_name(layer: int) -> str:
    """The name of a layer's state in every graph and snapshot; zero-padded, because Triton pairs inputs and outputs by order."""
    return f"state.{layer:03d}"


def state_specs(config: ModelConfig, dtype: DType, batch: int | None = None) -> tuple[StateSpec, ...]:
    """What every graph of a model carries from step to step: the position, and (B, H, Dk, Dv) for each layer.

    Args:
        dtype: of the layers' states.
        batch: a fixed batch, or None for any.
    """
    size = -1 if batch is None else batch
    shape = (size, config.num_heads, config.head_key_dim, config.head_value_dim)
    position = StateSpec(POSITION, f"{POSITION}_out", "int64", (size,), ("batch",))
    names = [state_name(layer) for layer in range(config.num_layers)]
    return (position, *(StateSpec(name, f"{name}_out", dtype, shape, AXES, layer) for layer, name in enumerate(names)))


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle.

    Attributes:
        file: its name in the folder.
        opset: the version of the default operator set it uses.
        inputs, outputs: everything it takes and gives, state included.
        chunk_size: the most tokens per sequence in one run; 1 for decode.
        state_layout: how it keeps the states of the layers.
        steps_in_place: whether a run of one token for each sequence may write the states of the layers where it reads them.
        chunks_in_place: whether every run may.
    """

    file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    chunk_size: int = 1
    state_layout: StateLayout = field(default_factory=StateLayout)
    steps_in_place: bool = False
    chunks_in_place: bool = False


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Precision:
    """Number formats: of the stored weights, of the matrix products, of the state."""

    weights: str
    compute: Literal["float32", "float16", "bfloat16"]
    state: str


@dataclass(frozen=True)
class TokenizerSpec:
    """How text becomes tokens.

    Attributes:
        file: tokenizer.json.
        prefix_ids: tokens that are read before a text, mostly one or none: what the tokenizer's post-processor puts there.
        chat_template: the file of the template that turns messages into a text, if the checkpoint has one.
        special_tokens: what that template may name, as `bos_token`: their texts.
    """

    file: str
    prefix_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """Its files in the folder."""
        return (self.file,) if self.chat_template is None else (self.file, self.chat_template)


PORTABLE = "portable"
"""The variant that every bundle has: standard ONNX, which every runtime reads."""


@dataclass(frozen=True)
class Needs:
    """What it takes to run a variant.

    Attributes:
        onnxruntime: the first version of ONNX Runtime that has its operators, "1.25".
        provider: on what.
        operators: those that are not standard ONNX, "com.microsoft::LinearAttention".
    """

    onnxruntime: str
    provider: Literal["cpu", "cuda"]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """The graphs of a bundle in one form; all variants compute the same and read the same `weights.bin`.

    Attributes:
        graphs: "decode" and "prefill".
        needs: what it takes to run them; None for standard ONNX.
    """

    graphs: Mapping[str, GraphSpec]
    needs: Needs | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle except its tensors; `manifest.json` has these fields.

    `eos_ids` are the tokens that end a text.
    """

    format: Literal["retnet-export bundle"]
    format_version: int
    name: str
    model: ModelConfig
    precision: Precision
    variants: Mapping[str, Variant]
    state: tuple[StateSpec, ...]
    files: Mapping[str, FileRecord]
    tokenizer: TokenizerSpec | None = None
    eos_ids: tuple[int, ...] = ()
    quantization: Mapping[str, object] | None = None
    verification: Mapping[str, object] | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def graphs(self) -> Mapping[str, GraphSpec]:
        """The portable graphs, "decode" and "prefill"."""
        return self.variants[PORTABLE].graphs

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence."""
        return sum(math.prod(spec.shape[1:]) * ELEMENT_TYPES[spec.dtype].bits // 8 for spec in self.state)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights file."""
        return self.files["weights.bin"].bytes if "weights.bin" in self.files else 0
