"""`retnet-export quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from retnet_export.commands.options import BundlePath, Force, Json, Output
from retnet_export.commands.output import print_json, print_table, progress, size

if TYPE_CHECKING:
    from retnet_export.quantize.evaluation import Evaluation
    from retnet_export.runtime.bundle.bundle import Bundle


def quantize(
    bundle: BundlePath,
    output: Output,
    weights: Annotated[
        Literal["int8", "int4", "fp8"],
        typer.Option(help="Format of all matrices except embedding and head; fp8 needs --activations fp8."),
    ] = "int4",
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Inputs that share a scale: 16, 32, 64, 128 or 256; default: 64 for int4, all inputs of an output for int8.",
        ),
    ] = None,
    method: Annotated[Literal["rtn", "gptq"], typer.Option(help="rtn rounds to nearest; gptq needs --calibration.")] = "rtn",
    embedding: Annotated[Literal["int8", "int4", "keep"], typer.Option(help="Format of the embedding.")] = "int8",
    head: Annotated[
        Literal["int8", "int4", "keep", "fp8"], typer.Option(help="Format of the output head; fp8 needs --activations fp8.")
    ] = "int8",
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text of the kinds that the model will continue, 30 kB or more.")
    ] = None,
    state: Annotated[Literal["fp16"] | None, typer.Option(help="Number format of the stored state; default: unchanged.")] = None,
    activations: Annotated[
        Literal["int8", "fp8"] | None, typer.Option(help="Format of the inputs of products, for TensorRT; needs --calibration.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Then compare with the float bundle on this text, and record the result in the bundle."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a bundle smaller and faster with integer weights in standard ONNX. --evaluate measures the cost in quality."""
    from retnet_export.commands.evaluate import print_evaluation
    from retnet_export.quantize.evaluation import evaluate as run_evaluation
    from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
    from retnet_export.quantize.texts import encode
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.files import read_text
    from retnet_export.runtime.model import load

    options = QuantizeOptions(weights, group_size, method, embedding, head, calibration, state, activations)
    source = open_bundle(bundle)
    if evaluate is not None:
        # Refuse an unusable text before the work, not after.
        encode(load(source.path, check_hashes=False), read_text(evaluate), evaluate)
    evaluation: Evaluation | None = None
    with progress("quantize", quiet=as_json) as update:

        def judge(made: Bundle) -> Mapping[str, object]:
            nonlocal evaluation
            assert evaluate is not None
            ours, theirs = load(made.path, check_hashes=False), load(source.path, check_hashes=False)
            evaluation = run_evaluation(ours, evaluate, against=theirs, progress=update)
            return asdict(evaluation)

        result = quantize_bundle(source, output, options, force=force, judge=None if evaluate is None else judge, progress=update)
    if as_json:
        print_json({"bundle": str(result.path), **_sizes(source, result), "quantization": result.manifest.quantization})
        return
    _print_quantized(source, result)
    if evaluation is not None:
        print_evaluation(result.path, evaluation)


def _sizes(source: Bundle, result: Bundle) -> dict[str, int]:
    return {"weights_bytes_before": source.manifest.weights_bytes, "weights_bytes": result.manifest.weights_bytes}


def _print_quantized(source: Bundle, result: Bundle) -> None:
    from retnet_export.graph.card import facts

    before, after = _sizes(source, result).values()
    errors = cast(dict[str, float], (result.manifest.quantization or {})["relative_weight_error"])
    rows = [
        ("weights file", f"{size(before)} -> {size(after)}, {before / after:.1f} times smaller"),
        ("rounding error", ", ".join(f"{role} {100 * error:.2f} %" for role, error in errors.items()) + " of their size"),
    ]
    print_table(f"{result.path}: quantized", [*rows, *facts(result.manifest)])
