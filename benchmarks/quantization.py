"""Quality against bytes: the bundled model in every format and method, measured on a text it was not trained on.

    python benchmarks/quantization.py --calibration train.txt --text test.txt [--tokens 20000] [-o docs/quantization]

Each variant is compared with the float32 bundle, token by token, as `retnet-export evaluate --against` does. Writes
quality.json and quality.png. Two variants run at a time, a thread each: this is a measurement of quality and not of time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from common import ROOT, describe_machine

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.quantize.evaluation import evaluate
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle import Bundle, open_bundle
from retnet_export.runtime.model import load

METHODS = ("rtn", "gptq", "awq")
MARKERS = {"fp16": "*", "state": "P", "int8": "s", "rtn": "o", "gptq": "^", "awq": "v"}


def variants() -> dict[str, dict[str, Any]]:
    """Names and what they ask of `export` (precision, state) or of `quantize` (the rest)."""
    made: dict[str, dict[str, Any]] = {
        "fp16": {"precision": "fp16"},
        "fp32, state fp16": {"state": "fp16"},
        "int8": {"weights": "int8"},
        "int8, group 64": {"weights": "int8", "group_size": 64},
    }
    for method in METHODS:
        for group in (32, 64, 128):
            made[f"int4 {method}, group {group}"] = {"weights": "int4", "group_size": group, "method": method}
    made["int4 gptq, group 64, tables int4"] = {
        "weights": "int4",
        "group_size": 64,
        "method": "gptq",
        "embedding": "int4",
        "head": "int4",
    }
    return made


def make(name: str, options: dict[str, Any], folder: Path, calibration: Path) -> Bundle:
    """One variant of the bundled model."""
    target = folder / f"{name.replace(', ', '-').replace(' ', '-')}.retnet"
    if "weights" not in options:
        return export_bundle(open_checkpoint(ROOT / "examples" / "classics"), target, ExportOptions(**options))
    needs_text = options.get("method", "rtn") != "rtn"
    return quantize_bundle(
        open_bundle(folder / "fp32.retnet"), target, QuantizeOptions(**options, calibration=calibration if needs_text else None)
    )


def measure(name: str, options: dict[str, Any], folder: Path, calibration: Path, text: Path, tokens: int | None) -> dict[str, Any]:
    """Make a variant and hold it against float32."""
    bundle = make(name, options, folder, calibration)
    reference = load(folder / "fp32.retnet", "onnxruntime", threads=1, check_hashes=False)
    model = load(bundle.path, "onnxruntime", threads=1, check_hashes=False)
    result = asdict(evaluate(model, text, against=reference, tokens=tokens))
    result["text"] = text.name
    return {"name": name, "options": options, "weights_bytes": bundle.manifest.weights_bytes, **result}


def plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Loss of perplexity over bytes, both axes logarithmic; markers differ, so that it reads in black and white."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for kind, marker in MARKERS.items():
        chosen = [row for row in rows if kind in row["name"] and not (kind == "fp16" and "state" in row["name"])]
        if not chosen:
            continue
        sizes = [row["weights_bytes"] / 1e6 for row in chosen]
        losses = [max(100 * (row["comparison"]["perplexity_ratio"] - 1), 1e-3) for row in chosen]
        axes.plot(sizes, losses, marker, markersize=8, label={"state": "fp32, state fp16"}.get(kind, kind), alpha=0.85)
        for row, size, loss in zip(chosen, sizes, losses, strict=True):
            label = row["name"].split(", ", 1)[1].replace("group ", "g") if "group" in row["name"] else ""
            axes.annotate(label, (size, loss), textcoords="offset points", xytext=(7, 3), fontsize=7)
    for limit, words in ((0.2, "target for int8: 0.2 %"), (3.0, "target for int4, group 64: 3 %")):
        axes.axhline(limit, linestyle=":", color="grey", linewidth=1)
        axes.annotate(words, (1.0, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color="dimgrey")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [3, 4, 6, 8, 12, 24]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("perplexity above float32, %")
    axes.set_title(f"The bundled model on {rows[0]['text']}, {rows[0]['tokens']:,} tokens")
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    figure.savefig(target, dpi=160)


def main(
    calibration: Annotated[Path, typer.Option(help="text for gptq and awq")],
    text: Annotated[Path, typer.Option(help="text to measure on")],
    tokens: Annotated[int | None, typer.Option(help="tokens of it; all if not given")] = None,
    output: Annotated[Path, typer.Option("-o", help="folder for quality.json and quality.png")] = ROOT / "docs" / "quantization",
) -> None:
    """Measure every variant, print a table, write the figure."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(2) as pool:
        folder = Path(name)
        export_bundle(open_checkpoint(ROOT / "examples" / "classics"), folder / "fp32.retnet")
        jobs = [pool.submit(measure, name, options, folder, calibration, text, tokens) for name, options in variants().items()]
        rows = []
        print("| variant | weights | perplexity | bits per byte | KL mean | KL 99.9 % | same best token |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for job in jobs:
            row = job.result()
            rows.append(row)
            c = row["comparison"]
            print(
                f"| {row['name']} | {row['weights_bytes'] / 1e6:.1f} MB | {100 * (c['perplexity_ratio'] - 1):+.2f} % "
                f"| {row['bits_per_byte']:.4f} | {c['kl_mean']:.1e} | {c['kl_p999']:.1e} | {100 * c['agreement']:.2f} % |",
                flush=True,
            )
    (output / "quality.json").write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    plot(rows, output / "quality.png")


if __name__ == "__main__":
    typer.run(main)
