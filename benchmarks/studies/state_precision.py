"""What it costs to store the state in fewer bytes: quality over a long text, runs of one token, slow heads, time.

    python benchmarks/studies/state_precision.py --text test.txt -o out/state  # everything but time, about half an hour
    python benchmarks/studies/state_precision.py --parts speed -o out/state  # on a quiet machine
    python benchmarks/studies/state_precision.py --parts "" -o out/state  # tables and plot of out/state.json again

It needs PYTHONPATH=benchmarks.

- text: the bundled model reads the text token by token and is judged as by `retnet-export evaluate`.
- prefill: the same in chunks of 128, so that the state is rounded once a chunk.
- runs: the same with every second thousand words replaced by one word a thousand times, on which roundings go the same way.
- slower: the bundled model as if every head remembered 16 times as long, up to 4,096 tokens. It was not trained for that and
  predicts worse; only the change of its logits by the state's rounding counts.
- heads: a random model of 16 heads, γ up to 1 - 2^-20, reads 16,384 tokens drawn by Zipf's law, as words are.
- speed: a step of a random model of 148M parameters, formats in turns.

Each part is kept in OUT.json; tables and OUT.png are made of all parts that are there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import onnx_ir as ir
import typer
from common import CACHE, ROOT, describe_machine, random_bundle
from numpy.typing import NDArray
from random_weights import random_weights
from state_formats import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    INT8,
    INT16,
    Codec,
    Format,
    StateBackend,
    StateRunner,
    mixed,
    state_bytes,
    store_state,
    whole,
)

from retnet_export.compare import drawing
from retnet_export.compare.drawing import BLUE, GREEN, GREY, INK, ORANGE, SOFT, VERMILION, Look
from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.quantize.evaluation import evaluate_all
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import Bundle, open_bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.model import Model
from retnet_export.runtime.timing import Sample, timed_ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("text", "prefill", "runs", "slower", "heads")
RUN = 1000
"""Words of one kind in a row."""
SLOW = ModelConfig(
    vocab_size=512, hidden_size=256, num_layers=1, num_heads=16, num_kv_heads=16, head_key_dim=32, head_value_dim=64, ffn_size=256
)
"""As many heads as the paper's 6.7B, each small; one layer, so that a head's error is its own."""


def formats(config: ModelConfig) -> dict[str, Format]:
    """Every way to store the state; fp32 first, which the others are compared with."""
    fp16, fp32 = Codec(FLOAT16), Codec(FLOAT32)
    return {
        "fp32": whole(config, fp32),
        "fp16": whole(config, fp16),
        "bf16": whole(config, Codec(BFLOAT16)),
        **{f"fp16, {slow} slowest fp32": mixed(config, fp16, fp32, slow) for slow in range(1, config.num_heads)},
        "int16, scale a row": whole(config, Codec(INT16)),
        "int8, scale a row": whole(config, Codec(INT8)),
        "int8, scale a column": whole(config, Codec(INT8, 2)),
        "int8, scales of both": whole(config, Codec(INT8, 0)),
        "int8 row, random rounding": whole(config, Codec(INT8, rounding="random")),
        "int8 row, dithered": whole(config, Codec(INT8, rounding="dithered")),
        "int8 row, slowest fp16": mixed(config, Codec(INT8), fp16, 1),
        "fp8 e4m3, scale a row": whole(config, Codec(FLOAT8)),
    }


def chosen(config: ModelConfig, *without: str) -> dict[str, Format]:
    """All formats but those whose names hold one of the texts."""
    return {name: form for name, form in formats(config).items() if not any(part in name for part in without)}


def rewritten(
    bundle: Bundle, form: Format, number: int, every_logit: Path | None = None, *, threads: int = 1, slower: int = 0
) -> StateBackend:
    """The bundle with its state in another format; graphs go into its folder, beside the weights they refer to.

    Args:
        bundle: a float bundle.
        form: the format.
        number: of the file.
        every_logit: the prefill graph, if it is to be read with.
        threads: threads an operator.
        slower: makes every head remember 2^slower times as long (decode only).
    """
    config, paths = bundle.manifest.model, []
    for source in [bundle.file("decode.onnx"), *([every_logit] if every_logit else [])]:
        model = ir.load(source)
        if slower:
            gamma = model.graph.initializers["gamma"]
            forgotten = 1 - gamma.const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
            gamma.const_value = ir.Tensor((1 - forgotten / 2**slower).astype(np.float32), name="gamma")
        store_state(model, config, form)
        paths.append(source.with_name(f"{source.stem}-{number}.onnx"))
        ir.save(model, paths[-1])
    return StateBackend(config, form, *paths, threads=threads)


def report(stage: str, share: float) -> None:
    print(f"{stage} {share:.0%}", flush=True)


def judge(
    text: Path, tokens: int, forms: Mapping[str, Format], folder: Path, *, prefill: bool = False, slower: int = 0
) -> dict[str, Any]:
    """The bundled model with every format on a text: evaluations by name, with the bytes of the state."""
    checkpoint = open_checkpoint(ROOT / "examples" / "classics")
    bundle = export_bundle(checkpoint, folder / "classics.retnet")
    config, every_logit = bundle.manifest.model, None
    if prefill:
        every_logit = bundle.file("prefill.onnx")
    models = {
        name: Model(bundle, rewritten(bundle, form, number, every_logit, slower=slower))
        for number, (name, form) in enumerate(forms.items())
    }
    reference = models.pop("fp32")
    results = evaluate_all(list(models.values()), text, against=reference, tokens=tokens, steps=not prefill, progress=report)
    return {
        name: {"bytes": state_bytes(config, forms[name]), "evaluation": asdict(result)}
        for name, result in zip(models, results, strict=True)
    }


def with_runs(text: Path, target: Path) -> Path:
    """The text with every second thousand words replaced by one of them."""
    words = text.read_text(encoding="utf-8").split(" ")
    pieces = [words[start : start + RUN] for start in range(0, len(words), RUN)]
    target.write_text(" ".join(" ".join(piece if index % 2 == 0 else ["the"] * RUN) for index, piece in enumerate(pieces)))
    return target


def slow_heads(tokens: int, folder: Path) -> dict[str, Any]:
    """State error of a random model of many heads, by head: relative, and the share of the reference's state that is there."""
    weights = random_weights(SLOW)
    checkpoint = Checkpoint(path=folder, family="random", config=SLOW, weight=weights.__getitem__, files=())
    bundle = export_bundle(checkpoint, folder / "slow.retnet")
    forms = chosen(SLOW, "slowest", "both")
    runners = {name: rewritten(bundle, form, number).open_runner(1) for number, (name, form) in enumerate(forms.items())}
    # Zipf's law: the n-th most frequent of 512 tokens is drawn with a frequency of 1/n.
    odds = 1 / np.arange(1, SLOW.vocab_size + 1)
    for token in np.random.default_rng(0).choice(SLOW.vocab_size, tokens, p=odds / odds.sum()):
        for runner in runners.values():
            runner.step(np.array([token]))
    states = {name: _by_head(runner) for name, runner in runners.items()}
    expected = states.pop("fp32")
    size = np.linalg.norm(expected, axis=1)
    return {
        "tokens": tokens,
        "largest": np.abs(expected).max(1).tolist(),
        "formats": {
            name: {
                "error": (np.linalg.norm(state - expected, axis=1) / size).tolist(),
                "kept": ((state * expected).sum(1) / size**2).tolist(),
            }
            for name, state in states.items()
        },
    }


