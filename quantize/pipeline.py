"""From a bundle to a smaller one: quantize one matrix after another, rewrite both graphs in one pass, hash the files."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from retnet_export.quantize.options import WEIGHTS
from retnet_export.quantize.options import QuantizeOptions as QuantizeOptions
from retnet_export.runtime.bundle.bundle import MANIFEST, Bundle, open_bundle, record_files, write_manifest
from retnet_export.runtime.bundle.files import new_folder, sha256_of
from retnet_export.runtime.errors import ArgumentError, MissingExtraError, PrecisionWarning, UserError
from retnet_export.runtime.progress import Progress, silent

ENOUGH_TOKENS = 4096
"""Of a calibration text: below, gptq lost to rounding to nearest on the bundled model, in perplexity or in KL."""
Judge = Callable[[Bundle], Mapping[str, object]]


def quantize_bundle(
    source: Bundle,
    target: str | Path,
    options: QuantizeOptions,
    *,
    force: bool = False,
    judge: Judge | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Write a quantized copy of a bundle.

    Args:
        judge: measures the new bundle before it takes its place; what it says is recorded as "evaluation".

    Raises:
        UserError: the source is quantized already, options do not fit it, the calibration text is unfit, `judge` refuses the
            result, or the target cannot be written; nothing is left behind, and what was there before stays.
    """
    try:
        from retnet_export.graph.loading import load_graph
    except ImportError as error:
        raise MissingExtraError("onnx-ir", "export", "quantizing") from error
    from retnet_export.graph.card import write_card
    from retnet_export.graph.retnet import warn_of_slow_heads
    from retnet_export.graph.states import store_states_as_float16
    from retnet_export.graph.variants import ALWAYS
    from retnet_export.graph.variants.writing import write_variants
    from retnet_export.graph.weights_file import WeightsFile
    from retnet_export.quantize.calibration import activation_ranges
    from retnet_export.quantize.matrices import MatrixRun, planned_matrices
    from retnet_export.quantize.rewrite import products, quantize_graph

    _check_source(source, target, options)
    manifest = source.manifest
    warn_of_slow_heads(manifest.model, options.state or "fp32")
    graphs = {name: load_graph(source, spec.file) for name, spec in manifest.graphs.items()}
    decode = graphs["decode"]
    plan = planned_matrices(source, decode, options)
    calibration = None if options.calibration is None else _calibration(source, options.calibration)
    tokens = None if calibration is None else calibration.pop("tokens")
    if calibration is not None and tokens is not None and options.method == "gptq" and tokens.size < ENOUGH_TOKENS:
        warnings.warn(
            f"{calibration['file']}: {tokens.size:,} tokens are few to calibrate on: below {ENOUGH_TOKENS:,} gptq can be worse "
            "than rounding to nearest (docs/lab/calibration.md); give more text of the kinds that the model will continue, and "
            "measure both with `retnet-export evaluate`",
            PrecisionWarning,
            stacklevel=2,
        )
    with new_folder(target, marker=MANIFEST, force=force) as folder:
        ranges = None
        if options.activations is not None and tokens is not None:
            progress("measuring activations", 0.0)
            in_format = {name for name, planned in plan.items() if planned.format.name == options.activations}
            measured = {node: name for node, name in products(decode).items() if name in in_format}
            ranges = activation_ranges(source, decode, tokens, measured)
        with WeightsFile(folder / "weights.bin") as file:
            run = MatrixRun(source, decode, plan, file, progress)
            run.run(tokens if options.method == "gptq" else None)
            for model in graphs.values():
                quantize_graph(model, run.store.stored, ranges)
                file.take_over(model)
                if options.state == "fp16":
                    store_states_as_float16(model)
            weights = file.record()
        chunk_sizes = {name: spec.chunk_size for name, spec in manifest.graphs.items()}
        variants = write_variants(folder, graphs, chunk_sizes, ALWAYS)
        for name in () if manifest.tokenizer is None else manifest.tokenizer.files:
            shutil.copyfile(source.file(name), folder / name)
        half = options.state == "fp16"
        changed = replace(
            manifest,
            name=Path(target).name.removesuffix(".retnet"),
            variants=variants,
            files=record_files(folder, {"weights.bin": weights}),
            verification=None,  # what was verified is the source
            state=tuple(replace(spec, dtype="float16") if half and spec.layer is not None else spec for spec in manifest.state),
            precision=replace(
                manifest.precision,
                weights="float8" if options.weights == "fp8" else options.weights,
                state="float16" if half else manifest.precision.state,
            ),
            quantization={
                "weights": options.weights,
                "group_size": options.format_of("weights", "float32").group_size,  # type: ignore[union-attr]
                "method": options.method,
                "embedding": options.embedding,
                "head": options.head,
                "activations": options.activations,
                "activation_ranges": ranges,
                "calibration": calibration,
                "relative_weight_error": run.errors,
                "source": {"name": manifest.name, "weights_sha256": manifest.files["weights.bin"].sha256},
            },
        )
        write_manifest(folder, changed)
        result = open_bundle(folder, check_hashes=False)
        if judge is not None:
            evaluation = judge(result)
            result = result.with_manifest(quantization={**(result.manifest.quantization or {}), "evaluation": evaluation})
        write_card(folder, result.manifest)
    return Bundle(Path(target), result.manifest)


def _check_source(source: Bundle, target: str | Path, options: QuantizeOptions) -> None:
    manifest = source.manifest
    if manifest.quantization is not None:
        raise UserError(
            f"{source.path}: already quantized ({manifest.precision.weights}); quantizing twice only loses "
            "quality; give the bundle that `export` wrote"
        )
    if Path(target).resolve() == source.path.resolve():
        raise UserError(f"{target}: the output is the input; choose another name")
    config = manifest.model
    if config.tied_embeddings and options.embedding != options.head:
        raise ArgumentError(
            "embedding",
            f"is {options.embedding} and head={options.head}, but the head of {source.path} is its embedding, one matrix: "
            "give both options the same value",
        )
    if config.tied_embeddings and options.embedding == "int4":
        raise ArgumentError(
            "embedding",
            f"is int4, but the head of {source.path} is its embedding, and no four-bit form is fast for both; choose int8 or keep",
        )
    if options.embedding != "keep" and config.hidden_size % (32 // WEIGHTS[options.embedding]):
        raise ArgumentError(
            "embedding",
            f"is {options.embedding}, which needs a width that is a multiple of {32 // WEIGHTS[options.embedding]}; that of "
            f"{source.path} is {config.hidden_size}; choose keep",
        )
    if options.calibration is not None and manifest.precision.compute == "bfloat16":
        raise UserError(
            f"{source.path}: calibration runs the graph, which needs float32 or float16; export it with precision=fp32 or fp16, "
            "or use no calibration text"
        )
    if options.state is not None and manifest.precision.state != "float32":
        raise UserError(f"{source.path}: its state is already {manifest.precision.state}")


def _calibration(source: Bundle, path: Path) -> dict[str, Any]:
    """The calibration text, and what the manifest says of it."""
    from retnet_export.quantize.calibration import calibration_tokens
    from retnet_export.runtime.model import load

    tokens = calibration_tokens(load(source.path, check_hashes=False), path)
    return {"file": path.name, "sha256": sha256_of(path), "sequences": tokens.shape[0], "length": tokens.shape[1], "tokens": tokens}
