"""`retnet-export generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands.common import BackendName, BundlePath, Json, LowMemory, Threads, print_json, print_table
from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    from retnet_export.runtime.session import Stats


def generate(
    bundle: BundlePath,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; read from stdin if not given.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k most probable tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most probable tokens that reach this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", show_default=False)] = None,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and sizes on stderr when done.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt; text streams as it is made."""
    from retnet_export.runtime.session import Stats, load

    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("no prompt: give --prompt TEXT, or pipe the text in")
        prompt = sys.stdin.read()
    model = load(bundle, backend, threads=threads, low_memory=low_memory)
    session, measured = model.session(), Stats()
    session.feed(prompt, measured)
    pieces = []
    for piece in session.generate(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop or (), stats=measured
    ):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    if as_json:
        print_json({"prompt": prompt, "text": "".join(pieces), "backend": model.backend.name, "stats": stats_summary(measured)})
        return
    typer.echo()
    if stats:
        print_stats(measured, model.bundle.manifest.state_bytes)


def stats_summary(stats: Stats) -> dict[str, float]:
    """Rates and shares of one generation; times are medians over its tokens."""
    import numpy as np

    graph, sampling, total = (
        float(np.median(part)) if part else 0.0 for part in (stats.graph_ms, stats.sampling_ms, stats.total_ms)
    )
    return {
        "prompt_tokens": stats.prompt_tokens,
        "prompt_tokens_per_second": stats.prompt_tokens / stats.prompt_seconds if stats.prompt_seconds else 0.0,
        "new_tokens": len(stats.total_ms),
        "tokens_per_second": 1e3 / total if total else 0.0,
        "graph_ms": graph,
        "sampling_ms": sampling,
        "rest_ms": max(0.0, total - graph - sampling),
    }


def print_stats(stats: Stats, state_bytes: int) -> None:
    from retnet_export.commands.common import size

    figures = stats_summary(stats)
    print_table(
        "",
        [
            ("prompt", f"{figures['prompt_tokens']:.0f} tokens, {figures['prompt_tokens_per_second']:.0f} tokens/s"),
            ("generated", f"{figures['new_tokens']:.0f} tokens, {figures['tokens_per_second']:.0f} tokens/s"),
            (
                "per token",
                f"graph {figures['graph_ms']:.2f} ms, sampling {figures['sampling_ms']:.3f} ms, rest {figures['rest_ms']:.3f} ms",
            ),
            ("state", size(state_bytes)),
        ],
        err=True,
    )
