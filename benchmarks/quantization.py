"""What quantization costs in quality: every format and method on one text, as a table, JSON and a plot of quality against bytes.

    python benchmarks/quantization.py --text test.txt --calibration train.txt -o docs/lab/figures/quantization
    python benchmarks/quantization.py -o docs/lab/figures/quantization   # draws docs/lab/figures/quantization.json again

The text is read token by token, as on the device. Questions: how much perplexity does a byte less cost, what do calibrated
methods win, and what does a half-precision state do over a long text, head by head?
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from common import ROOT, describe_machine

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.quantize.evaluation import evaluate_all
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime import load
from retnet_export.runtime.bundle.bundle import Bundle

GREY = "#333333"
Row = dict[str, Any]
"""One bundle of the table, as OUTPUT.json has it: name, method, weights_bytes, evaluation."""


def bundles(folder: Path, source: Bundle, calibration: Path) -> Iterator[tuple[str, str, Bundle]]:
    """Every format and method: name, method, bundle."""
    checkpoint = open_checkpoint(ROOT / "examples" / "classics")
    yield "fp16", "cast", export_bundle(checkpoint, folder / "fp16.retnet", ExportOptions(precision="fp16"))
    yield "fp32, fp16 state", "cast", export_bundle(checkpoint, folder / "state.retnet", ExportOptions(state="fp16"))
    for group in (None, 64):
        name = "int8" if group is None else f"int8 g{group}"
        yield name, "rtn", quantize_bundle(source, folder / f"{name}.retnet", QuantizeOptions("int8", group))
    for group in (32, 64, 128):
        for method in ("rtn", "gptq", "awq"):
            options = QuantizeOptions("int4", group, method, calibration=None if method == "rtn" else calibration)
            yield f"int4 g{group}", method, quantize_bundle(source, folder / f"int4-{group}-{method}.retnet", options)


def table(rows: list[Row]) -> str:
    lines = [
        "| weights | method | MB | perplexity | bits/byte | KL mean | KL 99.9 % | same best | greedy | state error by head |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        evaluation = row["evaluation"]
        comparison = evaluation["comparison"]
        greedy = sorted(comparison["greedy"])
        errors = " ".join(f"{error:.1e}" for error in comparison["state"][-1]["by_head"])
        lines.append(
            f"| {row['name']} | {row['method']} | {row['weights_bytes'] / 1e6:.2f} | "
            f"{100 * (comparison['perplexity_ratio'] - 1):+.2f} % | "
            f"{evaluation['bits_per_byte']:.4f} | {comparison['kl_mean']:.1e} | {comparison['kl_p999']:.1e} | "
            f"{100 * comparison['agreement']:.1f} % | {greedy[len(greedy) // 2]} | {errors} |"
        )
    return "\n".join(lines)


LOOKS = {"rtn": ("s-", "#c44e52"), "gptq": ("o-", "#1f3b73"), "awq": ("^--", "#e8a33d")}
"""Mark, line and colour of each method, told apart in grey as well."""


def plot(rows: list[Row], path: Path) -> None:
    """KL divergence over bytes of the weights: all formats on logarithmic axes, and INT4 closer by."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (wide, close) = pyplot.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained", width_ratios=(3, 2))
    for method, (look, colour) in LOOKS.items():
        for bits in ("int8", "int4"):
            points = [_point(row) for row in rows if row["method"] == method and row["name"].startswith(bits)]
            for axes in (wide, close) if points else ():
                label = method if bits == "int4" else None
                axes.plot(*zip(*points, strict=True), look, color=colour, label=label, markersize=6, linewidth=1)
    for row in rows:
        size, kl = _point(row)
        if (row["name"], row["method"]) == ("int8", "rtn"):
            _note(wide, "a scale an output", (size, kl), align="right")
        elif row["name"] == "int8 g64":
            _note(wide, "blocks of 64", (size, kl), align="left")
        elif row["name"].startswith("int4") and row["method"] == "gptq":
            _note(close, f"blocks of {row['name'].removeprefix('int4 g')}", (size, kl), align="right")
        elif row["name"] == "fp16" and kl == 0:
            wide.plot(size, 1e-4, "D", color=GREY, markersize=6, clip_on=False, zorder=3)
            _note(wide, "fp16: none", (size, 1e-4), align="center", above=True)
    wide.annotate("INT4", (3.72, 7e-3), ha="center", fontsize=9, color=GREY)
    wide.annotate("INT8", (5.86, 4.6e-4), ha="center", fontsize=9, color=GREY)
    for axes in (wide, close):
        axes.set(xscale="log", yscale="log", xlabel="weights file, MB (fp32: 22.6)")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    wide.set(xlim=(3.2, 13), ylim=(1e-4, 4e-2), ylabel="KL divergence from fp32, nats per token")
    wide.set_xticks([4, 5, 6, 8, 10, 12], ["4", "5", "6", "8", "10", "12"])
    close.set(xlim=(3.4, 4.1), ylim=(9e-3, 2.3e-2))
    close.set_xticks([3.4, 3.6, 3.8, 4.0], ["3.4", "3.6", "3.8", "4.0"])
    close.set_yticks([0.01, 0.015, 0.02], ["0.01", "0.015", "0.02"])
    close.set_title("INT4", loc="left", fontsize=11)
    wide.legend(frameon=False, title="method")
    tokens = rows[0]["evaluation"]["tokens"]
    wide.set_title(f"Bundled model (5.6M parameters), {tokens:,} tokens", loc="left", fontsize=11)
    figure.savefig(path, dpi=130)