def _by_head(runner: StateRunner) -> NDArray[np.float64]:
    """(H, all elements of all layers)."""
    state = runner.read_state(0)
    layers = [array[0].astype(np.float64) for name, array in state.items() if name.startswith("state.")]
    return np.stack(layers, 1).reshape(len(layers[0]), -1)


def speed(steps: int, turns: int, threads: int) -> dict[str, Any]:
    """Milliseconds a step of the random 148M model with float32 and with INT4 weights."""
    found: dict[str, Any] = {}
    source = random_bundle("148M")
    cached = CACHE / f"{source.path.stem}-int4-block-64.retnet"
    small = open_bundle(cached, check_hashes=False) if cached.exists() else quantize_bundle(source, cached, QuantizeOptions("int4"))
    folder = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        for weights, origin in (("fp32", source), ("int4", small)):
            shutil.copytree(origin.path, folder / weights, copy_function=os.link)
            bundle = Bundle(folder / weights, origin.manifest)
            config = bundle.manifest.model
            forms = chosen(config, "2 slowest", "column", "both", "random", "row, slowest")
            runners = {
                name: rewritten(bundle, form, number, threads=threads).open_runner(1)
                for number, (name, form) in enumerate(forms.items())
            }
            times: dict[str, list[float]] = {name: [] for name in runners}
            token = np.array([1])
            for _ in range(turns):
                for name, runner in runners.items():
                    runner.step(token)
                    times[name] += [timed_ms(partial(runner.step, token)) for _ in range(steps)]
            found[weights] = {
                name: {"bytes": state_bytes(config, forms[name]), "ms": [Sample(t).low, Sample(t).median, Sample(t).high]}
                for name, t in times.items()
            }
    finally:
        shutil.rmtree(folder)
    return found


