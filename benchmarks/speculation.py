"""Speculation by prompt lookup: what a pass costs by its width, and how much faster texts of three kinds are written.

    python benchmarks/speculation.py [--bundle PATH | --size 148M --weights int4] [--backend onnxruntime] [--threads 2]

1. What does a pass over n tokens take, in steps? `pass_cost` of a backend says it as 1 + fixed + token · (n - 1).
2. How much faster is a text written with `--speculate auto` than with `off`? Both take turns. The text is given, token by token,
   so that it is the same for every model: prose that repeats nothing, a passage repeated with edits, a list of a fixed pattern.
   The time is that of a model that writes this text. Everything else is as in `generate --temperature 0`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import CACHE, ROOT, SIZES, describe_machine, random_bundle
from numpy.typing import NDArray

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.base import Runner
from retnet_export.runtime.bundle.bundle import Bundle, open_bundle
from retnet_export.runtime.bundle.manifest import Precision
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Continuation, Options
from retnet_export.runtime.generate.sampling import LogitsView
from retnet_export.runtime.generate.session import Session
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.generate.tokenizer import Tokenizer
from retnet_export.runtime.model import Model, load
from retnet_export.runtime.timing import Sample, timed_ms

EXAMPLE = ROOT / "examples" / "classics"
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
EVERY = 24
"""In the edited passage one word in so many is another one."""
Text = tuple[Sequence[int], Sequence[int]]
"""A prompt and what is written after it."""


def texts(tokenizer: Tokenizer, tokens: int) -> Mapping[str, Text]:
    """Texts by name, `tokens` long each."""
    held_out = (EXAMPLE / "held-out.txt").read_text(encoding="utf-8")
    prose = tokenizer.encode(held_out)
    words = held_out[: len(held_out) // 2].split(" ")
    edited = " ".join("changed" if index % EVERY == EVERY - 1 else word for index, word in enumerate(words))
    entries = [f'{{"id": {number}, "name": "item {number}", "price": {number % 10}.50}},\n' for number in range(100, 300)]
    listed = tokenizer.encode("".join(entries))
    passage = tokenizer.encode(" ".join(words))[: tokens + 64]
    return {
        "prose": (prose[:256], prose[256 : 256 + tokens]),
        "a passage with edits": (passage, tokenizer.encode(edited)[:tokens]),
        "a list": (listed[:128], listed[128 : 128 + tokens]),
    }


class Dictated(Continuation):
    """Chooses given tokens, and looks at the largest logit as greedy generation does."""

    def __init__(self, options: Options, session: Session, text: Sequence[int]) -> None:
        super().__init__(options, np.zeros(session.manifest.model.vocab_size, np.int32))
        self._text = iter(text)

    def choose(self, view: LogitsView) -> int | None:
        view.top(1)
        return next(self._text)


def write(model: Model, text: Text, speculate: int | None) -> tuple[float, Stats]:
    """Tokens per second of writing a text after its prompt, and what was guessed."""
    prompt, reply = text
    session, stats = model.session(), Stats()
    session.feed(prompt)
    options = Options(temperature=0.0, max_new_tokens=len(reply), speculate=speculate)
    continuation = Dictated(options, session, reply)
    loop, written = session.loop(stats), []
    running = loop.begin(continuation, 0)
    began = time.perf_counter()
    while (piece := loop.choose(running, 0)) is not None:
        if running.waits:
            loop.advance([running])
        written.append(piece.token)
    seconds = time.perf_counter() - began
    assert written == list(reply)
    return len(reply) / seconds, stats


def costs(model: Model, rounds: int) -> None:
    """Question 1."""
    runner = model.backend.open_runner(1)
    random = np.random.default_rng(0)
    times: dict[int, list[float]] = {width: [] for width in (0, *WIDTHS)}
    for _ in range(rounds):
        for width in times:
            tokens = random.integers(0, model.bundle.manifest.model.vocab_size, (1, max(width, 1)))
            times[width].append(timed_ms(partial(_run, runner, tokens, width)))
    step = Sample(times[0])
    print(f"\na step {step} ms, median [10 %, 90 %] of {rounds}; a pass of n tokens in steps, median over median:")
    print("| " + " | ".join(f"{width:5}" for width in WIDTHS) + " |")
    print("|" + "------:|" * len(WIDTHS))
    print("| " + " | ".join(f"{Sample(times[width]).median / step.median:5.2f}" for width in WIDTHS) + " |")


def _run(runner: Runner, tokens: NDArray[np.int64], width: int) -> None:
    """A pass that takes in one token and shows the logits after `width`; a step if that is 0."""
    if width:
        runner.score(tokens, np.array([1]), np.arange(width)[None])
    else:
        runner.step(tokens[0])
        runner.top(1)


def speed(model: Model, tokenizer: Tokenizer, tokens: int, rounds: int, speculate: int | None) -> None:
    """Question 2."""
    print(f"\n{tokens} tokens each, median [10 %, 90 %] of {rounds} turns")
    print("| text                 | off, tokens/s        | speculating          | ratio             | guessed | right | passes |")
    print("|----------------------|----------------------|----------------------|-------------------|--------:|------:|-------:|")
    for name, text in texts(tokenizer, tokens).items():
        found: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(1 + rounds):
            for guessing in found:
                rate, stats = write(model, text, speculate if guessing else 0)
                if turn:  # the first one warms up
                    found[guessing].append(rate)
        off, on = (Sample(rates) for rates in found.values())
        ratio = Sample(np.array(on.values) / np.array(off.values))
        right = stats.accepted / stats.drafted if stats.drafted else 0.0
        print(
            f"| {name:20} | {_plain(off):20} | {_plain(on):20} | {ratio!s:17} | {stats.drafted:7} | {right:5.0%} "
            f"| {len(stats.total_ms):6} |",
            flush=True,
        )


def _plain(sample: Sample) -> str:
    return f"{sample.median:.1f} [{sample.low:.1f}, {sample.high:.1f}]"


def main(
    bundle: Annotated[Path | None, typer.Option(help="Measure this bundle.")] = None,
    size: Annotated[str | None, typer.Option(help="Or one of random weights: 148M, 1.5B; else the bundled model.")] = None,
    weights: Annotated[str, typer.Option(help="Of the random bundle: int4, int8, fp32; fp16 on a GPU.")] = "int4",
    backend: Annotated[str, typer.Option(help="Which backend runs the model.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    tokens: Annotated[int, typer.Option(help="Of each text.")] = 400,
    rounds: Annotated[int, typer.Option(help="Turns of each text.")] = 5,
    speculate: Annotated[int | None, typer.Option(help="Guess up to so many whenever there is a guess, instead of auto.")] = None,
) -> None:
    """Measure speculation."""
    print(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        classics = export_bundle(open_checkpoint(EXAMPLE), Path(temporary) / "classics.retnet").path
        tokenizer = load(classics, "onnxruntime", check_hashes=False).tokenizer
        if backend == "cuda" and bundle is None and size is not None:
            model = _random_on_a_gpu(open_bundle(classics, check_hashes=False), size, weights)
        else:
            path = bundle or (classics if size is None else _random(size, weights))
            model = load(path, backend, threads=threads, check_hashes=False)
        manifest = model.bundle.manifest
        print(f"{manifest.name}, {manifest.precision.weights}, backend {model.backend.name}, {threads or 'auto'} threads")
        costs(model, 10 * rounds)
        speed(model, tokenizer, tokens, rounds, speculate)


def _random(size: str, weights: str) -> Path:
    source = random_bundle(size)
    if weights == "fp32":
        return Path(source.path)
    target: Path = CACHE / f"random-{size}-{weights}.retnet"
    try:
        return open_bundle(target, check_hashes=False).path
    except UserError:  # not there, or of another version
        return quantize_bundle(source, target, QuantizeOptions(weights=weights), force=True).path


def _random_on_a_gpu(like: Bundle, size: str, weights: str) -> Model:
    """A model of random weights that never were in a file: speed does not depend on them."""
    from step import FORMATS, random_model

    from retnet_export.runtime.backends.cuda.backend import CudaBackend

    made, random = random_model(SIZES[size], *FORMATS[weights])
    precision = Precision(weights, "float16", "float32")
    manifest = replace(
        like.manifest, name=f"random {size}", model=SIZES[size], precision=precision, state=made.manifest.state, tokenizer=None
    )
    bundle = Bundle(like.path, manifest)
    return Model(bundle, CudaBackend(bundle, weights=random))


if __name__ == "__main__":
    typer.run(main)
