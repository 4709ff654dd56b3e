"""ONNX Runtime 1.20 to 1.32 through one code path: the differences between its versions.

Rule: no other module asks for a version of ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from retnet_export.runtime.backends.agreement import check_agrees
from retnet_export.runtime.bundle.manifest import PORTABLE, DType, GraphSpec, Manifest, TensorSpec
from retnet_export.runtime.element_types import ELEMENT_TYPES
from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    import onnxruntime

TYPES: Mapping[str, DType] = {f"tensor({each.onnx.lower()})": cast(DType, each.name) for each in ELEMENT_TYPES.values()}
"""Element types by ONNX Runtime's names."""
WEIGHTS_FOLDER_OPTION = (1, 21)
"""The first that can be told where the weights of a graph in memory are."""
FUSES_INTEGERS = (1, 25)
"""The first that makes one operator of an 8-bit weight's DequantizeLinear and its product, and that has LinearAttention."""

ACTIVATION_BLOCK = 128
"""Numbers that share a scale where products with INT8 weights round what flows into them. ONNX Runtime's own 32 take 45 %
longer a step, and a quarter more memory for scales; what 128 cost in quality is in docs/lab/cpu-step.md."""
ACTIVATION_ENTRY = ("session.qdq_matmulnbits_block_size", str(ACTIVATION_BLOCK))
"""The entry of a session's configuration that says so."""

BFLOAT16_REMEDY = "run it on a GPU (backend=cuda, or compile it for TensorRT), or export it with precision=fp32 or fp16"
"""What to do with a bundle of bfloat16."""


def is_older(version: str, than: tuple[int, int]) -> bool:
    """Whether a version such as "1.24.4" is older; False for text that is not a version."""
    numbers = re.findall(r"\d+", version)[:2]
    return len(numbers) == 2 and tuple(map(int, numbers)) < than


def slow_when_quantized(version: str) -> str | None:
    """Why quantized weights are slow in a version of ONNX Runtime; None if they are not."""
    if not is_older(version, FUSES_INTEGERS):
        return None
    return (
        f"ONNX Runtime {version} runs them with products of integers, a quarter slower than 1.25 and later do; INT8 weights in "
        "groups, or beside float16, become floats at every step: ten times slower. On Python 3.11 or later: "
        "pip install --upgrade onnxruntime"
    )


def return_free_memory() -> None:
    """Give the system back what the C library keeps of freed memory: after weights are packed, a quarter of their size.

    Only glibc keeps so much, and only it has this call.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; TypeError: Windows has no CDLL(None)
        ctypes.CDLL(None).malloc_trim(0)


def read_weights_from(folder: Path, options: onnxruntime.SessionOptions, purpose: str) -> None:
    """Let a graph that is loaded from memory find its external weights in `folder`.

    Raises:
        UserError: this version cannot.
    """
    import onnxruntime

    if is_older(onnxruntime.__version__, WEIGHTS_FOLDER_OPTION):
        raise UserError(
            f"{purpose} needs ONNX Runtime 1.21 or later, this is {onnxruntime.__version__}: pip install --upgrade onnxruntime"
        )
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))


def check_computes(manifest: Manifest, path: Path) -> None:
    """Refuse a bundle whose products the CPU provider has no kernels for, which it would say as NOT_IMPLEMENTED.

    Raises:
        UserError: its products are bfloat16.
    """
    if manifest.precision.compute == "bfloat16":
        raise UserError(f"{path}: its products are bfloat16, which ONNX Runtime does not compute on a CPU; {BFLOAT16_REMEDY}")


def best_variant(manifest: Manifest, provider: Literal["cpu", "cuda"]) -> str:
    """The variant that the installed ONNX Runtime runs fastest: one for the provider, if this version has its operators."""
    import onnxruntime

    for name, variant in manifest.variants.items():
        needs = variant.needs
        if needs is not None and needs.provider == provider:
            major, minor = map(int, needs.onnxruntime.split("."))
            if not is_older(onnxruntime.__version__, (major, minor)):
                return name
    return PORTABLE


def check_session(path: Path, spec: GraphSpec, session: onnxruntime.InferenceSession) -> None:
    """Compare a loaded graph with what the manifest says of it.

    Raises:
        UserError: they differ.
    """

    def tensors(args: Sequence[onnxruntime.NodeArg]) -> list[TensorSpec]:
        return [
            TensorSpec(arg.name, TYPES.get(arg.type, arg.type), tuple(size if isinstance(size, int) else -1 for size in arg.shape))
            for arg in args
        ]

    check_agrees(path, spec, tensors(session.get_inputs()), tensors(session.get_outputs()))