def _point(row: Row) -> tuple[float, float]:
    return row["weights_bytes"] / 1e6, row["evaluation"]["comparison"]["kl_mean"]


def _note(axes: Any, text: str, point: tuple[float, float], *, align: str, above: bool = False) -> None:
    offset, side = ((0, 9), "bottom") if above else ((0, -9), "top")
    axes.annotate(text, point, offset, textcoords="offset points", ha=align, va=side, fontsize=8, color=GREY)


def measure(text: Path, calibration: Path, tokens: int | None, threads: int) -> list[Row]:
    """Make every bundle and read the text with all of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = export_bundle(open_checkpoint(ROOT / "examples" / "classics"), folder / "fp32.retnet")
        reference = load(source.path, threads=threads, check_hashes=False)
        made = list(bundles(folder, source, calibration))
        models = [load(bundle.path, threads=threads, check_hashes=False) for _, _, bundle in made]
        results = evaluate_all(models, text, against=reference, tokens=tokens, progress=report)
        return [
            {"name": name, "method": method, "weights_bytes": bundle.manifest.weights_bytes, "evaluation": asdict(result)}
            for (name, method, bundle), result in zip(made, results, strict=True)
        ]


def report(stage: str, share: float) -> None:
    """Progress, for a log."""
    print(f"{stage} {share:.0%}", flush=True)


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="writes OUTPUT.json, OUTPUT.md and OUTPUT.png")],
    text: Annotated[Path | None, typer.Option(help="a text that the model was not trained on")] = None,
    calibration: Annotated[Path | None, typer.Option(help="a text of the same kind, for gptq and awq")] = None,
    tokens: Annotated[int | None, typer.Option(help="read at most so many tokens")] = None,
    threads: Annotated[int, typer.Option(help="threads; one is fastest for a model this small")] = 1,
) -> None:
    """Measure every format and method on the bundled model; without --text, draw OUTPUT.json again."""
    document = output.with_suffix(".json")
    if text is not None and calibration is not None:
        record = {"machine": describe_machine(), "rows": measure(text, calibration, tokens, threads)}
        output.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(json.dumps(record, indent=1) + "\n")
    elif text is not None or calibration is not None or not document.exists():
        raise typer.BadParameter(f"give --text and --calibration to measure, or neither to draw {document} again")
    rows = json.loads(document.read_text())["rows"]
    output.with_suffix(".md").write_text(table(rows) + "\n")
    plot(rows, output.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
