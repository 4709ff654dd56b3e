"""Time and memory of a generation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retnet_export.runtime.timing import Sample


@dataclass
class Stats:
    """Measured while a session reads and generates; times of the consumer of the text are not in it.

    Attributes:
        prompt_tokens, prompt_seconds: reading prompts.
        first_token_ms: from the start of the first prompt to the first piece of text; None before that.
        new_tokens: generated, in all sequences.
        drafted, accepted: tokens guessed ahead, and those of them that were then chosen (speculation.py).
        graph_ms, sampling_ms, total_ms: per step, a run of the graph: in the graph, in sampling, and all together.
        keep_steps: whether these are kept. They grow by 0.1 kB a step, in a server for days.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    first_token_ms: float | None = None
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    graph_ms: list[float] = field(default_factory=list)
    sampling_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    keep_steps: bool = True

    def add_prompt(self, tokens: int, seconds: float) -> None:
        """Count a text that was read."""
        self.prompt_tokens += tokens
        self.prompt_seconds += seconds

    def add_step(self, graph_ms: float, sampling_ms: float, total_ms: float) -> None:
        """Count a step, and the time in which its tokens were chosen."""
        if self.first_token_ms is None:
            self.first_token_ms = 1e3 * self.prompt_seconds + total_ms
        if not self.keep_steps:
            return
        self.graph_ms.append(graph_ms)
        self.sampling_ms.append(sampling_ms)
        self.total_ms.append(total_ms)

    def add_to_step(self, sampling_ms: float, total_ms: float) -> None:
        """Add the time of one more token of the last step, which had shown its logits already."""
        if self.keep_steps:
            self.sampling_ms[-1] += sampling_ms
            self.total_ms[-1] += total_ms

    def summary(self, state_bytes: int) -> dict[str, float | None]:
        """All figures by name, with their units; None if there was nothing to measure.

        Args:
            state_bytes: of one sequence.
        """
        graph, sampling, total = (_percentile(part, 50) for part in (self.graph_ms, self.sampling_ms, self.total_ms))
        decode_seconds = sum(self.total_ms) / 1e3
        return {
            "time_to_first_token_ms": self.first_token_ms,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_per_second": self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else None,
            "new_tokens": self.new_tokens,
            "steps": len(self.total_ms),
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_second": self.new_tokens / decode_seconds if decode_seconds else None,
            "token_ms_p50": total,
            "token_ms_p95": _percentile(self.total_ms, 95),
            "token_ms_p99": _percentile(self.total_ms, 99),
            "graph_ms": graph,
            "sampling_ms": sampling,
            "rest_ms": None if total is None or graph is None or sampling is None else max(0.0, total - graph - sampling),
            "state_bytes": state_bytes,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def peak_memory_bytes() -> int | None:
    """The largest resident memory of this process so far; None if the system does not report it.

    Linux counts in `ru_maxrss` what the process was before it became this program, which is a copy of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return Sample(values).percentile(percent) if values else None
