"""The options of `generate` and `chat` that say how tokens are chosen, and the figures both print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands.common import print_table, size
from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.stats import Stats

MaxNewTokens = Annotated[int, typer.Option(min=0, help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Draw from the k most probable tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the most probable tokens that reach this probability.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens at least so probable, relative to the most probable one; 0: from all.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Divide the logits of tokens in the prompt or the text; 1: none.")]
PresencePenalty = Annotated[float, typer.Option(help="Subtract from the logits of tokens already generated.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Subtract for each time a token was generated.")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="ID=BIAS", help="Add to a token's logit, by id; -inf bans it; may be repeated.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", show_default=False)]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", show_default=False)]
StopToken = Annotated[
    list[int] | None, typer.Option(metavar="ID", help="End before this token; may be repeated.", show_default=False)
]
Speculate = Annotated[
    str,
    typer.Option(
        metavar="auto|off|N",
        help="Guess tokens ahead from what the text repeats, and check them in one pass: as many as pay, none, or up to N. "
        "Changes the speed, not the text.",
    ),
]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print speed and sizes on stderr when done.")]


def biases_from(entries: Sequence[str] | None) -> dict[int, float]:
    """ID=BIAS as a mapping.

    Raises:
        UserError: an entry is not of that form.
    """
    biases = {}
    for entry in entries or ():
        token, _, bias = entry.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as error:
            raise UserError(f"--logit-bias {entry!r}: expected ID=BIAS, as in 13=-5 or 13=-inf") from error
    return biases


def speculation_from(text: str) -> int | None:
    """`--speculate` as `Options` has it.

    Raises:
        UserError: it is neither a word nor a number that may stand there.
    """
    if text == "auto":
        return None
    if text == "off":
        return 0
    if not text.isascii() or not text.isdigit():
        raise UserError(f"--speculate is {text!r}, expected auto, off, or the most tokens to guess at once, as in --speculate 8")
    return int(text)


def print_stats(stats: Stats, state_bytes: int) -> None:
    """A table on stderr."""
    figures = stats.summary(state_bytes)

    def shown(name: str, form: str, unit: str) -> str:
        value = figures[name]
        return "–" if value is None else f"{value:{form}} {unit}"

    peak = figures["peak_memory_bytes"]
    print_table(
        "",
        [
            ("first token", shown("time_to_first_token_ms", ".1f", "ms after the prompt was given")),
            ("prompt", f"{stats.prompt_tokens} tokens, {shown('prompt_tokens_per_second', '.0f', 'tokens/s')}"),
            ("generated", f"{stats.new_tokens} tokens, {shown('tokens_per_second', '.0f', 'tokens/s')}"),
            (
                "per step",
                f"p50 {shown('token_ms_p50', '.2f', 'ms')}, p95 {shown('token_ms_p95', '.2f', 'ms')}, "
                f"p99 {shown('token_ms_p99', '.2f', 'ms')}",
            ),
            (
                "of which",
                f"graph {shown('graph_ms', '.2f', 'ms')}, sampling {shown('sampling_ms', '.3f', 'ms')}, "
                f"rest {shown('rest_ms', '.3f', 'ms')}",
            ),
            *_guessed(stats),
            ("state", f"{size(state_bytes)} a sequence"),
            ("peak memory", "–" if peak is None else size(peak)),
        ],
        err=True,
    )


def _guessed(stats: Stats) -> list[tuple[str, str]]:
    if not stats.drafted:
        return []
    share = 100 * stats.accepted / stats.drafted
    passes = len(stats.total_ms)
    return [("guessed ahead", f"{stats.drafted} tokens, {stats.accepted} of them chosen ({share:.0f} %), in {passes} passes")]
