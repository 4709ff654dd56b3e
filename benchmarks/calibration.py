"""How many tokens of calibration gptq needs to be better than rounding: INT4 of the bundled model.

    python benchmarks/calibration.py --calibration train.txt --text test.txt

Passages are spread evenly over the calibration text, as `quantize` spreads them; fewer tokens are fewer and shorter passages.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import ROOT, describe_machine
from numpy.typing import NDArray

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.quantize import calibration as calibrating
from retnet_export.quantize.evaluation import evaluate_all
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.model import Model, load

SHAPES = ((1, 128), (1, 256), (1, 512), (2, 512), (4, 512), (8, 512), (16, 512))
"""Passages, and tokens of each."""


def main(
    calibration: Annotated[Path, typer.Option(help="A text of the kind that the model was trained on.")],
    text: Annotated[Path, typer.Option(help="A text that it was not.")],
    tokens: Annotated[int, typer.Option(help="Of the text, to judge by.")] = 8192,
) -> None:
    """Print a row for rounding, and one for each number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        source = export_bundle(open_checkpoint(ROOT / "examples" / "classics"), Path(folder) / "float.retnet")
        model = load(source.path)
        whole = calibrating.calibration_tokens(model, calibration)
        made = {"rtn": quantize_bundle(source, Path(folder) / "rtn.retnet", QuantizeOptions())}
        for passages, length in SHAPES:
            part = whole[np.linspace(0, len(whole) - 1, passages).astype(int), :length]
            setattr(calibrating, "calibration_tokens", partial(_given, part))  # noqa: B010 (mypy refuses the assignment)
            options = QuantizeOptions(method="gptq", calibration=calibration)
            made[f"gptq, {part.size:,} tokens"] = quantize_bundle(source, Path(folder) / f"{part.size}.retnet", options)
        results = evaluate_all([load(bundle.path) for bundle in made.values()], text, against=model, tokens=tokens)
    for name, result in zip(made, results, strict=True):
        pair = result.comparison
        assert pair is not None
        perplexity = f"{100 * (pair.perplexity_ratio - 1):+.2f} %"
        typer.echo(f"| {name} | {perplexity} | {pair.kl_mean:.2e} | {100 * pair.agreement:.1f} % |")
    typer.echo(describe_machine())


def _given(part: NDArray[np.int64], model: Model, path: Path) -> NDArray[np.int64]:
    """These tokens, whatever the text."""
    return part


if __name__ == "__main__":
    typer.run(main)
