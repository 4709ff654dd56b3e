"""What a bundle's manifest says: the dataclasses behind manifest.json, the contract between export and every host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from retnet_export.runtime.bundle.config import ModelConfig

FORMAT = "retnet-export bundle"
FORMAT_VERSION = 1
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
    """One tensor that a host carries from step to step: feed `output` back as `input`.

    Attributes:
        input: the graph input's name.
        output: the graph output's name.
        dtype: element type.
        shape: sizes, -1 for the batch, which is always the first axis.
        initial: the value of every element before the first token.
    """

    input: str
    output: str
    dtype: DType
    shape: tuple[int, ...]
    initial: int = 0


def is_in_pieces(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether `shape` is (H·s, Dk/s, Dv): the state `whole`, (H, Dk, Dv), of a sequence, with each head cut into s runs of rows."""
    return (
        len(shape) == len(whole) == 3
        and shape[2] == whole[2]
        and shape[0] % whole[0] == 0
        and shape[0] * shape[1] == whole[0] * whole[1]
    )


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle.

    Attributes:
        file: its name in the folder.
        opset: the version of the default operator set it uses.
        inputs, outputs: everything it takes and gives, state included.
        chunk_size: the most tokens per sequence in one run; 1 for decode.
    """

    file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    chunk_size: int = 1


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


Dialect = Literal["portable", "onnxruntime-cpu", "onnxruntime-cuda"]
"""Of a bundle's graphs: standard ONNX, or with operators of one runtime."""


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but its tensors; `manifest.json` is this, field by field.

    `eos_ids` are the tokens that end a text: the model makes them, with a tokenizer or without.
    """

    format: Literal["retnet-export bundle"]
    format_version: int
    name: str
    model: ModelConfig
    precision: Precision
    dialect: Dialect
    graphs: Mapping[str, GraphSpec]
    state: tuple[StateSpec, ...]
    files: Mapping[str, FileRecord]
    tokenizer: TokenizerSpec | None = None
    eos_ids: tuple[int, ...] = ()
    quantization: Mapping[str, object] | None = None
    verification: Mapping[str, object] | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence."""
        total = 0
        for spec in self.state:
            count = 1
            for size in spec.shape[1:]:
                count *= size
            total += count * dtype_bytes(spec.dtype)
        return total

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights file."""
        return self.files["weights.bin"].bytes if "weights.bin" in self.files else 0


def dtype_bytes(dtype: DType) -> int:
    """Bytes of one element."""
    return {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}[dtype]
