"""`retnet-export evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands.options import BackendName, BundlePath, Json, Threads, bundle_path
from retnet_export.commands.output import print_json, print_table, progress

if TYPE_CHECKING:
    from retnet_export.quantize.evaluation import Evaluation


def evaluate(
    bundle: BundlePath,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text that the model was not trained on.")],
    against: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Compare with this bundle, token by token.", parser=bundle_path)
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Read at most this many tokens; default: all.")] = None,
    steps: Annotated[
        bool | None,
        typer.Option(
            "--steps/--chunks",
            help="Read token by token, as in decoding, or in chunks. Default: in chunks, unless the state is float16.",
        ),
    ] = None,
    backend: BackendName = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how well a bundle predicts a text (perplexity), and with --against how much it differs from another bundle."""
    from retnet_export.quantize.evaluation import evaluate as run
    from retnet_export.runtime.model import load

    model = load(bundle, backend, threads=threads)
    other = None if against is None else load(against, backend, threads=threads)
    with progress("evaluate", quiet=as_json) as update:
        result = run(model, text, against=other, tokens=tokens, steps=steps, progress=update)
    if as_json:
        print_json({"bundle": str(bundle), **asdict(result)})
    else:
        print_evaluation(bundle, result)


def print_evaluation(bundle: Path, evaluation: Evaluation) -> None:
    from retnet_export.quantize.evaluation import GREEDY_TOKENS

    rows = [("perplexity", f"{evaluation.perplexity:.3f} per token"), ("bits per byte", f"{evaluation.bits_per_byte:.4f}")]
    if (c := evaluation.comparison) is not None:
        greedy = sorted(c.greedy)
        last = c.state[-1]
        rows += [
            ("against", f"{c.against}: perplexity {c.perplexity:.3f}; this one's is {100 * (c.perplexity_ratio - 1):+.2f} %"),
            ("divergence", f"KL {c.kl_mean:.2e} nats per token, 99.9 % of tokens below {c.kl_p999:.2e}"),
            ("same best token", f"{100 * c.agreement:.2f} % of positions"),
            (
                "greedy",
                f"continuations agree for {greedy[len(greedy) // 2]} of {GREEDY_TOKENS} tokens "
                f"(median; {greedy[0]} to {greedy[-1]})",
            ),
            (
                f"state after {last.tokens:,}",
                "relative error by head, fastest decay first: " + ", ".join(f"{error:.1e}" for error in last.by_head),
            ),
        ]
    how = "token by token" if evaluation.by_steps else "in chunks"
    print_table(f"{bundle}: {evaluation.tokens:,} tokens of {evaluation.text}, read {how}", rows)
