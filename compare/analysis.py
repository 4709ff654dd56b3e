"""What the numbers say: ratios, break-even contexts, what fits in a budget, and the result in a few sentences.

Rule: every sentence is computed from the measurements; one that the numbers do not bear is not written.
"""

from __future__ import annotations

from dataclasses import dataclass

from retnet_export.compare.results import GENAI, RETNET, TRANSFORMER, Cell, Comparison, Measurement
from retnet_export.compare.transformer import PARAMETER_MATCH

PEER_MARGIN = 1.10
"""If onnxruntime-genai runs the baseline faster than ours by more than this, its figure is the one compared with."""


@dataclass(frozen=True)
class Pair:
    """RetNet and baseline in one cell.

    Attributes:
        cell: what was measured.
        retnet, transformer: the two sides; either may not have been run.
        advantage: the Transformer's time over the RetNet's; above 1 the RetNet is faster. None if either was not run.
    """

    cell: Cell
    retnet: Measurement
    transformer: Measurement

    @property
    def advantage(self) -> float | None:
        if self.retnet.timing is None or self.transformer.timing is None:
            return None
        return self.transformer.timing.median_ms / self.retnet.timing.median_ms


@dataclass(frozen=True)
class Capacity:
    """What fits in the memory budget.

    Attributes:
        context: the context at which batches are counted.
        retnet_batch, transformer_batch: the most sequences of that length.
    """

    context: int
    retnet_batch: int
    transformer_batch: int


def rows(comparison: Comparison, kind: str) -> list[Pair]:
    """RetNet and Transformer side by side, cell by cell."""
    found = []
    for cell in comparison.cells(kind):
        retnet, transformer = comparison.find(RETNET, cell), baseline_in(comparison, cell)
        if retnet is not None and transformer is not None:
            found.append(Pair(cell, retnet, transformer))
    return found


def decode_rows(comparison: Comparison) -> list[Pair]:
    """Single sequences over context."""
    return [row for row in rows(comparison, "decode") if row.cell.batch == 1]


def batch_rows(comparison: Comparison) -> list[Pair]:
    """Batches, at the context at which batches were measured."""
    context = comparison.settings["batch_context"]
    return sorted((row for row in rows(comparison, "decode") if row.cell.context == context), key=lambda row: row.cell.batch)


def baseline_in(comparison: Comparison, cell: Cell) -> Measurement | None:
    """The Transformer to compare with: ours, or onnxruntime-genai's run of it where that is faster by more than a tenth."""
    ours, theirs = comparison.find(TRANSFORMER, cell), comparison.find(GENAI, cell)
    if ours is None or ours.timing is None or theirs is None or theirs.timing is None:
        return ours
    return theirs if theirs.timing.median_ms * PEER_MARGIN < ours.timing.median_ms else ours


def slower_than_peer(comparison: Comparison) -> list[Cell]:
    """Cells in which our baseline is slower than onnxruntime-genai's by more than a tenth."""
    cells = dict.fromkeys(measurement.cell for measurement in comparison.measurements)
    return [cell for cell in cells if (found := baseline_in(comparison, cell)) is not None and found.engine == GENAI]


def faster_from(comparison: Comparison) -> int | None:
    """The context from which the RetNet decodes faster, interpolated between those measured; None if not within them.

    It must then stay faster: a crossing that later reverses is noise and does not count.
    """
    points = [(row.cell.context, row.advantage) for row in decode_rows(comparison) if row.advantage is not None]
    crossing = None
    for (before, low), (after, high) in zip([(0, None), *points], points, strict=False):
        if high <= 1:
            crossing = None
        elif crossing is None:
            crossing = after if low is None else round(before + (after - before) * (1 - low) / (high - low)) if low < 1 else before
    return crossing


