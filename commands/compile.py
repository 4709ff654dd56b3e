"""`retnet-export compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retnet_export.commands.options import BundlePath, Json
from retnet_export.commands.output import print_json, print_table, progress, size

if TYPE_CHECKING:
    from retnet_export.runtime.bundle.bundle import Bundle
    from retnet_export.runtime.bundle.engines import EngineRecord


def compile_(
    bundle: BundlePath,
    target: Annotated[
        Literal["tensorrt", "tensorrt-rtx"],
        typer.Option(help="tensorrt builds for this machine's GPU, tensorrt-rtx for RTX GPUs, which need not be present."),
    ] = "tensorrt",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(metavar="X.Y", help="Compute capability of a GPU to build for (tensorrt-rtx only); may be repeated."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="The most sequences that step together.")] = 1,
    candidates: Annotated[int, typer.Option(min=0, help="How many of the largest logits a step picks on the GPU.")] = 64,
    workspace_mb: Annotated[
        int | None, typer.Option("--workspace", min=1, metavar="MB", help="Scratch memory for building; default: TensorRT decides.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the times of kernels; makes the next build faster.")
    ] = None,
    largest_weight_mb: Annotated[
        int | None,
        typer.Option(
            "--largest-weight",
            min=1,
            metavar="MB",
            help="Cut larger weights, where one large allocation fails though memory is free.",
        ),
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="Build one engine for decode and one for prefill; stores the weights twice.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build the TensorRT engines of a bundle. They go into its folder engines/."""
    from retnet_export.export.tensorrt import CompileOptions, compile_bundle
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.schema import encode

    options = CompileOptions(
        target=target,
        compute_capabilities=tuple(compute_capability or ()),
        max_batch=max_batch,
        candidates=candidates,
        workspace_mb=workspace_mb,
        timing_cache=timing_cache,
        largest_weight_mb=largest_weight_mb,
        form="separate" if separate else None,
    )
    opened = open_bundle(bundle)
    with progress("compile", quiet=as_json) as update:
        record = compile_bundle(opened, options, progress=update)
    if as_json:
        print_json(encode(record))
    else:
        print_record(opened, record)


FORMS = {
    "joined": "decode.onnx and prefill.onnx in one engine, over one copy of the weights",
    "prefill": "prefill.onnx alone, also for single tokens: this TensorRT does not accept two graphs in one engine",
    "separate": "decode.onnx and prefill.onnx in one engine each, with the weights twice",
}
INT8 = {
    "planes": "read as two planes of four bits",
    "fused": "read by the product's kernel as they are",
    "floats": "converted to floats at every step: this TensorRT has no better form",
}


def print_record(bundle: Bundle, record: EngineRecord) -> None:
    rows = [("target", f"{record.target} {record.version}, compute capability {', '.join(record.compute_capabilities)}")]
    rows += [(name, size(file.bytes)) for name, file in record.files.items()]
    rows.append(("weights", f"{size(record.weights_bytes)} on the device"))
    rows += [
        (part.role, f"from {part.graph}.onnx, up to {part.max_tokens} tokens per run, {size(part.activation_bytes)} while running")
        for part in record.parts
    ]
    rows.append(("graphs", FORMS[record.form]))
    if record.int8 != "none":
        rows.append(("INT8 weights", INT8[record.int8]))
    rows.append(("batch", f"up to {record.max_batch}; the {record.candidates} largest logits of each are picked on the device"))
    rows.append(("built in", f"{record.build_seconds:.1f} s"))
    print_table(f"{bundle.path}: compiled", rows)
    print_anatomy(record)


def print_anatomy(record: EngineRecord) -> None:
    """How many bytes a step and a chunk move, and how many of them every engine must move."""
    for each in record.anatomy:
        what = "a step" if each.role == "decode" else f"a chunk of {each.tokens} tokens"
        parts = f"weights {size(each.weight_bytes)}, state {size(each.state_bytes)}, rest {size(each.other_bytes)}"
        rows = [
            ("kernels", f"{each.kernels}, {each.kernels_per_layer:.1f} a layer"),
            ("moved", f"{size(each.bytes)}: {parts}"),
            ("floor", f"{size(each.floor_bytes)}; {each.over_floor:.2f} times as much is moved"),
            ("read from", f"the {each.source}"),
        ]
        if each.role == "decode":
            rows.insert(2, ("the state", f"passes through memory {each.state_passes:g} times; at least 2"))
        rows += [("above the floor", f"{size(excess.bytes)} {excess.what}") for excess in each.excess]
        print_table(f"\n{record.stem}: {what}, one sequence", rows)
    if record.anatomy_missing:
        print_table(f"\n{record.stem}: kernels and bytes", [("not known", record.anatomy_missing)])