def quality_table(rows: Mapping[str, Any]) -> list[str]:
    lines = [
        "| state | kB | perplexity | KL mean | KL 99.9 % | same best | greedy | state error by head, fastest first |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        c = row["evaluation"]["comparison"]
        greedy, errors = sorted(c["greedy"]), c["state"][-1]["by_head"]
        lines.append(
            f"| {name} | {row['bytes'] / 1e3:.0f} | {100 * (c['perplexity_ratio'] - 1):+.3f} % | "
            f"{c['kl_mean']:.1e} | {c['kl_p999']:.1e} | "
            f"{100 * c['agreement']:.2f} % | {greedy[len(greedy) // 2]} | {' '.join(f'{error:.1e}' for error in errors)} |"
        )
    return lines


def heads_table(part: Mapping[str, Any]) -> list[str]:
    shown = range(0, SLOW.num_heads, 3)
    lines = [
        "| state | | " + " | ".join(f"1 - 2^-{5 + head}" for head in shown) + " |",
        "|---|---|" + "---:|" * len(shown),
    ]
    for name, rows in part["formats"].items():
        lines.append(f"| {name} | error | " + " | ".join(f"{rows['error'][head]:.1e}" for head in shown) + " |")
        lines.append("| | kept | " + " | ".join(f"{rows['kept'][head]:.4f}" for head in shown) + " |")
    return lines


def speed_table(part: Mapping[str, Any]) -> list[str]:
    lines = ["| state | MB | MB moved a step | fp32 weights, ms | INT4 weights, ms |", "|---|---:|---:|---|---|"]
    for name, row in part["fp32"].items():
        times = [f"{found[name]['ms'][1]:.2f} [{found[name]['ms'][0]:.2f}, {found[name]['ms'][2]:.2f}]" for found in part.values()]
        lines.append(f"| {name} | {row['bytes'] / 1e6:.1f} | {2 * row['bytes'] / 1e6:.1f} | {' | '.join(times)} |")
    return lines


TABLES = {
    "text": quality_table,
    "prefill": quality_table,
    "runs": quality_table,
    "slower": quality_table,
    "heads": heads_table,
    "speed": speed_table,
}


LOOKS = {
    "fp8 e4m3, scale a row": Look(GREY, ":", "v", 1.4),
    "int8, scale a row": Look(VERMILION, "-", "s", 1.4),
    "int8 row, random rounding": Look(ORANGE, "--", "D", 1.4),
    "bf16": Look(GREEN, "-.", "^", 1.4),
    "fp16": Look(BLUE, "-", "o", 2.4),
    "int16, scale a row": Look(INK, "-", "P", 1.4),
}
"""Of the formats that are drawn."""


def plot(record: Mapping[str, Any], path: Path) -> None:
    """State error over a head's memory: lines are the random model of 16 heads, hollow marks the bundled model on the text."""
    memory = [1 << (5 + head) for head in range(SLOW.num_heads)]

    def draw(axes: Axes) -> None:
        for name, look in LOOKS.items():
            look.draw(axes, memory, record["heads"]["formats"][name]["error"], name)
            errors = record["text"][name]["evaluation"]["comparison"]["state"][-1]["by_head"]
            axes.plot(memory[: len(errors)], errors, look.marker, color=look.color, markersize=10, fillstyle="none")
        axes.plot([], [], "o", color=INK, markersize=10, fillstyle="none", label="bundled model")
        axes.axvspan(1024 * 2**0.5, memory[-1] * 2, color=SOFT, alpha=0.5, linewidth=0, label="--state fp16 warns")
        drawing.logarithmic_x(axes, "tokens that a head remembers, 1/(1 - γ)", memory[::3])
        drawing.logarithmic_y(axes, "relative error")

    figure = drawing.new_figure(draw, title=f"Error of the state after {record['heads']['tokens']:,} tokens", height=5.0)
    path.write_bytes(drawing.png(figure))


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="writes OUTPUT.json and OUTPUT.png")],
    text: Annotated[Path | None, typer.Option(help="a text that the model was not trained on")] = None,
    parts: Annotated[str, typer.Option(help=f"some of {','.join(PARTS)},speed; none: tables and plot again")] = ",".join(PARTS),
    tokens: Annotated[int, typer.Option(help="read at most so many")] = 20_480,
    steps: Annotated[int, typer.Option(help="speed: steps a turn")] = 25,
    turns: Annotated[int, typer.Option(help="speed: turns")] = 4,
    threads: Annotated[int, typer.Option(help="speed: threads; one is fastest for the small models of the other parts")] = 2,
) -> None:
    """Measure every format of the state."""
    document = output.with_suffix(".json")
    record: dict[str, Any] = json.loads(document.read_text()) if document.exists() else {}
    if parts:
        record["machine"] = describe_machine()
    for part in parts.split(",") if parts else ():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "speed":
                record[part] = speed(steps, turns, threads)
            elif part == "heads":
                record[part] = slow_heads(16_384, folder)
            else:
                if text is None:
                    raise typer.BadParameter(f"{part} needs --text")
                config = open_checkpoint(ROOT / "examples" / "classics").config
                forms = formats(config)
                if part == "prefill":
                    forms = chosen(config, "2 slowest", "3 slowest", "random", "dithered")
                source = with_runs(text, folder / "runs.txt") if part == "runs" else text
                record[part] = judge(source, tokens, forms, folder, prefill=part == "prefill", slower=4 if part == "slower" else 0)
        output.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(json.dumps(record, indent=1))
    tables = [line for part, table in TABLES.items() if part in record for line in ("", f"{part}:", "", *table(record[part]))]
    print("\n".join(tables))
    if {"text", "heads"} <= set(record):
        plot(record, output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
