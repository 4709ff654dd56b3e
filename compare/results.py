"""What a comparison found, as plain data: `report.json` is a `Comparison`, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RETNET = "RetNet"
TRANSFORMER = "Transformer"
GENAI = "onnxruntime-genai"
LLAMA_CPP = "llama.cpp"
REPORT_FORMAT: Literal["retnet-export comparison"] = "retnet-export comparison"


@dataclass(frozen=True)
class Cell:
    """One thing that is measured for every engine.

    Attributes:
        kind: "decode" times single tokens, "prefill" whole prompts.
        context: tokens read before the first token that is timed.
        batch: sequences that run together.
        tokens: of the prompt, for prefill; 1 for decode.
    """

    kind: Literal["decode", "prefill"]
    context: int
    batch: int
    tokens: int = 1

    @property
    def name(self) -> str:
        """For people."""
        what = f"a prompt of {self.tokens:,}" if self.kind == "prefill" else f"context {self.context:,}"
        return what if self.batch == 1 else f"{what}, batch {self.batch}"


@dataclass(frozen=True)
class Timing:
    """Times of single runs of a cell, in milliseconds.

    Attributes:
        runs: how many were timed.
        median_ms, p95_ms: over all of them.
        rounds_ms: the median of each round, in the order in which the engines took turns: the spread between rounds.
    """

    runs: int
    median_ms: float
    p95_ms: float
    rounds_ms: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Slowest round over fastest, less one."""
        return max(self.rounds_ms) / min(self.rounds_ms) - 1.0


@dataclass(frozen=True)
class Measurement:
    """One engine in one cell.

    Attributes:
        engine: its name.
        cell: what it did.
        timing: None if it was not run.
        steady_bytes, peak_bytes: resident memory of its process after the runs, and at most; None where unknown.
        note: why it was not run, or what else there is to know.
    """

    engine: str
    cell: Cell
    timing: Timing | None = None
    steady_bytes: int | None = None
    peak_bytes: int | None = None
    note: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all sequences together."""
        return None if self.timing is None else 1e3 * self.cell.batch * self.cell.tokens / self.timing.median_ms


@dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        name: shown in tables.
        parameters: numbers in all weights.
        weights: their format.
        weights_bytes: of the weights file.
        buffers: sets of states or caches that a running sequence holds: two where a state is read from one and written to another.
        bytes_per_sequence: state of one sequence whatever its length; 0 for the Transformer.
        bytes_per_token: cache of one token of one sequence; 0 for the RetNet.
        shape: its sizes.
    """

    name: str
    parameters: int
    weights: str
    weights_bytes: int
    buffers: int
    bytes_per_sequence: int
    bytes_per_token: int
    shape: Mapping[str, int]

    def sequence_bytes(self, context: int) -> int:
        """State or cache of one sequence that has read `context` tokens."""
        return self.bytes_per_sequence + self.bytes_per_token * context


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured, and on what.

    Attributes:
        format, format_version: of the document.
        bundle: the bundle's name.
        machine: processor, cores used, memory, system, date.
        versions: of the packages that ran.
        settings: what the user chose.
        retnet, transformer: the two sides.
        measurements: every engine in every cell.
        memory_budget: bytes that were to suffice.
        perplexity: of the bundle on the user's text, or None.
        text: what the perplexity was taken on.
    """

    format: Literal["retnet-export comparison"]
    format_version: int
    bundle: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    settings: Mapping[str, object]
    retnet: Side
    transformer: Side
    measurements: tuple[Measurement, ...]
    memory_budget: int
    perplexity: float | None = None
    text: str | None = None

    @property
    def engines(self) -> tuple[str, ...]:
        """Their names, in the order in which they took turns."""
        return tuple(dict.fromkeys(measurement.engine for measurement in self.measurements))

    def find(self, engine: str, cell: Cell) -> Measurement | None:
        """One engine in one cell."""
        return next((found for found in self.measurements if found.engine == engine and found.cell == cell), None)

    def cells(self, kind: str) -> tuple[Cell, ...]:
        """The cells of one kind, in order."""
        return tuple(dict.fromkeys(found.cell for found in self.measurements if found.cell.kind == kind))
