"""`retnet-export serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from retnet_export.commands.options import BackendName, BundlePath, LowMemory, Threads
from retnet_export.commands.sampling import speculation_from, unescaped
from retnet_export.runtime.errors import ArgumentError, MissingExtraError, UserError


def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network: use keys then.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send; may be repeated. Also read from RETNET_API_KEY.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file of keys, one per line; lines with # are comments.", show_default=False),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Texts that are generated together.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; further requests get 429.")] = 64,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memory for the prefix cache; 0: none.")] = 512,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder that keeps the prefix cache over restarts.", show_default=False)
    ] = None,
    states: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where /slots saves and restores named states.", show_default=False)
    ] = None,
    read_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompt tokens read between two steps of other texts; fewer: smoother for them, more: faster for the prompt.",
        ),
    ] = 32,
    max_prompt: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 32_768,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4_096,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 4_000_000,
    alias: Annotated[list[str] | None, typer.Option(help="Another name of the model; may be repeated.", show_default=False)] = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chat template (Jinja), instead of the bundle's.", show_default=False)
    ] = None,
    before: Annotated[
        str, typer.Option(help=r"Without a template: text before each message, for example 'User: '; \n is a new line.")
    ] = "",
    after: Annotated[str, typer.Option(help=r"Without a template: text after each message, for example '\nAssistant: '.")] = r"\n",
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="A site whose pages may send requests; *: all sites; may be repeated.", show_default=False
        ),
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another host name of this machine.", show_default=False)] = None,
    speculate: Annotated[
        str,
        typer.Option(metavar="auto|off|N", help="Guess tokens and check them in one pass: auto, off, or up to N."),
    ] = "auto",
    patience: Annotated[float, typer.Option(min=0, help="Seconds that running requests may take to finish after SIGTERM.")] = 30.0,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
) -> None:
    """Serve a bundle to OpenAI's clients, with a chat page at /. SIGTERM or Ctrl-C lets running requests finish."""
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
    """Keys from options, files and the environment.

    Raises:
        UserError: the file cannot be read or has none.
    """
    from retnet_export.runtime.bundle.files import read_text

    keys = [*(given or ()), *filter(None, [os.environ.get("RETNET_API_KEY")])]
    if path is not None:
        found = [line.strip() for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")]
        if not found:
            raise UserError(f"{path}: it has no key; expected one per line")
        keys += found
    if any(not key.strip() for key in keys):
        raise ArgumentError("api_key", "is empty")
    return tuple(key.strip() for key in keys)
