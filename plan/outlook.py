"""All that `plan` prints about one model on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retnet_export.plan.calibration import Observation, calibrate
from retnet_export.plan.devices import FORMAT_FLOOR, DeviceSpec, parse_capability
from retnet_export.plan.prediction import MEASUREMENTS, Prediction, predict
from retnet_export.plan.preflight import largest_batch, needed_bytes
from retnet_export.plan.sizes import Sizes
from retnet_export.runtime.backends import registered
from retnet_export.runtime.bundle.anatomy import Anatomy


@dataclass(frozen=True)
class Outlook:
    """A model on a device.

    Attributes:
        fits: whether it runs there at all.
        why_not: why not.
        at_rest, at_peak: bytes of memory, the runtime's own included in the peak.
        largest_batch: sequences that fit together.
        prediction: how fast.
        basis: what the prediction rests on.
    """

    fits: bool
    why_not: str | None
    at_rest: float
    at_peak: float
    largest_batch: int
    prediction: Prediction
    basis: str


def outlook(
    sizes: Sizes,
    device: DeviceSpec,
    batch: int,
    chunk: int,
    formats: Sequence[str],
    step: Anatomy | None = None,
    measured: Sequence[Observation] = (),
) -> Outlook:
    """What to expect.

    Args:
        sizes: the model.
        device: the device.
        batch: sequences that step together.
        chunk: tokens of a prompt that are read at once.
        formats: of its weights and products.
        step: what an engine of TensorRT does in a step, if there is one.
        measured: decode speeds on this very device, which the constants are then fitted to.
    """
    runtime = registered(device.runtime)
    peak = needed_bytes(sizes, batch, chunk, runtime.state_sets)
    why_not = None
    for name in formats:
        floor = FORMAT_FLOOR.get(name)
        if device.compute_capability is not None and floor is not None and parse_capability(device.compute_capability) < floor:
            why_not = f"{name} needs compute capability {floor[0]}.{floor[1]}, this GPU has {device.compute_capability}"
    if peak > device.usable_bytes:
        why_not = f"it needs {peak / 1e9:.2f} GB at batch {batch}, {device.usable_bytes / 1e9:.2f} are usable"
    counted = device.runtime == "tensorrt" and step is not None
    constants = calibrate(measured, device) if measured else None
    rows = sum(row.backend == device.runtime for row in measured) or sum(row.runtime == device.runtime for row in MEASUREMENTS)
    base = "a roofline fitted to reports from this device" if measured else runtime.basis
    return Outlook(
        fits=why_not is None,
        why_not=why_not,
        at_rest=sizes.memory_at_rest(batch, state_sets=runtime.state_sets),
        at_peak=peak,
        largest_batch=largest_batch(sizes, device.usable_bytes, chunk, runtime.state_sets),
        prediction=predict(sizes, device, batch, step if counted else None, constants),
        basis=f"{base} ({rows} figures){', with bytes and kernels counted in the engine' if counted else ''}",
    )