def capacity(comparison: Comparison) -> Capacity | None:
    """What fits in the budget, from the measured memory of one sequence and the size of each further one."""
    context = int(str(comparison.settings["batch_context"]))
    room = {}
    for name, model in ((RETNET, comparison.retnet), (TRANSFORMER, comparison.transformer)):
        measured = [
            m for m in comparison.measurements if m.engine == name and m.steady_bytes is not None and m.cell.kind == "decode"
        ]
        if not measured:
            return None
        least = min(measured, key=lambda m: m.steady_bytes or 0)
        assert least.steady_bytes is not None
        fixed = least.steady_bytes - least.cell.batch * model.buffers * model.sequence_bytes(least.cell.context)
        room[name] = comparison.memory_budget - fixed
    retnet, transformer = comparison.retnet, comparison.transformer
    return Capacity(
        context=context,
        retnet_batch=max(0, room[RETNET] // (retnet.buffers * retnet.sequence_bytes(context))),
        transformer_batch=max(0, room[TRANSFORMER] // max(1, transformer.sequence_bytes(context))),
    )


def summary(comparison: Comparison) -> tuple[str, ...]:
    """The result in a few short sentences: speed, memory, what fits."""
    return tuple(sentence for sentence in (_speed(comparison), _memory(comparison), _capacity(comparison)) if sentence)


def _speed(comparison: Comparison) -> str:
    measured = [
        (row.cell.context, row.retnet.timing.median_ms, row.advantage)
        for row in decode_rows(comparison)
        if row.retnet.timing is not None and row.advantage is not None
    ]
    if not measured:
        return "Neither model could be timed."
    (context, milliseconds, advantage), (longest, _, last) = measured[0], measured[-1]
    sentence = f"The RetNet takes {milliseconds:.1f} ms a token at {_context(context)}, {advantage:.2f}× as fast as the Transformer"
    if len(measured) == 1:
        return f"{sentence}."
    crossing = faster_from(comparison)
    where = "" if not crossing else f" (faster from about {crossing:,} tokens on)"
    return f"{sentence}; at {_context(longest)} it is {last:.2f}× as fast{where}."


def _memory(comparison: Comparison) -> str:
    state, per_token = comparison.retnet.bytes_per_sequence, comparison.transformer.bytes_per_token
    longest = max((cell.context for cell in comparison.cells("decode")), default=0)
    sentence = f"Its state is {state / 1e6:,.1f} MB at any length; the cache grows by {per_token / 1e3:,.1f} kB a token"
    if per_token * longest > state:
        sentence += f" and is {per_token * longest / state:,.0f}× as large at {longest:,} tokens"
    return f"{sentence}."


def _capacity(comparison: Comparison) -> str:
    fits = capacity(comparison)
    if fits is None or fits.retnet_batch < 1:
        return ""
    return (
        f"{comparison.memory_budget / 1e9:,.1f} GB hold {fits.retnet_batch:,} RetNet sequences of any length, or "
        f"{fits.transformer_batch:,} Transformer sequences of {fits.context:,} tokens."
    )


def parameter_difference(comparison: Comparison) -> float:
    """The Transformer's parameters over the RetNet's, less one."""
    return comparison.transformer.parameters / comparison.retnet.parameters - 1


def caveats(comparison: Comparison) -> list[str]:
    """What a reader must know before quoting the result."""
    sentences = ["The Transformer's weights are random: its speed does not depend on them, and this says nothing of its quality."]
    if abs(difference := parameter_difference(comparison)) > PARAMETER_MATCH:
        sentences.append(
            f"The Transformer has {100 * abs(difference):.1f} % {'more' if difference > 0 else 'fewer'} parameters than the "
            "RetNet: no feed-forward width that its groups of quantized weights divide comes closer."
        )
    if comparison.perplexity is not None:
        sentences.append(f"The RetNet's perplexity on {comparison.text} is {comparison.perplexity:.2f}.")
    if slower_than_peer(comparison):
        sentences.append(f"*: the figure of {GENAI}, which runs the Transformer faster than this project by more than a tenth.")
    return sentences


def _context(tokens: int) -> str:
    return f"a context of {tokens:,} tokens" if tokens else "an empty context"
