"""`retnet-export verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands.options import BackendName, BundlePath, Json, checkpoint_path
from retnet_export.commands.output import print_json, print_table, print_warning, progress, size
from retnet_export.runtime.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from retnet_export.export.verify import Verification


def verify(
    bundle: BundlePath,
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint that the bundle was exported from.", parser=checkpoint_path)],
    text: Annotated[Path | None, typer.Option(help="Text to read; default: a passage of Shakespeare and the Bible.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most positions to compare.")] = 512,
    backend: BackendName = "auto",
    by_layer: Annotated[
        bool | None,
        typer.Option(
            "--by-layer/--whole",
            help="A layer at a time, on ONNX Runtime, for models larger than memory; default: only if memory is short.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the bundle, token by token, with the checkpoint's parallel form, and record the result in the manifest."""
    from retnet_export.export.checkpoints import open_checkpoint
    from retnet_export.export.verify import memory_needed, verify_by_layer
    from retnet_export.export.verify import verify as verify_whole
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.files import read_text
    from retnet_export.runtime.device.memory import available_memory
    from retnet_export.runtime.model import load

    on_cpu = backend in ("auto", "onnxruntime")
    if by_layer and not on_cpu:
        raise ArgumentError("by_layer", f"runs on onnxruntime, not on backend={backend}; give one of the two")
    checked, opened = open_bundle(bundle), open_checkpoint(checkpoint)
    needed, available = memory_needed(checked), available_memory()
    if by_layer is None:
        by_layer = on_cpu and available is not None and needed > available
        if by_layer:
            print_warning(
                f"the whole graphs would need up to {size(needed)} of memory, {size(available or 0)} are free: they run a "
                "layer at a time on onnxruntime; --whole insists"
            )
    passage = None if text is None else read_text(text)
    with progress("verify", quiet=as_json) as update:
        if by_layer:
            name, result = "onnxruntime", verify_by_layer(checked, opened, text=passage, tokens=tokens, progress=update)
        else:
            # A session for each graph, so that it is decode.onnx that steps.
            model = load(bundle, backend, low_memory=False, check_hashes=False)
            name, result = model.backend.name, verify_whole(model, opened, text=passage, tokens=tokens, progress=update)
    record = asdict(result) | {"backend": name, "relative_error_by_position": result.drift()}
    try:
        checked.with_manifest(verification=record)
    except OSError as error:
        print_warning(f"{bundle}: the result was not recorded in its manifest: {error.strerror}; copy the bundle to record it")
    if as_json:
        print_json(record)
    else:
        print_verification(bundle, result)
    if not result.passed:
        raise UserError(
            f"{bundle}: the graphs do not compute what the checkpoint computes: relative error {result.error.relative:.1e} in "
            f"decode, {result.prefill_error.relative:.1e} in prefill (at most {result.tolerance:.0e}), "
            f"{len(result.disagreements)} tokens differ"
        )


def print_verification(bundle: Path, result: Verification) -> None:
    greedy = f"{result.agreements} of {result.tokens} positions agree"
    if result.ties:
        greedy += f", {result.ties} ties (closer than the error)"
    if result.disagreements:
        greedy += f", {len(result.disagreements)} differ, first at {result.disagreements[0]}"
    drift = result.drift()
    rows = [
        ("read", f"{result.tokens} tokens of {result.source}"),
        ("logit error", f"max {result.error.maximum:.2e}, mean {result.error.mean:.2e}"),
        (
            "relative",
            f"{result.error.relative:.2e} of the logits' standard deviation; at most {result.tolerance:.0e} ({result.reason})",
        ),
        ("drift", f"{drift[0]:.1e} in the first eighth of the text, {drift[-1]:.1e} in the last"),
        ("prefill", f"{result.prefill_error.relative:.2e} after each chunk"),
        ("greedy", greedy),
        *([("memory", "the graphs were run a layer at a time on onnxruntime; no other backend was")] if result.by_layer else []),
    ]
    if result.clamp_error is not None:
        rows.append(
            ("row clamp", f"{result.clamp_error.relative:.2e} against the training form, whose clamp no recurrent form has")
        )
    print_table(f"{bundle}: {'verified' if result.passed else 'NOT verified'} against the parallel form", rows)
