"""Times measured several times, and what is said of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """A quantity measured several times; its figures are NaN if it never was."""

    values: Sequence[float] | NDArray[np.floating[Any]]

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def low(self) -> float:
        return self.percentile(10)

    @property
    def high(self) -> float:
        return self.percentile(90)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if len(self.values) else float("nan")

    @property
    def deviation(self) -> float:
        """The standard deviation of one value (n - 1), 0 of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.values, percent)) if len(self.values) else float("nan")

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def timed_ms(action: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    began = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - began)
