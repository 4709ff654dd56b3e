"""`retnet-export serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from retnet_export.commands.common import BackendName, BundlePath, LowMemory, Threads
from retnet_export.commands.sampling import speculation_from, unescaped
from retnet_export.runtime.errors import ArgumentError, MissingExtraError, UserError


def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere: then use keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send; may be repeated. Also from RETNET_API_KEY.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line; lines with # are not.", show_default=False)
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Texts that are generated together.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait beyond those; then clients get 429.")] = 64,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memory for the prefix cache; 0: none.")] = 512,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the prefix cache here over restarts.", show_default=False)
    ] = None,
    states: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where /slots saves and restores named states.", show_default=False)
    ] = None,
    read_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens read between two steps of others; fewer are smoother, more are faster.")
    ] = 32,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, at most.")] = 32_768,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 4_096,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request, at most.")] = 4_000_000,
    alias: Annotated[list[str] | None, typer.Option(help="Another name of the model; may be repeated.", show_default=False)] = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chat template (Jinja), instead of the bundle's.", show_default=False)
    ] = None,
    before: Annotated[
        str, typer.Option(help=r"Without a template: put before each message, as in 'User: '; \n is a new line.")
    ] = "",
    after: Annotated[str, typer.Option(help=r"Without a template: put after each message, as in '\nAssistant: '.")] = r"\n",
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A site whose pages may ask; * is all; may be repeated.", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that clients reach this machine by.", show_default=False)
    ] = None,
    speculate: Annotated[
        str,
        typer.Option(metavar="auto|off|N", help="Guess tokens ahead and check them in one pass: as many as pay, none, or up to N."),
    ] = "auto",
    patience: Annotated[float, typer.Option(min=0, help="Seconds that running requests get after SIGTERM.")] = 30.0,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
) -> None:
    """Serve a bundle to OpenAI's clients, with a chat page at /. Ends in good order on SIGTERM or Ctrl-C."""
    try:
        from retnet_export.serve.server import run
        from retnet_export.serve.service import Limits
        from retnet_export.serve.settings import Settings
    except ImportError as error:
        raise MissingExtraError(error.name or "starlette", "serve", "the server") from error

    run(
        Settings(
            bundle=bundle,
            host=host,
            port=port,
            backend=backend,
            threads=threads,
            low_memory=low_memory,
            names=tuple(alias or ()),
            slots=max_batch,
            queue=max_queue,
            read_tokens=read_tokens,
            speculate=speculation_from(speculate),
            cache_bytes=1_000_000 * cache_mb,
            cache_folder=cache_dir,
            states=states,
            template=template,
            before=unescaped(before),
            after=unescaped(after),
            keys=_keys(api_key, api_key_file),
            hosts=tuple(allow_host or ()),
            origins=tuple(cors or ()),
            limits=Limits(body=max_body, prompt=max_prompt, tokens=max_tokens),
            patience=patience,
        ),
        lambda line: typer.echo(line, err=True),
    )


def _keys(given: list[str] | None, path: Path | None) -> tuple[str, ...]:
    """Keys from everywhere.

    Raises:
        UserError: the file cannot be read or has none.
    """
    from retnet_export.runtime.bundle.files import read_text

    keys = [*(given or ()), *filter(None, [os.environ.get("RETNET_API_KEY")])]
    if path is not None:
        found = [line.strip() for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")]
        if not found:
            raise UserError(f"{path}: there is no key in it; expected one a line")
        keys += found
    if any(not key.strip() for key in keys):
        raise ArgumentError("api_key", "is empty")
    return tuple(key.strip() for key in keys)
