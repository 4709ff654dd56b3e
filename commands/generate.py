"""`retnet-export generate`."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands import sampling
from retnet_export.commands.group import interruptible
from retnet_export.commands.options import BackendName, BundlePath, Json, LowMemory, Threads
from retnet_export.commands.output import finite, print_error, print_json, print_table, progress
from retnet_export.commands.prompts import ids_from, read_prompts, text_of_stdin
from retnet_export.runtime.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.batching import Completion, Prompt
    from retnet_export.runtime.generate.generation import Finish, Options, Piece
    from retnet_export.runtime.generate.session import Session
    from retnet_export.runtime.generate.state import Snapshot
    from retnet_export.runtime.generate.stats import Stats
    from retnet_export.runtime.model import Model

NO_RAILS = "not measured: found no power rails (only a Jetson has them)"


@sampling.with_sampling()
def generate(
    bundle: BundlePath,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; default: read from stdin, unless a saved state is given.")
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="IDS", help="Token ids to continue in place of a text, for example '1 15043 29892'.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Continue many prompts, a line each, - for stdin (.jsonl: a text, token ids, or an object with 'prompt' and "
            "options of its own); prints a JSON line for each.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --prompts: how many to generate together.")] = 8,
    load_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Continue a saved state; the prompt is read after it.")
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the state at the end. With --max-new-tokens 0 it holds only the prompt."),
    ] = None,
    *,
    options: Options,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="With --json or --prompts: log-probabilities of the tokens and of the N best tokens.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids instead of their text.")] = False,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
    stats: sampling.ShowStats = False,
    power: Annotated[bool, typer.Option("--power", help="On a Jetson: measure power and print tokens per joule.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, printing the text as it is generated, or many prompts at once."""
    from retnet_export.runtime.device.jetson import PowerMeter
    from retnet_export.runtime.generate.state import Snapshot
    from retnet_export.runtime.generate.stats import Stats
    from retnet_export.runtime.model import load

    given = [name for name, value in (("prompt", prompt), ("prompt_ids", prompt_ids), ("prompts", prompts)) if value is not None]
    if len(given) > 1:
        raise ArgumentError(given[1], f"cannot be combined with --{given[0].replace('_', '-')}: give one of them")
    if prompts is not None and save_state is not None:
        raise ArgumentError("save_state", "cannot be combined with --prompts: every prompt has its own state")
    if prompts is not None and ids:
        raise ArgumentError("ids", "cannot be combined with --prompts: its JSON lines already have the ids")
    if logprobs is not None and prompts is None and not as_json:
        raise ArgumentError("logprobs", "needs --json or --prompts, which print them")
    if save_state is not None and not save_state.absolute().parent.is_dir():
        raise UserError(f"{save_state}: the folder {save_state.parent} does not exist")
    tokens = None if prompt_ids is None else ids_from(prompt_ids)
    options = replace(options, logprobs=logprobs)
    before = None if load_state is None else Snapshot.load(load_state)
    if not given and before is None:
        prompt = text_of_stdin()
    many = None if prompts is None else read_prompts(prompts)
    model, measured = load(bundle, backend, threads=threads, low_memory=low_memory), Stats()
    meter = PowerMeter() if power else None
    with meter or contextlib.nullcontext():
        if many is not None:
            interrupted = not _continue_many(model, many, options, batch, before, measured, as_json)
        else:
            with interruptible() as stopped:
                run = _Run(model, options, measured, ids or model.bundle.manifest.tokenizer is None, as_json, stopped)
                run.continue_one(prompt if tokens is None else tokens, before, save_state)
                interrupted = stopped()
    if stats and not as_json:
        sampling.print_stats(measured, model, options.seed)
    if meter is not None:
        energy = f"{meter.joules:.1f} J, {measured.new_tokens / meter.joules:.2f} tokens per joule" if meter.joules else NO_RAILS
        print_table("", [("energy", energy)], err=True)
    if interrupted:
        raise typer.Exit(128 + signal.SIGINT)


@dataclass(frozen=True)
class _Run:
    """A continuation that is being printed; after an interruption it ends with the current token, and the text so far is kept."""

    model: Model
    options: Options
    stats: Stats
    as_ids: bool
    as_json: bool
    stopped: Callable[[], bool]

    def continue_one(self, prompt: str | list[int] | None, before: Snapshot | None, save_state: Path | None) -> None:
        session = self.model.session()
        if before is not None:
            session.restore(before)
        if prompt is not None and not self._read(session, prompt):
            return
        generation = session.pieces(self.options, stats=self.stats, with_text=self.model.bundle.manifest.tokenizer is not None)
        pieces = []
        for piece in generation:
            pieces.append(piece)
            if not self.as_json:
                typer.echo(self._shown(piece), nl=False)
            if self.stopped():
                break
        if save_state is not None:
            session.snapshot().save(save_state)
        if not self.as_json:
            typer.echo()
            return
        record = {"prompt": prompt, "seed": self.options.seed} | _record(self.model, pieces, generation.finish, self.options)
        print_json(record | _about(self.model, self.stats))

    def _read(self, session: Session, prompt: str | list[int]) -> bool:
        """Read the prompt; false if that was interrupted."""
        with progress("generate", quiet=self.as_json) as update:

            def note(done: int, total: int) -> None:
                update("reading the prompt", done / total)
                if self.stopped() and done < total:
                    raise KeyboardInterrupt

            try:
                session.feed(prompt, self.stats, note)
            except KeyboardInterrupt:
                print_error("interrupted while the prompt was read; nothing was generated or saved")
                return False
        return True

    def _shown(self, piece: Piece) -> str:
        if not self.as_ids:
            return piece.text
        return "" if piece.token is None else f"{piece.token} "


def _about(model: Model, stats: Stats) -> dict[str, object]:
    """Backend and speed."""
    summary = stats.summary(model.bundle.manifest.state_bytes)
    return {"backend": model.backend.name, "variant": model.backend.variant, "stats": summary}


def _continue_many(
    model: Model, prompts: list[Prompt], options: Options, batch: int, before: Snapshot | None, stats: Stats, as_json: bool
) -> bool:
    """Continue many prompts; false if interrupted. What was finished by then is printed."""

    def record(completion: Completion) -> dict[str, object]:
        about = {"index": completion.index, "prompt": completion.prompt, "seed": completion.seed}
        return about | _record(model, completion.pieces, completion.finish, options)

    records, done = [], False
    with contextlib.suppress(KeyboardInterrupt):
        for completion in model.generate_many(prompts, options, batch=batch, after=before, stats=stats):
            records.append(record(completion))
            if not as_json:
                typer.echo(json.dumps(finite(records[-1]), ensure_ascii=False))
        done = True
    if as_json:
        print_json({"completions": records} | _about(model, stats))
    return done


def _record(model: Model, pieces: list[Piece], finish: Finish | None, options: Options) -> dict[str, object]:
    """What --json prints for a text."""
    made = [piece for piece in pieces if piece.token is not None]
    record: dict[str, object] = {
        "text": "".join(piece.text for piece in pieces),
        "ids": [piece.token for piece in made],
        "finish": finish,
    }
    if options.logprobs is not None:
        text = model.tokenizer.decode if model.bundle.manifest.tokenizer is not None else lambda tokens: ""
        record["tokens"] = [
            {
                "id": piece.token,
                "text": piece.text,
                "logprob": piece.logprob,
                "top": [{"id": token, "text": text([token]), "logprob": value} for token, value in piece.top],
            }
            for piece in made
        ]
    return record
