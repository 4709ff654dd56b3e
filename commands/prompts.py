"""The prompts of `retnet-export generate`: from an option, from stdin, or many from a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_export.runtime.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.batching import Prompt


def ids_from(text: str) -> list[int]:
    """Token ids from a command line: integers separated by spaces or commas, or a JSON list."""
    try:
        return [int(part) for part in text.strip("[] \n").replace(",", " ").split()]
    except ValueError as error:
        raise ArgumentError("prompt_ids", f"is {text[:40]!r}, expected token ids, for example '1 15043 29892'") from error


@dataclass(frozen=True)
class _Line:
    """The options that an object in a .jsonl file may have in addition to 'prompt'."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    stop_tokens: tuple[int, ...] | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts line by line, without blank ones. Only a line feed ends a line."""
    from retnet_export.runtime.bundle.files import read_text

    text = text_of_stdin() if str(path) == "-" else read_text(path)
    prompts = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            where = f"{path}: line {number}"
            prompts.append(_prompt_from_json(line, where) if path.suffix == ".jsonl" else _prompt(line, {}, where))
    if not prompts:
        raise UserError(f"{path}: it has no prompt, only blank lines")
    return prompts


def _prompt_from_json(line: str, where: str) -> Prompt:
    from retnet_export.runtime.bundle.schema import decode

    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); expected a text, token ids, or an object with 'prompt'") from error
    if not isinstance(value, dict):
        return _prompt(value, {}, where)
    if "prompt" not in value:
        raise UserError(f"{where}: the field 'prompt' is missing")
    own = decode(_Line, {name: entry for name, entry in value.items() if name != "prompt"}, where)
    return _prompt(value["prompt"], {name: entry for name, entry in asdict(own).items() if entry is not None}, f"{where}.prompt")


def _prompt(text: object, changes: Mapping[str, Any], where: str) -> Prompt:
    from retnet_export.runtime.generate.batching import Prompt
    from retnet_export.runtime.generate.generation import Options

    if not isinstance(text, str) and not (isinstance(text, list) and all(type(token) is int for token in text)):
        raise UserError(f"{where}: expected a text or a list of token ids, found {json.dumps(text)[:60]}")
    try:
        Options().changed(changes)  # type: ignore[arg-type]  # checked by its schema
    except UserError as error:
        raise UserError(f"{where.removesuffix('.prompt')}: {error}") from error
    return Prompt(text, **changes)


def text_of_stdin() -> str:
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, or pipe the text in")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 text (byte {error.start}); convert it first") from error
