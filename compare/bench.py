"""Speed of one bundle on one backend, in the tests that users of llama-bench know: pp512, tg128, in batches and at a depth.

Rule: a test is warmed up once and then repeated; each repetition starts from the same state, which is put back untimed. Its
speed is that of all sequences of the batch together; reported are mean and standard deviation over the repetitions. Tokens are
random, and a step ends when the most probable next token is on the host; nothing is sampled.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import Runner
from retnet_export.runtime.errors import ArgumentError
from retnet_export.runtime.model import Model
from retnet_export.runtime.progress import Progress, silent
from retnet_export.runtime.timing import Sample, timed_ms


@dataclass(frozen=True)
class Trial:
    """What is timed.

    Attributes:
        prompt: tokens of a prompt, read in chunks; 0 for a test of decoding.
        new: tokens decoded one by one; 0 for a test of reading.
        batch: sequences that do so together.
        depth: tokens that each has read before.
    """

    prompt: int
    new: int
    batch: int = 1
    depth: int = 0

    def __str__(self) -> str:
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.new}"
        return name + (f" b{self.batch}" if self.batch > 1 else "") + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return self.batch * (self.prompt + self.new)


@dataclass(frozen=True)
class Speed:
    """A test and how fast it was.

    Attributes:
        test: what was timed.
        tokens_per_second: of each repetition.
    """

    test: Trial
    tokens_per_second: Sample


def trials_of(prompts: Sequence[int], new: Sequence[int], batches: Sequence[int], depths: Sequence[int]) -> list[Trial]:
    """Every combination, reading before decoding.

    Raises:
        ArgumentError: a number is out of its range, or nothing is left to test.
    """
    for name, numbers, least in (("prompt", prompts, 0), ("new", new, 0), ("batches", batches, 1), ("depths", depths, 0)):
        if wrong := [number for number in numbers if number < least]:
            raise ArgumentError(name, f"has {wrong[0]}, expected {least} or more")
    tests = [
        Trial(*lengths, batch, depth)
        for depth in depths
        for batch in batches
        for lengths in (*((length, 0) for length in prompts if length), *((0, length) for length in new if length))
    ]
    if not tests:
        raise ArgumentError("prompt", "is 0 and new=0 as well, so there is nothing to test; give one of them a number of tokens")
    return tests


def run(model: Model, tests: Sequence[Trial], repetitions: int, progress: Progress = silent) -> Iterator[Speed]:
    """Run tests one after another.

    Args:
        model: the bundle on its backend.
        tests: what to time.
        repetitions: of each, after one that does not count.
        progress: gets the share done.
    """
    for number, test in enumerate(tests):
        progress(str(test), number / len(tests))
        runner = model.backend.open_runner(test.batch)
        manifest = model.bundle.manifest
        chunk = manifest.graphs["prefill"].chunk_size
        random = np.random.default_rng(0)
        tokens = random.integers(0, manifest.model.vocab_size, (test.batch, max(test.depth, test.prompt, test.new)), np.int64)
        read(runner, tokens[:, : test.depth], chunk)
        start = [runner.read_state(slot) for slot in range(test.batch)]
        seconds = []
        for turn in range(1 + repetitions):
            for slot, state in enumerate(start):
                runner.write_state(slot, state)
            if test.prompt:
                ms = timed_ms(partial(read, runner, tokens[:, : test.prompt], chunk))
            else:
                ms = timed_ms(partial(decode, runner, tokens[:, : test.new]))
            if turn:
                seconds.append(ms / 1e3)
            progress(str(test), (number + (1 + turn) / (1 + repetitions)) / len(tests))
        yield Speed(test, Sample([test.tokens / each for each in seconds]))


def read(runner: Runner, tokens: NDArray[np.int64], chunk: int) -> None:
    """Read tokens (B, T), at most `chunk` at a time; the most probable token comes to the host at the end."""
    for first in range(0, tokens.shape[1], chunk):
        part = tokens[:, first : first + chunk]
        runner.prefill(part, np.full(len(part), part.shape[1]))
    if tokens.size:
        runner.top(1)


def decode(runner: Runner, tokens: NDArray[np.int64]) -> None:
    """Step through tokens (B, T); the most probable token comes to the host after each."""
    for column in np.ascontiguousarray(tokens.T):
        runner.step(column)
        runner.top(1)


@dataclass(frozen=True)
class Line:
    """A result as all formats give it.

    Attributes:
        model: the bundle's name and the format of its weights.
        size_bytes, parameters: of the weights.
        backend, threads: what ran it; threads None for the backend's choice.
        test: its name, and then what the name says.
        tokens_per_second, deviation: mean over the repetitions and its standard deviation.
    """

    model: str
    size_bytes: int
    parameters: int
    backend: str
    threads: int | None
    test: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    depth: int
    repetitions: int
    tokens_per_second: float
    deviation: float


def line(model: Model, parameters: int, threads: int | None, speed: Speed) -> Line:
    """One result with what it was measured on."""
    manifest, test, sample = model.bundle.manifest, speed.test, speed.tokens_per_second
    return Line(
        model=f"{manifest.name} {manifest.precision.weights}",
        size_bytes=manifest.weights_bytes,
        parameters=parameters,
        backend=model.backend.name,
        threads=threads,
        test=str(test),
        prompt_tokens=test.prompt,
        new_tokens=test.new,
        batch=test.batch,
        depth=test.depth,
        repetitions=len(sample.values),
        tokens_per_second=sample.mean,
        deviation=sample.deviation,
    )


HEAD = ("model", "size", "params", "backend", "threads", "test", "t/s")
"""Columns for people, as llama-bench has them."""


def cells(found: Line) -> tuple[str, ...]:
    """A result as a row under `HEAD`."""
    return (
        found.model,
        f"{found.size_bytes / 2**20:.2f} MiB" if found.size_bytes < 2**30 else f"{found.size_bytes / 2**30:.2f} GiB",
        f"{found.parameters / 1e6:.2f} M" if found.parameters < 1e9 else f"{found.parameters / 1e9:.2f} B",
        found.backend,
        "auto" if found.threads is None else str(found.threads),
        found.test,
        f"{found.tokens_per_second:.2f} ± {found.deviation:.2f}",
    )


def markdown(lines: Sequence[Line]) -> str:
    """A Markdown table, its columns padded."""
    rows = [HEAD, *(cells(each) for each in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    right = [column > 0 and HEAD[column] != "backend" for column in range(len(HEAD))]

    def row(texts: Sequence[str]) -> str:
        padded = [text.rjust(width) if end else text.ljust(width) for text, width, end in zip(texts, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if end else "-") for width, end in zip(widths, right, strict=True))
    return "\n".join([row(HEAD), f"|{rule}|", *(row(texts) for texts in rows[1:])])


def comma_separated(lines: Sequence[Line]) -> str:
    """CSV with a head, a line a test."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Line.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in lines)
    return text.getvalue().rstrip("\n")
