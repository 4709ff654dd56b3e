"""The graphs of a bundle on the disk: the portable ones, and from these files those of each other variant.

Rule: all variants read the same bytes of `weights.bin`, so that a saved state fits each of them and a bundle grows by some hundred
kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from retnet_export.graph.retnet import graph_spec
from retnet_export.graph.variants import FORMS, rewrite
from retnet_export.runtime.bundle.manifest import PORTABLE, GraphSpec, Needs, Variant


def write_variants(
    folder: Path, graphs: Mapping[str, ir.Model], chunk_sizes: Mapping[str, int], names: Sequence[str]
) -> dict[str, Variant]:
    """Write every variant's graphs.

    Args:
        folder: the bundle under construction; `weights.bin` lies in it, whole.
        graphs: the portable graphs, by their names.
        chunk_sizes: the most tokens that each reads.
        names: of the variants, `PORTABLE` among them.
    """
    written: dict[str, GraphSpec] = {}
    for name, model in graphs.items():
        ir.save(model, folder / f"{name}.onnx")
        written[name] = graph_spec(model, f"{name}.onnx", chunk_sizes[name])
    others = {name: _write_other(folder, written, name) for name in names if name != PORTABLE}
    return {PORTABLE: Variant(written), **{name: variant for name, variant in others.items() if variant is not None}}


def _write_other(folder: Path, portable: Mapping[str, GraphSpec], variant: str) -> Variant | None:
    form = FORMS[variant]
    models = {name: rewrite(ir.load(folder / spec.file), form.passes) for name, spec in portable.items()}
    if form.only_with is not None and not any(node.op_type == form.only_with for node in models["decode"].graph):
        return None
    graphs = {}
    for name, model in models.items():
        file_name = f"{name}.{variant}.onnx"
        ir.save(model, folder / file_name)
        graphs[name] = graph_spec(model, file_name, portable[name].chunk_size)
    operators = {f"{node.domain}::{node.op_type}" for model in models.values() for node in model.graph.all_nodes() if node.domain}
    return Variant(graphs, Needs(form.first_version(operators), "cpu", tuple(sorted(operators))))
