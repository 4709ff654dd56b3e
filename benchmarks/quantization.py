"""What quantization costs in quality: every format and method on one text, as a table, JSON and a plot of quality against bytes.

    python benchmarks/quantization.py --text test.txt --calibration train.txt -o docs/figures/quantization

The text is read token by token, as on the device. Questions: how much perplexity does a byte less cost, what do calibrated
methods win, and what does a half-precision state do over a long text, head by head?
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from common import ROOT, describe_machine

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.quantize.evaluation import Evaluation, evaluate_all
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime import load
from retnet_export.runtime.bundle import Bundle


@dataclass(frozen=True)
class Row:
    """One bundle of the table."""

    name: str
    method: str
    weights_bytes: int
    evaluation: Evaluation


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
        comparison = row.evaluation.comparison
        assert comparison is not None
        greedy = sorted(comparison.greedy)
        errors = " ".join(f"{error:.1e}" for error in comparison.state[-1].by_head)
        lines.append(
            f"| {row.name} | {row.method} | {row.weights_bytes / 1e6:.2f} | {100 * (comparison.perplexity_ratio - 1):+.2f} % | "
            f"{row.evaluation.bits_per_byte:.4f} | {comparison.kl_mean:.1e} | {comparison.kl_p999:.1e} | "
            f"{100 * comparison.agreement:.1f} % | {greedy[len(greedy) // 2]} | {errors} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """KL divergence over bytes of the integer formats, logarithmic; one colour a method, blocks of each method joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method, colour in {"rtn": "#c44e52", "gptq": "#4c72b0", "awq": "#dd8452"}.items():
        for bits in ("int8", "int4"):
            chosen = [row for row in rows if row.method == method and row.name.startswith(bits)]
            points = [(row.weights_bytes / 1e6, row.evaluation.comparison.kl_mean) for row in chosen if row.evaluation.comparison]
            if not points:
                continue
            label = method if bits == "int4" else None
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=6, linewidth=1)
            if (bits, method) in (("int8", "rtn"), ("int4", "gptq")):
                # The two int8 points nearly coincide: one label reads to the left, one to the right.
                for row, point, side in zip(chosen, points, ("right", "left", "center"), strict=False):
                    align = side if bits == "int8" else "center"
                    name = row.name.replace(" g", ", block ") if bits == "int8" else row.name.removeprefix("int4 g")
                    axes.annotate(
                        name, point, xytext=(0, -10), textcoords="offset points", ha=align, va="top", fontsize=8, color="#333333"
                    )
    axes.annotate("int4, by block size", (3.46, 7e-3), fontsize=8, color="#333333")
    axes.set(xscale="log", yscale="log", xlabel="weights file, MB (fp32: 22.6)", ylabel="KL divergence from fp32, nats a token")
    axes.set_xticks([3, 3.5, 4, 5, 6, 7], ["3", "3.5", "4", "5", "6", "7"])
    axes.minorticks_off()
    axes.set(xlim=(3.2, 7), ylim=(1e-4, 5e-2))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="method")
    axes.set_title("Quality against bytes, bundled model (5.6M parameters)", loc="left", fontsize=11)
    figure.savefig(path, dpi=130)


def report(stage: str, share: float) -> None:
    """Progress, for a log."""
    print(f"{stage} {share:.0%}", flush=True)


def main(
    text: Annotated[Path, typer.Option(help="a text that the model was not trained on")],
    calibration: Annotated[Path, typer.Option(help="a text of the same kind, for gptq and awq")],
    output: Annotated[Path, typer.Option("-o", "--output", help="writes OUTPUT.json, OUTPUT.md and OUTPUT.png")],
    tokens: Annotated[int | None, typer.Option(help="read at most so many tokens")] = None,
    threads: Annotated[int, typer.Option(help="threads; one is fastest for a model this small")] = 1,
) -> None:
    """Measure every format and method on the bundled model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = export_bundle(open_checkpoint(ROOT / "examples" / "classics"), folder / "fp32.retnet")
        reference = load(source.path, threads=threads, check_hashes=False)
        made = list(bundles(folder, source, calibration))
        models = [load(bundle.path, threads=threads, check_hashes=False) for _, _, bundle in made]
        results = evaluate_all(models, text, against=reference, tokens=tokens, progress=report)
        rows = [
            Row(label, method, bundle.manifest.weights_bytes, result)
            for (label, method, bundle), result in zip(made, results, strict=True)
        ]
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
    output.with_suffix(".json").write_text(json.dumps(record, indent=1))
    output.with_suffix(".md").write_text(table(rows) + "\n")
    plot(rows, output.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
