"""The options of every command that generates: how tokens are chosen and when to stop, as one group.

`@with_sampling()` on a command gives it these flags instead of its parameter `options`, an `Options`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retnet_export.commands.output import print_table, size
from retnet_export.runtime.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.generation import Options
    from retnet_export.runtime.generate.stats import Stats
    from retnet_export.runtime.model import Model

Command = Callable[..., None]


def _flag(kind: Any, text: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel="Sampling", **more)]


def _many(kind: Any, text: str, *names: str, metavar: str | None = None) -> Any:
    return _flag(kind | None, f"{text}; may be repeated.", *names, metavar=metavar)


FLAGS: dict[str, tuple[Any, Any]] = {
    "max_new_tokens": (_flag(int, "Most tokens to generate.", min=0), 128),
    "temperature": (_flag(float, "0 is greedy."), 0.8),
    "top_k": (_flag(int, "Draw from the K most probable tokens; 0: from all."), 0),
    "top_p": (_flag(float, "Draw from the most probable tokens that together have this probability."), 0.95),
    "min_p": (_flag(float, "Draw from tokens with at least this probability relative to the most probable one; 0: from all."), 0.0),
    "repetition_penalty": (_flag(float, "Divide the logits of tokens in the prompt or the text by this; 1: off."), 1.0),
    "presence_penalty": (_flag(float, "Subtract this from the logits of tokens already generated."), 0.0),
    "frequency_penalty": (_flag(float, "Subtract this from a token's logit for each time it was generated."), 0.0),
    "logit_bias": (_many(list[str], "Add to a token's logit, by id; -inf bans it", metavar="ID=BIAS"), None),
    "seed": (_flag(int | None, "The same seed gives the same text; default: a random seed."), None),
    "speculate": (
        _flag(
            str,
            "Guess tokens from repetitions in the text and check them in one pass: auto, off, or up to N. "
            "Changes the speed, not the text.",
            metavar="auto|off|N",
        ),
        "auto",
    ),
    "stop": (_many(list[str], r"End before this text, in which \n is a new line", metavar="TEXT"), None),
    "min_new_tokens": (_flag(int, "Fewest tokens to generate.", min=0), 0),
    "ignore_ends": (_flag(bool, "Continue when the model would end the text.", "--ignore-ends"), False),
    "stop_tokens": (_many(list[int], "End before this token", "--stop-token", metavar="ID"), None),
}
"""By field of `Options`: the flag's type and description, and its default."""
ShowStats = Annotated[bool, typer.Option("--stats", help="Print speed and sizes on stderr when done.")]


def with_sampling(**defaults: Any) -> Callable[[Command], Command]:
    """Give a command the flags of sampling in place of its parameter `options`; `defaults` replace those of `FLAGS`."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(command, localns={"Options": object}, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name != "options":
                parameters.append(parameter.replace(annotation=hints[parameter.name]))
                continue
            for name, (kind, default) in FLAGS.items():
                default = defaults.get(name, default)
                parameters.append(inspect.Parameter(name, parameter.kind, default=default, annotation=kind))

        @functools.wraps(command)
        def run(*arguments: Any, **keywords: Any) -> None:
            from retnet_export.runtime.generate.generation import Options

            given = {name: keywords.pop(name, defaults.get(name, default)) for name, (_, default) in FLAGS.items()}
            command(*arguments, options=Options(**_changes(given)), **keywords)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Options` from the flags."""
    meant: dict[str, Callable[[Any], Any]] = {
        "logit_bias": biases_from,
        "speculate": speculation_from,
        "seed": lambda seed: drawn_seed() if seed is None else seed,
        "stop": lambda stops: tuple(unescaped(stop) for stop in stops or ()),
        "stop_tokens": lambda tokens: tuple(int(token) for token in tokens or ()),
    }
    return {name: meant[name](value) if name in meant else value for name, value in given.items()}


def field_called(name: str) -> str:
    """The field of `Options` for a flag's or a field's name; raises UserError if there is none."""
    field = next((field for field in FLAGS if name.replace("-", "_") in (field, field.removesuffix("s"))), None)
    if field is None:
        raise UserError(f"unknown option {name!r}; expected one of {', '.join(FLAGS)}")
    return field


def changed(options: Options, field: str, value: str) -> Options:
    """The options with one of them changed to a value given as text; raises UserError for a value that does not fit."""
    try:
        new: Any
        if isinstance(getattr(options, field), bool):
            new = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[value.lower()]
        elif field == "speculate":
            new = speculation_from(value)
        elif field in ("logit_bias", "stop", "stop_tokens"):
            new = _changes({field: [] if value in ("", "none") else [value]})[field]
        elif field == "seed":
            new = drawn_seed() if value in ("", "none") else int(value)
        else:
            new = type(getattr(options, field))(value)
        return options.changed({field: new})  # type: ignore[misc]  # one of its keys
    except ArgumentError as error:
        raise UserError(str(error)) from error
    except (ValueError, KeyError) as error:
        expected = "on or off" if isinstance(error, KeyError) else "a number"
        raise UserError(f"{field} is {value!r}, expected {expected}") from error


def shown(options: Options) -> dict[str, str]:
    """The options as texts, by field."""
    return {name: json.dumps(value, ensure_ascii=False) for name in FLAGS for value in [getattr(options, name)]}


def drawn_seed() -> int:
    """A random seed, short enough to type."""
    import secrets

    return secrets.randbelow(1_000_000)


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""An option's text with its escapes \n, \t, \r and \\ replaced; any other \ stays."""
    return re.sub(r"\\([ntr\\])", lambda found: ESCAPES[found[1]], text)


def biases_from(entries: Sequence[str] | None) -> dict[int, float]:
    """ID=BIAS as a mapping."""
    biases = {}
    for entry in entries or ():
        token, _, bias = entry.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as error:
            raise ArgumentError("logit_bias", f"is {entry!r}, expected ID=BIAS, for example 13=-5 or 13=-inf") from error
    return biases


def speculation_from(text: str) -> int | None:
    """`--speculate` as `Options` has it."""
    if text in ("auto", "off"):
        return None if text == "auto" else 0
    if not text.isascii() or not text.isdigit():
        raise ArgumentError("speculate", f"is {text!r}, expected auto, off, or the most tokens to guess at once, for example 8")
    return int(text)


def print_stats(stats: Stats, model: Model, seed: int | None) -> None:
    """A table on stderr."""
    state_bytes = model.bundle.manifest.state_bytes
    figures = stats.summary(state_bytes)

    def shown(name: str, form: str, unit: str) -> str:
        value = figures[name]
        return "–" if value is None else f"{value:{form}} {unit}"

    peak = figures["peak_memory_bytes"]
    print_table(
        "",
        [
            ("first token", shown("time_to_first_token_ms", ".1f", "ms after the prompt")),
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
            ("seed", "none" if seed is None else str(seed)),
            ("backend", f"{model.backend.name}, {model.backend.variant} graphs"),
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
