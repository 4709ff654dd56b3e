"""What quantization costs in quality: every format and method on one text, as a table, JSON and a figure.

    python benchmarks/quantization.py --text test.txt --calibration train.txt -o docs/lab/figures/quantization
    python benchmarks/quantization.py -o docs/lab/figures/quantization   # draws docs/lab/figures/quantization.json again

The text is read token by token, as on the device. Questions: what does each format cost in quality, what does calibration gain,
and what does a half-precision state do over a long text, head by head?
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from common import ROOT, describe_machine

from retnet_export.compare import drawing
from retnet_export.compare.drawing import BLUE, ORANGE, VERMILION, Look
from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.quantize.evaluation import evaluate_all
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime import load
from retnet_export.runtime.bundle.bundle import Bundle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        for method in ("rtn", "gptq"):
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


LOOKS = {"rtn": Look(VERMILION, "", "s"), "gptq": Look(BLUE, "", "o"), "awq": Look(ORANGE, "", "^")}
"""Of each method; awq was measured and then removed."""
OFFSETS = {"rtn": 0.0, "gptq": -0.2, "awq": 0.2}
"""Of a method's mark from the middle of its row, so that equal results are both seen."""


def plot(rows: list[Row], path: Path) -> None:
    """KL divergence of every quantized bundle: a line of the figure for each format, a mark for each method."""
    shown = [row for row in rows if row["method"] in LOOKS]
    names = {row["name"]: f"{_format(row['name'])}\n{row['weights_bytes'] / 1e6:.2f} MB" for row in reversed(shown)}
    places = {name: place for place, name in enumerate(names)}

    def draw(axes: Axes) -> None:
        for method, look in LOOKS.items():
            mine = [row for row in shown if row["method"] == method]
            if not mine:
                continue
            kl = [row["evaluation"]["comparison"]["kl_mean"] for row in mine]
            look.draw(axes, kl, [places[row["name"]] + OFFSETS[method] for row in mine], method)
        axes.set_yticks(list(places.values()), list(names.values()))
        axes.set_ylim(-0.5, len(places) - 0.5)
        axes.set_xlim(1e-4, 3e-2)
        axes.set_xscale("log")
        drawing.powers_of_ten(axes.xaxis)
        axes.set_xlabel("KL from fp32, nats per token (logarithmic)")

    path.write_bytes(drawing.png(drawing.new_figure(draw, title="What quantized weights cost", columns=3)))


def _format(name: str) -> str:
    """Such as "INT4, blocks of 64" for "int4 g64"."""
    form, _, group = name.partition(" g")
    return f"{form.upper()}, blocks of {group}" if group else form.upper()


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
    output: Annotated[Path, typer.Option("-o", "--output", help="writes OUTPUT.json and OUTPUT.png")],
    text: Annotated[Path | None, typer.Option(help="a text that the model was not trained on")] = None,
    calibration: Annotated[Path | None, typer.Option(help="a text of the same kind, for gptq")] = None,
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
    plot(rows, output.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
