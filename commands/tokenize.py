"""`retnet-export tokenize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from retnet_export.commands.options import BundlePath, Json
from retnet_export.commands.output import print_columns, print_json
from retnet_export.runtime.errors import ArgumentError, UserError


def tokenize(
    bundle: BundlePath,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="The text; default: stdin.")] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the text from a file.")] = None,
    prefix: Annotated[
        bool, typer.Option("--prefix/--no-prefix", help="Include the tokens that begin a text, as `generate` does.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show the tokens of a text: their ids and their names in the vocabulary."""
    from retnet_export.runtime.bundle.bundle import open_bundle
    from retnet_export.runtime.bundle.files import read_text
    from retnet_export.runtime.generate.tokenizer import Tokenizer

    if text is not None and file is not None:
        raise ArgumentError("file", "cannot be combined with TEXT: give one of them")
    content = read_text(file) if file is not None else sys.stdin.read() if text is None else text
    opened = open_bundle(bundle, check_hashes=False)
    spec = opened.manifest.tokenizer
    if spec is None:
        raise UserError(
            f"{bundle}: the bundle has no tokenizer; put tokenizer.json into the checkpoint's folder and export it again"
        )
    tokenizer = Tokenizer(opened.file(spec.file), spec)
    ids = tokenizer.encode(content, prefix=prefix)
    if as_json:
        print_json({"text": content, "ids": ids, "tokens": [tokenizer.token(token) for token in ids]})
        return
    print_columns(f"{len(ids)} tokens", ("token", "id"), [(repr(tokenizer.token(token))[1:-1], str(token)) for token in ids])
    typer.echo(f"\n{' '.join(map(str, ids))}")
