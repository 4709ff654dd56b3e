"""`retnet-export demo`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from retnet_export.commands.options import Force, checkpoint_path
from retnet_export.commands.output import print_columns, progress
from retnet_export.runtime.errors import UserError

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "classics"
HELD_OUT = EXAMPLE / "held-out.txt"
PROMPT = "In the beginning"
HEAD = ("weights", "MB", "tokens/s", "ms", "perplexity", "bits/byte", "KL, nats", "same best")


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="The bundle to write.")] = Path(
        "classics.retnet"
    ),
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint to use in place of the bundled model.", parser=checkpoint_path)
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to measure quality on; default: a bundled text.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Quantize to INT4 by gptq with this calibration text.")
    ] = None,
    force: Force = False,
) -> None:
    """Run every stage on the bundled model: export, verify, generate, quantize, evaluate, compile, compare."""
    from retnet_export.quantize.texts import encode
    from retnet_export.runtime.bundle.files import read_text
    from retnet_export.runtime.model import load

    source = checkpoint or EXAMPLE
    if checkpoint is None and not source.is_dir():
        raise UserError(
            "the bundled model is in the source tree, not in the installed package: "
            "run the demo in a clone, or give --checkpoint FOLDER"
        )
    if text is None and not HELD_OUT.is_file():
        raise UserError("the bundled text is in the source tree, not in the installed package: give --text FILE")
    text = text or HELD_OUT
    texts = {path: read_text(path) for path in (text, calibration) if path is not None}
    again = ["--force"] if force else []
    _run("export", source, "-o", output, *again)
    model = load(output, check_hashes=False)
    for path, content in texts.items():
        encode(model, content, path)  # refuse an unusable text before the work, not after
    _run("verify", output, "--checkpoint", source)
    _run("generate", output, "--prompt", PROMPT, "--max-new-tokens", 160, "--seed", 1, "--stats")
    bundles = {"fp32": output, **_quantize(output, calibration, again)}
    _run("generate", bundles["INT8"], "--prompt", PROMPT, "--max-new-tokens", 160, "--seed", 1, "--stats")
    _print_trade_offs(bundles, text)
    _compile(output)
    report = output.with_suffix(".comparison")
    measured = ("--contexts", "0,512,2048,8192", "--prompts", "512", "--batches", "1,4", "--seconds", 0.3)
    _run("compare", output, "-o", report, *measured, *again)


def _quantize(bundle: Path, calibration: Path | None, again: Sequence[str]) -> dict[str, Path]:
    """Quantized copies by name; INT4 by the best method that the given texts allow."""
    method = "rtn" if calibration is None else "gptq"
    int8, int4 = (bundle.with_name(f"{bundle.stem}-{weights}.retnet") for weights in ("int8", "int4"))
    _run("quantize", bundle, "-o", int8, "--weights", "int8", *again)
    calibrated = [] if calibration is None else ["--method", "gptq", "--calibration", calibration]
    _run("quantize", bundle, "-o", int4, "--weights", "int4", *calibrated, *again)
    return {"INT8": int8, f"INT4, {method}": int4}


def _print_trade_offs(bundles: Mapping[str, Path], text: Path) -> None:
    from retnet_export.compare.machine import cores, description, versions
    from retnet_export.quantize.trade_off import ROUNDS, TOKENS_A_ROUND, trade_offs

    with progress("weigh up") as update:
        results = trade_offs(bundles, text, prompt=PROMPT, progress=update)
    lines = []
    for each in results:
        quality, pair = each.evaluation, each.evaluation.comparison
        lines.append(
            [
                each.name,
                f"{each.weights_bytes / 1e6:.1f}",
                f"{each.tokens_per_second:,.0f}",
                f"{each.token_ms:.2f}",
                f"{quality.perplexity:.3f}",
                f"{quality.bits_per_byte:.4f}",
                "0" if pair is None else f"{pair.kl_mean:.1e}",
                "100 %" if pair is None else f"{100 * pair.agreement:.1f} %",
            ]
        )
    print_columns("size, speed and quality, before and after", HEAD, lines)
    first = results[0].evaluation
    where = description(cores(None))
    typer.echo(
        f"\nspeed: median of {ROUNDS} rounds of {TOKENS_A_ROUND} tokens in turns, sampling included; "
        f"the rounds of a row differ by {100 * max(each.spread for each in results):.0f} % at most\n"
        f"quality: {first.tokens:,} tokens of {first.text}, KL and same best token against {results[0].name}"
    )
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    typer.echo(f"measured on {where['processor']}, {len(cores(None))} cores, {where['memory']}; {software}; {where['date']}")


def _compile(bundle: Path) -> None:
    """TensorRT-RTX builds without a GPU; if it is not installed, the demo says so and continues."""
    from retnet_export.runtime.backends.tensorrt_api import load_module

    command = ("compile", bundle, "--target", "tensorrt-rtx", "--compute-capability", "8.6", "--compute-capability", "12.0")
    try:
        load_module("tensorrt-rtx")
    except UserError as error:
        _announce(command)
        typer.echo(f"skipped: {error}")
        return
    _run(*command)


def _run(*command: object) -> None:
    """Run a command as it is printed, in a separate process, so that its time and memory are those that a user would see."""
    _announce(command)
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "retnet_export", *map(str, command)], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def _announce(command: Sequence[object]) -> None:
    typer.secho(f"\n$ retnet-export {shlex.join(map(str, command))}", fg="cyan", bold=True)
