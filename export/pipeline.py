"""From a checkpoint to a bundle: write graphs, stream weights, hash files; the folder appears complete."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.text import read_text_settings
from retnet_export.graph.card import write_card
from retnet_export.runtime.bundle.bundle import MANIFEST, Bundle, open_bundle, record_files, write_manifest
from retnet_export.runtime.bundle.files import new_folder
from retnet_export.runtime.bundle.manifest import FORMAT_VERSION, FileRecord, Manifest, Precision, Variant, state_specs
from retnet_export.runtime.device.doctor import package_versions
from retnet_export.runtime.element_types import COMPUTED, STORED
from retnet_export.runtime.errors import ArgumentError, MissingExtraError, PrecisionWarning, one_of
from retnet_export.runtime.hub import repository_of
from retnet_export.runtime.progress import Progress, silent

DEFAULT_CHUNK = 128
"""Within 7 % of the fastest on two CPU cores, with the memory and the waste at the end of a prompt of the smaller."""


@dataclass(frozen=True)
class ExportOptions:
    """The options of `retnet-export export`.

    Attributes:
        precision: of stored matrices and of the operands of matrix products: fp32, fp16 or bf16.
        state: of the stored state: fp32 or fp16.
        batch: a fixed batch size, or None for any.
        chunk: the most tokens per sequence that the prefill graph reads at once.
        bos: what is read before a text: "auto" as the tokenizer does it, "none", or a token by its id or text.
    """

    precision: str = "fp32"
    state: str = "fp32"
    batch: int | None = None
    chunk: int = DEFAULT_CHUNK
    bos: str = "auto"

    def __post_init__(self) -> None:
        given: list[tuple[str, str, Collection[str]]] = [("precision", self.precision, COMPUTED), ("state", self.state, STORED)]
        for name, value, choices in given:
            if value not in choices:
                raise ArgumentError(name, f"is {value!r}, expected {one_of(choices)}")
        if self.batch is not None and self.batch < 1:
            raise ArgumentError("batch", f"is {self.batch}, expected at least 1")
        if self.chunk < 1:
            raise ArgumentError("chunk", f"is {self.chunk}, expected at least 1")


def export_bundle(
    checkpoint: Checkpoint,
    target: str | Path,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Write a bundle.

    Raises:
        UserError: the target exists or cannot be written; nothing is left behind.
    """
    options = options or ExportOptions()
    if options.precision == "bf16":
        warnings.warn(
            "precision=bf16: ONNX Runtime has no kernels for it on a CPU; only GPUs run this bundle (cuda, TensorRT)",
            PrecisionWarning,
            stacklevel=2,
        )
    text = read_text_settings(checkpoint.text, checkpoint.settings, checkpoint.config.vocab_size, options.bos)
    with new_folder(target, marker=MANIFEST, force=force) as folder:
        written = _write_graphs(folder, checkpoint, options, progress)
        tokenizer = text.write(folder)
        manifest = Manifest(
            format="retnet-export bundle",
            format_version=FORMAT_VERSION,
            name=Path(target).name.removesuffix(".retnet"),
            model=checkpoint.config,
            precision=Precision(COMPUTED[options.precision], COMPUTED[options.precision], STORED[options.state]),
            variants=written.variants,
            state=state_specs(checkpoint.config, STORED[options.state], options.batch),
            files=record_files(folder, written.files),
            tokenizer=tokenizer,
            eos_ids=text.eos_ids,
            provenance={
                "family": checkpoint.family,
                "checkpoint": repository_of(checkpoint.path) or checkpoint.path.name or str(checkpoint.path),
                "checkpoint_sha256": written.checkpoint_sha256,
                "versions": package_versions("retnet-export", "onnx", "onnx-ir", "numpy"),
            },
        )
        write_manifest(folder, manifest)
        write_card(folder, manifest)
        open_bundle(folder, check_hashes=False)  # what cannot be opened takes no place
    return Bundle(Path(target), manifest)


@dataclass(frozen=True)
class _Written:
    """What `_write_graphs` leaves in the folder, and which weights went into it."""

    variants: dict[str, Variant]
    files: dict[str, FileRecord]
    checkpoint_sha256: str


def _write_graphs(folder: Path, checkpoint: Checkpoint, options: ExportOptions, progress: Progress) -> _Written:
    if find_spec("onnx_ir") is None:
        raise MissingExtraError("onnx-ir", "export", "exporting")
    from retnet_export.export.reading import WeightsAhead
    from retnet_export.graph.decode import build_decode
    from retnet_export.graph.prefill import build_prefill
    from retnet_export.graph.retnet import warn_of_slow_heads
    from retnet_export.graph.states import store_states_as_float16
    from retnet_export.graph.variants import ALWAYS
    from retnet_export.graph.variants.writing import write_variants
    from retnet_export.graph.weights_file import WeightsFile

    config = checkpoint.config
    warn_of_slow_heads(config, options.state)
    graphs = {}
    with WeightsAhead(config, checkpoint.weight, progress) as ahead, WeightsFile(folder / "weights.bin") as weights:
        for name, build in (("decode", build_decode), ("prefill", build_prefill)):
            graphs[name] = build(config, ahead.take, weights, COMPUTED[options.precision], options.batch)
            if options.state == "fp16":
                store_states_as_float16(graphs[name])
        files, checkpoint_sha256 = {weights.name: weights.record()}, ahead.sha256()
    variants = write_variants(folder, graphs, {"decode": 1, "prefill": options.chunk}, ALWAYS)
    return _Written(variants, files, checkpoint_sha256)
