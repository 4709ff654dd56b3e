"""`retnet-export plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retnet_export.commands.options import Json, bundle_path
from retnet_export.commands.output import print_columns, print_json, print_table, size
from retnet_export.runtime.element_types import ELEMENT_TYPES
from retnet_export.runtime.errors import ArgumentError

if TYPE_CHECKING:
    from retnet_export.plan.devices import DeviceSpec
    from retnet_export.plan.outlook import Outlook
    from retnet_export.plan.sizes import Sizes
    from retnet_export.runtime.bundle.anatomy import Anatomy

HEAD = ("device", "fits", "peak", "tokens/s", "range", "Transformer at 8k", "largest batch")
FORMATS = {each.short: each.name for each in ELEMENT_TYPES.values()}
EXAMPLE = "for example --layers 24 --width 2048"


def plan(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="A bundle. Without one, give the model's sizes.", parser=bundle_path)
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A device, for example orin-nano-8gb; may be repeated.")
    ] = None,
    devices: Annotated[bool, typer.Option("--devices", help="All known devices.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that step together.")] = 1,
    layers: Annotated[int | None, typer.Option(min=1, help="Without a bundle: number of layers.")] = None,
    width: Annotated[int | None, typer.Option(min=2, help="Without a bundle: width of the residual.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Number of heads; default: width / 256.")] = None,
    ffn: Annotated[int | None, typer.Option(min=1, help="Inner width of the FFN; default: twice the width.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Size of the vocabulary; default: 32000.")] = None,
    weights: Annotated[
        Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4"] | None,
        typer.Option(help="Number format of the weights; default: fp16."),
    ] = None,
    state: Annotated[Literal["fp32", "fp16"] | None, typer.Option(help="Number format of the stored state; default: fp32.")] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(metavar="REPORT", help="A report of scripts/jetson-check.sh from that --device; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict what a model needs on a device, and how fast it will be there, without running it."""
    from retnet_export.export.pipeline import DEFAULT_CHUNK
    from retnet_export.plan.calibration import read_report
    from retnet_export.plan.devices import DEVICES, find_device
    from retnet_export.plan.outlook import outlook

    given = {"layers": layers, "width": width, "heads": heads, "ffn": ffn, "vocabulary": vocabulary, "weights": weights}
    others = [option for option, value in {**given, "state": state}.items() if value is not None]
    if bundle is not None and others:
        raise ArgumentError(others[0], "cannot be combined with a bundle, which has its own sizes; give one of the two")
    step = None
    if bundle is not None:
        name, (sizes, chunk, formats, step) = str(bundle), _of_bundle(bundle)
    else:
        for option, asked, other in (("layers", layers, width), ("width", width, layers)):
            if asked is None and other is not None:
                raise ArgumentError(option, f"is missing: without a bundle the planner needs both, {EXAMPLE}")
        if layers is None or width is None:
            raise ArgumentError("bundle", f"is missing: give one, or a model's sizes, {EXAMPLE}")
        name, chunk = f"{layers} layers of width {width}, {weights or 'fp16'}", DEFAULT_CHUNK
        formats = (FORMATS[weights or "fp16"],)
        sizes = _of_sizes(layers, width, heads or max(1, width // 256), ffn, vocabulary, formats[0], FORMATS[state or "fp32"])
    chosen = list(DEVICES.values()) if devices else [find_device(key) for key in device or ()]
    if not chosen:
        raise ArgumentError("device", f"is missing: give one or more, or --devices for all of {', '.join(DEVICES)}")
    if calibrate and len(chosen) != 1:
        raise ArgumentError("calibrate", "needs exactly one --device: the one that the reports are from")
    measured = [row for report in calibrate or () for row in read_report(report)]
    outlooks = [(spec, outlook(sizes, spec, batch, chunk, formats, step, measured)) for spec in chosen]
    if as_json:
        print_json({"model": name, "batch": batch, "parameters": sizes.parameters, "devices": [_record(*row) for row in outlooks]})
        return
    if len(outlooks) == 1:
        _print_one(name, sizes, batch, *outlooks[0])
    else:
        _print_all(name, sizes, batch, outlooks)


def _of_bundle(path: Path) -> tuple[Sizes, int, tuple[str, ...], Anatomy | None]:
    """Of a bundle: its sizes, the tokens of a chunk, the formats of weights and products, and the anatomy of a step.

    The anatomy is that of an engine; of several, one that was built on its own GPU is preferred.
    """
    from retnet_export.plan.sizes import sizes_of_bundle
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.engines import read_engines, sources_of

    opened = open_bundle(path, check_hashes=False)
    manifest = opened.manifest
    records = [record for record in read_engines(opened) if dict(record.sources) == sources_of(opened)]
    counted = [step for record in sorted(records, key=lambda each: each.device is None) if (step := record.anatomy_of("decode"))]
    formats = (manifest.precision.weights, manifest.precision.compute)
    return sizes_of_bundle(manifest), manifest.graphs["prefill"].chunk_size, formats, counted[0] if counted else None


def _of_sizes(layers: int, width: int, heads: int, ffn: int | None, vocabulary: int | None, weights: str, state: str) -> Sizes:
    """Of a model that need not exist."""
    from retnet_export.plan.sizes import sizes_of_model
    from retnet_export.runtime.bundle.config import ModelConfig

    if width % (2 * heads):
        raise ArgumentError("width", f"is {width}, with {heads} heads: the key size of a head must be even; give --heads")
    config = ModelConfig(
        vocab_size=vocabulary or 32000,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        head_key_dim=width // heads,
        head_value_dim=2 * width // heads,
        ffn_size=ffn or 2 * width,
        num_kv_heads=heads,
    )
    return sizes_of_model(config, weights, state=state, group_size=64 if weights in ("int4", "float4") else None)


def _record(spec: DeviceSpec, result: Outlook) -> dict[str, object]:
    return {
        "device": spec.key,
        "fits": result.fits,
        "why_not": result.why_not,
        "memory_at_rest_bytes": round(result.at_rest),
        "memory_at_peak_bytes": round(result.at_peak),
        "memory_usable_bytes": round(spec.usable_bytes),
        "largest_batch": result.largest_batch,
        "bytes_per_step": round(result.prediction.bytes_per_step),
        "kernels_per_step": result.prediction.kernels,
        "tokens_per_second": round(result.prediction.tokens_per_second, 1) if result.fits else None,
        "range": [round(result.prediction.low, 1), round(result.prediction.high, 1)] if result.fits else None,
        "transformer_tokens_per_second": {
            str(context): None if rate is None else round(rate, 1) for context, rate in result.prediction.transformer.items()
        },
    }


def _print_one(name: str, sizes: Sizes, batch: int, spec: DeviceSpec, result: Outlook) -> None:
    prediction = result.prediction
    rates = ", ".join(
        f"{context:,}: {'does not fit' if rate is None else f'{rate:.0f}'}" for context, rate in prediction.transformer.items()
    )
    rows = [
        ("model", f"{sizes.parameters / 1e6:,.0f} million parameters, weights {size(sizes.weights_bytes)}"),
        ("state", f"{size(sizes.state_bytes)} per sequence, at any length"),
        (
            "a step reads and writes",
            size(prediction.bytes_per_step)
            + (", by its sizes; `compile` counts exactly" if prediction.kernels is None else f" in {prediction.kernels} kernels"),
        ),
        ("memory", f"{size(result.at_rest)} at rest, {size(result.at_peak)} at peak, of {size(spec.usable_bytes)} usable"),
        ("fits", "yes" if result.fits else f"NO: {result.why_not}"),
        ("largest batch", f"{result.largest_batch:,}"),
        (
            "tokens/s",
            f"{prediction.tokens_per_second:.0f} at batch {batch}, range {prediction.low:.0f} to {prediction.high:.0f}"
            if result.fits
            else "none: it does not fit",
        ),
        ("a Transformer's speed, by context", rates),
        ("from", result.basis),
    ]
    print_table(f"{name} on {spec.name}", rows)


def _print_all(name: str, sizes: Sizes, batch: int, outlooks: list[tuple[DeviceSpec, Outlook]]) -> None:
    lines = []
    for spec, result in outlooks:
        prediction = result.prediction
        rate = prediction.transformer[8192]
        speed = (
            (f"{prediction.tokens_per_second:.0f}", f"{prediction.low:.0f}–{prediction.high:.0f}") if result.fits else ("—", "—")
        )
        lines.append(
            (
                spec.key,
                "yes" if result.fits else "no",
                size(result.at_peak),
                *speed,
                "does not fit" if rate is None else f"{rate:.0f}",
                f"{result.largest_batch:,}",
            )
        )
    print_columns(f"{name}: {sizes.parameters / 1e6:,.0f} million parameters, batch {batch}", HEAD, lines)
