"""The constants of a device from measurements on it, the reports of scripts/jetson-check.sh.

Rule: only decode speeds count (`tg` tests of `bench`), each with the bytes that its step moves. One model gives one scale for both
constants of the roofline; models of two sizes or more give each constant by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_export.plan.devices import DeviceSpec
from retnet_export.plan.prediction import Fit, features, fit
from retnet_export.runtime.backends import registered
from retnet_export.runtime.errors import UserError

MARK = "retnet-export field report"
FORMAT_VERSION = 1
DISTINCT = 1.5
"""Two models count as of different size if one moves so many times the bytes of the other."""


@dataclass(frozen=True)
class Observation:
    """A decode speed of a report.

    Attributes:
        backend: what ran it.
        layers: the model's.
        matrix_bytes: read at every step.
        state_bytes: of one sequence.
        batch: sequences that stepped together.
        milliseconds: a step.
    """

    backend: str
    layers: int
    matrix_bytes: float
    state_bytes: float
    batch: int
    milliseconds: float

    def bytes_moved(self, runtime: str) -> float:
        """Bytes of a step."""
        return self.matrix_bytes + self.batch * self.state_bytes * registered(runtime).passes(self.batch)


def read_report(path: Path) -> list[Observation]:
    """The decode speeds of a report, from the line of JSON at its end.

    Raises:
        UserError: it cannot be read, or holds no such line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the report: {error}") from error
    for line in reversed(lines):
        if not line.startswith("{"):
            continue
        try:
            document = json.loads(line)
            if document["format"] == MARK:
                if document["format_version"] != FORMAT_VERSION:
                    raise UserError(f"{path}: report format {document['format_version']}, this version reads {FORMAT_VERSION}")
                return [found for bench in document["bench"] if bench for found in _observations(bench)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its line of JSON is damaged ({error!r}); run scripts/jetson-check.sh again") from error
    raise UserError(f"{path}: it has no line of JSON; give a report that scripts/jetson-check.sh wrote")


def _observations(bench: Mapping[str, Any]) -> Iterable[Observation]:
    model = bench["model"]
    for result in bench["results"]:
        if result["new_tokens"] and not result["prompt_tokens"]:
            yield Observation(
                backend=str(result["backend"]),
                layers=int(model["layers"]),
                matrix_bytes=float(model["matrix_bytes"]),
                state_bytes=float(model["state_bytes"]),
                batch=int(result["batch"]),
                milliseconds=1e3 * int(result["batch"]) / float(result["tokens_per_second"]),
            )


def calibrate(observations: Sequence[Observation], device: DeviceSpec) -> Fit:
    """Refit the constants of a device's runtime.

    Args:
        observations: of reports from that device; those of other backends are left out.
        device: the device that they were measured on.

    Raises:
        UserError: none is of the runtime that the planner expects there.
    """
    runtime = device.runtime
    rows = [row for row in observations if row.backend == runtime]
    if not rows:
        found = ", ".join(sorted({row.backend for row in observations})) or "none"
        raise UserError(
            f"the reports have no decode speed of the backend {runtime!r}, "
            f"which the planner expects on {device.name}; found: {found}"
        )
    moved = [row.bytes_moved(runtime) for row in rows]
    table = np.array(
        [features(device.bandwidth_gbs, bytes_, row.layers, row.batch) for bytes_, row in zip(moved, rows, strict=True)]
    )
    times = np.array([row.milliseconds for row in rows])
    known = fit(runtime)
    before = np.array([1 / known.efficiency, known.overhead_ms, known.sequence_overhead_ms])
    constants = before * np.median(times / (table @ before))
    if max(moved) > DISTINCT * min(moved):
        free = np.linalg.lstsq(table / times[:, None], np.ones(len(rows)), rcond=None)[0]
        if free[0] > 0 and (free >= 0).all():  # else the rows contradict the roofline, and one scale is all they bear
            constants = free
    ratios = (table @ constants) / times
    return Fit(1 / constants[0], constants[1], constants[2], float(ratios.min()), float(ratios.max()))
