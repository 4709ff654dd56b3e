"""The options and arguments that several commands have, each spelt and described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_export.runtime.backends import Backends
from retnet_export.runtime.errors import ArgumentError


def bundle_path(given: str) -> Path:
    """The folder of a bundle that is named by a path or by a repository of the Hub, which is then downloaded."""
    from retnet_export.runtime.hub import bundle_folder

    return bundle_folder(given)


def checkpoint_path(given: str) -> Path:
    """The same for a checkpoint."""
    from retnet_export.export.checkpoints.hub import checkpoint_folder

    return checkpoint_folder(given)


BundlePath = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="A bundle: the folder that `export` wrote, or user/name on the Hub.", parser=bundle_path),
]
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A trained RetNet: a Hugging Face folder, a .pt file, or user/name on the Hub.",
        parser=checkpoint_path,
    ),
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The bundle to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
Json = Annotated[bool, typer.Option("--json", help="Print only one JSON document on stdout.")]
BackendName = Annotated[Backends, typer.Option("--backend", help="Which backend runs the model.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: the backend decides.")]
LowMemory = Annotated[
    bool | None,
    typer.Option("--low-memory/--no-low-memory", help="On a CPU: use less memory, or be faster; default: depends on the bundle."),
]


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Integers separated by commas; none in an empty text."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ArgumentError(name, f"is {text!r}, expected integers separated by commas, for example {name}=0,2048") from error
