"""A bundle made from another bundle: the same model with other graphs and other weights, the rest taken over.

Rule: what the manifest says of graphs is read off the graphs as they are written. What was verified is the bundle
before; how far this one is from it is what `evaluate` measures.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from retnet_export.graph.variants import ALWAYS
from retnet_export.graph.variants.writing import write_variants
from retnet_export.runtime.bundle.bundle import Bundle, record_files, write_manifest
from retnet_export.runtime.bundle.manifest import FileRecord


def write_derived_bundle(
    source: Bundle, folder: Path, target: str | Path, graphs: Mapping[str, ir.Model], weights: FileRecord, **changes: Any
) -> None:
    """Write everything but `weights.bin`, which is there.

    Args:
        source: the bundle before.
        folder: where the new one is written.
        target: what `folder` will be called.
        graphs: the new portable graphs, by their names in the manifest; their large tensors refer to `weights.bin` in `folder`.
        weights: of `weights.bin`.
        **changes: what else differs in the manifest.
    """
    manifest = source.manifest
    chunk_sizes = {name: spec.chunk_size for name, spec in manifest.graphs.items()}
    variants = write_variants(folder, graphs, chunk_sizes, ALWAYS)
    if manifest.tokenizer is not None:
        for file in manifest.tokenizer.files:
            shutil.copyfile(source.file(file), folder / file)
    write_manifest(
        folder,
        replace(
            manifest,
            name=Path(target).name.removesuffix(".retnet"),
            variants=variants,
            files=record_files(folder, {"weights.bin": weights}),
            verification=None,
            **changes,
        ),
    )
