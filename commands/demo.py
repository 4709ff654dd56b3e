"""`retnet-export demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet_export.commands.common import Force
from retnet_export.runtime.errors import UserError

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "classics"
PROMPT = "In the beginning"


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The bundle to write.")] = Path(
        "classics.retnet"
    ),
    checkpoint: Annotated[Path | None, typer.Option(help="Another checkpoint than the bundled model.", show_default=False)] = None,
    force: Force = False,
) -> None:
    """The whole path on the bundled model: export, verify, generate, quantize, compile, and a comparison with a Transformer."""
    from retnet_export.commands.compare import compare
    from retnet_export.commands.export import export
    from retnet_export.commands.generate import generate
    from retnet_export.commands.quantize import quantize
    from retnet_export.commands.verify import verify

    source = checkpoint or EXAMPLE
    if checkpoint is None and not source.is_dir():
        raise UserError(
            "the bundled model is part of the source tree and not of the installed package: "
            "run the demo from a clone, or give --checkpoint FOLDER"
        )
    _announce(f"retnet-export export {source} -o {output}")
    export(source, output, force=force)
    _announce(f"retnet-export verify {output} --checkpoint {source}")
    verify(output, source)
    _announce(f"retnet-export generate {output} --prompt {PROMPT!r} --seed 1 --stats")
    generate(output, prompt=PROMPT, max_new_tokens=160, seed=1, stats=True)
    smaller = output.with_name(f"{output.stem}-int8.retnet")
    _announce(f"retnet-export quantize {output} -o {smaller} --weights int8")
    quantize(output, smaller, weights="int8", force=force)
    _announce(f"retnet-export generate {smaller} --prompt {PROMPT!r} --seed 1 --stats")
    generate(smaller, prompt=PROMPT, max_new_tokens=160, seed=1, stats=True)
    _compile(output)
    report = output.with_suffix(".comparison")
    contexts = "0,512,2048,8192"
    _announce(f"retnet-export compare {output} -o {report} --contexts {contexts} --prompts 512 --batches 1,4 --seconds 0.3")
    compare(output, report, contexts=contexts, prompts="512", batches="1,4", seconds=0.3, force=force)


def _compile(bundle: Path) -> None:
    """TensorRT-RTX builds for GPUs that are not here; without it the demo says so and goes on."""
    from retnet_export.commands.compile import compile_
    from retnet_export.runtime.tensorrt_api import load_module

    _announce(f"retnet-export compile {bundle} --target tensorrt-rtx --compute-capability 8.6 --compute-capability 12.0")
    try:
        load_module("tensorrt-rtx")
    except UserError as error:
        typer.echo(f"skipped: {error}")
        return
    compile_(bundle, target="tensorrt-rtx", compute_capability=["8.6", "12.0"])


def _announce(command: str) -> None:
    typer.secho(f"\n$ {command}", fg="cyan", bold=True)
