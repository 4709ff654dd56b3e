"""`retnet-export export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retnet_export.commands.options import CheckpointPath, Force, Json, Output
from retnet_export.commands.output import print_json, print_table, progress

if TYPE_CHECKING:
    from retnet_export.runtime.bundle.bundle import Bundle
    from retnet_export.runtime.bundle.manifest import Variant


def tokenizer_path(given: str) -> Path:
    """A tokenizer's folder, downloaded if it is a repository of the Hub."""
    from retnet_export.export.checkpoints.hub import tokenizer_folder

    return tokenizer_folder(given)


def export(
    checkpoint: CheckpointPath,
    output: Output,
    precision: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Number format of weights and products.")] = "fp32",
    state: Annotated[Literal["fp32", "fp16"], typer.Option(help="Number format of the stored state.")] = "fp32",
    batch: Annotated[int | None, typer.Option(help="A fixed number of sequences; default: any.")] = None,
    chunk: Annotated[int, typer.Option(help="Most tokens that prefill reads at once.")] = 128,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A tokenizer in place of the checkpoint's: a folder with tokenizer.json, or user/name on the Hub.",
            parser=tokenizer_path,
        ),
    ] = None,
    bos: Annotated[
        str, typer.Option(help="Token before a text: auto (what the tokenizer adds), none, or a token's id or text.")
    ] = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a trained checkpoint into a bundle: ONNX graphs with explicit state, weights, manifest."""
    from retnet_export.export.checkpoints import open_checkpoint
    from retnet_export.export.pipeline import ExportOptions, export_bundle

    options = ExportOptions(precision, state, batch, chunk, bos)
    opened = open_checkpoint(checkpoint)
    if tokenizer is not None:
        opened = replace(opened, text=tokenizer)
    with progress("export", quiet=as_json) as update:
        bundle = export_bundle(opened, output, options, force=force, progress=update)
    if as_json:
        print_json(summary(bundle))
    else:
        print_summary(f"{bundle.path}: exported from a checkpoint of the {opened.family} family", bundle)


def summary(bundle: Bundle) -> dict[str, object]:
    """What `export` and `inspect` print about a bundle."""
    from retnet_export.runtime.bundle.weights import parameters

    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "name": manifest.name,
        "precision": vars(manifest.precision),
        "chunk_size": manifest.graphs["prefill"].chunk_size,
        "variants": {
            name: {
                "graphs": {kind: graph.file for kind, graph in variant.graphs.items()},
                "needs": None if variant.needs is None else vars(variant.needs),
            }
            for name, variant in manifest.variants.items()
        },
        "parameters": parameters(manifest.model),
        "weights_bytes": manifest.weights_bytes,
        "state_bytes_per_sequence": manifest.state_bytes,
        "total_bytes": sum(record.bytes for record in manifest.files.values()),
        "tokenizer": manifest.tokenizer is not None,
        "prefix_ids": list(manifest.tokenizer.prefix_ids) if manifest.tokenizer else [],
        "eos_ids": list(manifest.eos_ids),
        "chat_template": manifest.tokenizer is not None and manifest.tokenizer.chat_template is not None,
    }


def print_summary(title: str, bundle: Bundle) -> None:
    from retnet_export.graph.card import facts

    manifest = bundle.manifest
    rows = [*facts(manifest), *(("graphs", _described(name, variant)) for name, variant in manifest.variants.items())]
    rows.append(("tokenizer", "yes" if manifest.tokenizer else "none: takes and gives token ids"))
    print_table(title, [*rows, *_rows_of_text(bundle)])


def _described(name: str, variant: Variant) -> str:
    """portable: decode.onnx, prefill.onnx; any runtime with ONNX opset 20."""
    files = ", ".join(graph.file for graph in variant.graphs.values())
    if variant.needs is None:
        return f"{name}: {files}; any runtime with ONNX opset {variant.graphs['decode'].opset}"
    place = {"cpu": "a CPU", "cuda": "an NVIDIA GPU"}[variant.needs.provider]
    return f"{name}: {files}; ONNX Runtime {variant.needs.onnxruntime} or later on {place}"


def _rows_of_text(bundle: Bundle) -> list[tuple[str, str]]:
    """Which tokens begin and end a text, and whether there is a chat template."""
    from retnet_export.runtime.generate.tokenizer import Tokenizer

    spec = bundle.manifest.tokenizer
    tokenizer = None if spec is None else Tokenizer(bundle.file(spec.file), spec)

    def named(ids: Sequence[int]) -> str:
        return ", ".join(str(token) if tokenizer is None else f"{tokenizer.token(token)} ({token})" for token in ids) or "nothing"

    rows = [] if spec is None else [("before a text", named(spec.prefix_ids))]
    rows.append(("ends a text", named(bundle.manifest.eos_ids)))
    if spec is not None:
        rows.append(("chat template", "none" if spec.chat_template is None else spec.chat_template))
    return rows
