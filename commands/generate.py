"""`retnet-export generate`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands import sampling
from retnet_export.commands.common import BackendName, BundlePath, Json, LowMemory, Threads, print_json, print_table, progress
from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.batching import Completion, Prompt
    from retnet_export.runtime.generate.generation import Finish, Options, Piece
    from retnet_export.runtime.generate.state import Snapshot
    from retnet_export.runtime.generate.stats import Stats
    from retnet_export.runtime.model import Model

NO_RAILS = "not measured: this machine shows no power rails that we know (a Jetson does)"


def generate(
    bundle: BundlePath,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to continue; read from stdin if there is neither this nor a saved state.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Continue many prompts, a line each (.jsonl: a string, or an object with 'prompt' and options of its own); "
            "prints a JSON line for each.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --prompts: so many at a time.")] = 8,
    load_state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on from a saved state; a prompt is then read after it.", show_default=False),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save the state when done: all that was read and generated. With --max-new-tokens 0, the prompt alone.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: sampling.MaxNewTokens = 128,
    temperature: sampling.Temperature = 0.8,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 0.95,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    presence_penalty: sampling.PresencePenalty = 0.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    logit_bias: sampling.LogitBias = None,
    seed: sampling.Seed = None,
    speculate: sampling.Speculate = "auto",
    stop: sampling.Stop = None,
    stop_token: sampling.StopToken = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0, help="With --json or --prompts: log-probabilities of the tokens and of the n best.", show_default=False
        ),
    ] = None,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
    stats: sampling.ShowStats = False,
    power: Annotated[bool, typer.Option("--power", help="On a Jetson: read its power rails meanwhile; tokens per joule.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming the text as it is made; or many prompts at once."""
    from retnet_export.runtime.device.jetson import PowerMeter
    from retnet_export.runtime.generate.generation import Options
    from retnet_export.runtime.generate.state import Snapshot
    from retnet_export.runtime.generate.stats import Stats
    from retnet_export.runtime.model import load

    if prompts is not None and (prompt is not None or save_state is not None):
        raise typer.BadParameter("--prompts goes with neither --prompt nor --save-state", param_hint="--prompts")
    if save_state is not None and not save_state.absolute().parent.is_dir():
        raise UserError(f"{save_state}: there is no folder {save_state.parent} to save the state in")
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=sampling.biases_from(logit_bias),
        speculate=sampling.speculation_from(speculate),
        seed=seed,
        stop=tuple(stop or ()),
        stop_tokens=tuple(stop_token or ()),
        logprobs=logprobs,
    )
    before = None if load_state is None else Snapshot.load(load_state)
    if prompts is None and prompt is None and before is None:
        prompt = _prompt_from_stdin()
    model, measured = load(bundle, backend, threads=threads, low_memory=low_memory), Stats()
    meter = PowerMeter() if power else None
    with meter or contextlib.nullcontext():
        if prompts is not None:
            _continue_many(model, _read_prompts(prompts, options), options, batch, before, measured, as_json)
        else:
            _continue_one(model, prompt, options, before, save_state, measured, as_json)
    if stats and not as_json:
        sampling.print_stats(measured, model.bundle.manifest.state_bytes)
    if meter is not None:
        energy = f"{meter.joules:.1f} J, {measured.new_tokens / meter.joules:.2f} tokens per joule" if meter.joules else NO_RAILS
        print_table("", [("energy", energy)], err=True)


def _continue_one(
    model: Model,
    prompt: str | None,
    options: Options,
    before: Snapshot | None,
    save_state: Path | None,
    stats: Stats,
    as_json: bool,
) -> None:
    session = model.session()
    if before is not None:
        session.restore(before)
    if prompt is not None:
        with progress("generate", quiet=as_json) as update:
            session.feed(prompt, stats, lambda done, total: update("reading the prompt", done / total))
    generation, pieces = session.pieces(options, stats=stats), []
    for piece in generation:
        pieces.append(piece)
        if not as_json:
            typer.echo(piece.text, nl=False)
    if save_state is not None:
        session.snapshot().save(save_state)
    if not as_json:
        typer.echo()
        return
    record = {"prompt": prompt} | _record(model, pieces, generation.finish, options)
    print_json(record | {"backend": model.backend.name, "stats": stats.summary(model.bundle.manifest.state_bytes)})


def _continue_many(
    model: Model,
    prompts: Iterator[Prompt],
    options: Options,
    batch: int,
    before: Snapshot | None,
    stats: Stats,
    as_json: bool,
) -> None:
    def record(completion: Completion) -> dict[str, object]:
        about = {"index": completion.index, "prompt": completion.prompt, "seed": completion.seed}
        return about | _record(model, completion.pieces, completion.finish, options)

    completions = model.generate_many(prompts, batch=batch, after=before, stats=stats)
    if as_json:
        records = [record(completion) for completion in completions]
        summary = stats.summary(model.bundle.manifest.state_bytes)
        print_json({"completions": records, "backend": model.backend.name, "stats": summary})
        return
    for completion in completions:
        typer.echo(json.dumps(record(completion), ensure_ascii=False))


def _record(model: Model, pieces: list[Piece], finish: Finish | None, options: Options) -> dict[str, object]:
    """What --json says of a text."""
    record: dict[str, object] = {"text": "".join(piece.text for piece in pieces), "finish": finish}
    if options.logprobs is not None:
        record["tokens"] = [
            {
                "id": piece.token,
                "text": piece.text,
                "logprob": piece.logprob,
                "top": [{"id": token, "text": model.tokenizer.decode([token]), "logprob": value} for token, value in piece.top],
            }
            for piece in pieces
            if piece.token is not None
        ]
    return record


@dataclass(frozen=True)
class _Line:
    """An object in a .jsonl file: a prompt, and what it does not share with the others."""

    prompt: str
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


def _read_prompts(path: Path, options: Options) -> Iterator[Prompt]:
    """Prompts line by line, without those that are blank; prompt i has the seed `seed + i` unless it brings its own."""
    from retnet_export.runtime.bundle.files import read_text
    from retnet_export.runtime.bundle.schema import decode
    from retnet_export.runtime.generate.batching import Prompt

    lines = read_text(path).splitlines()
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        own = _Line(line)
        if path.suffix == ".jsonl":
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); expected a string or an object with 'prompt'") from error
            own = _Line(value) if isinstance(value, str) else decode(_Line, value, where)
        changes = {name: value for name, value in asdict(own).items() if name != "prompt" and value is not None}
        if options.seed is not None:
            changes = {"seed": options.seed + len(prompts)} | changes
        prompts.append(Prompt(own.prompt, replace(options, **changes)))
    if not prompts:
        raise UserError(f"{path}: there is no prompt in it, only blank lines")
    return iter(prompts)


def _prompt_from_stdin() -> str:
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, or pipe the text in")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 text (byte {error.start}); convert it first") from error
