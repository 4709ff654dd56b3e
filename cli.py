"""The command `retnet-export`: a command per stage, each a thin layer over the Python API.

Heavy packages are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from retnet_export.commands.bench import bench
from retnet_export.commands.chat import chat
from retnet_export.commands.compare import compare
from retnet_export.commands.compile import compile_
from retnet_export.commands.demo import demo
from retnet_export.commands.doctor import doctor
from retnet_export.commands.evaluate import evaluate
from retnet_export.commands.export import export
from retnet_export.commands.generate import generate
from retnet_export.commands.group import Commands
from retnet_export.commands.inspect import inspect
from retnet_export.commands.plan import plan
from retnet_export.commands.quantize import quantize
from retnet_export.commands.serve import serve
from retnet_export.commands.tokenize import tokenize
from retnet_export.commands.triton import triton
from retnet_export.commands.verify import verify

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # typer's boxes cut long names of options, and cost a third of the time
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run trained RetNets on embedded GPUs: export to a recurrent ONNX graph, quantize, compile, generate.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from retnet_export import __version__

        typer.echo(f"retnet-export {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


COMMANDS = (
    export,
    verify,
    quantize,
    evaluate,
    compile_,
    generate,
    chat,
    serve,
    triton,
    tokenize,
    inspect,
    bench,
    compare,
    plan,
    doctor,
    demo,
)
for command in COMMANDS:
    # The first sentence; Typer would cut the lists of commands off at 45 characters.
    summary = (command.__doc__ or "").partition(". ")[0].rstrip(".") + "."
    app.command(command.__name__.rstrip("_"), short_help=summary)(command)
