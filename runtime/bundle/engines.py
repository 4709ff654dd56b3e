"""Compiled engines of a bundle: their names, their records, and the choice of one for this machine.

    NAME.retnet/engines/
        tensorrt-10.3.0-sm87.engine     decode and prefill as profiles of one engine
        tensorrt-10.3.0-sm87.json       what it was built from, with what, for what: an `EngineRecord`

An engine belongs to one machine, so it is not in the bundle's manifest: it can be deleted or built again at any time. The
record is written last, so that an engine with a record is whole. At load the record is held against the bundle: an engine
built from other graphs or weights is refused.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retnet_export.runtime.bundle.anatomy import Anatomy
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.files import sha256_of, write_atomically
from retnet_export.runtime.bundle.manifest import FileRecord, TensorSpec
from retnet_export.runtime.bundle.schema import encode
from retnet_export.runtime.bundle.seal import read_sealed, sealed
from retnet_export.runtime.errors import UserError

FOLDER = "engines"
FORMAT: Literal["retnet-export engine"] = "retnet-export engine"
FORMAT_VERSION = 3
"""3: the record has a hash of itself."""
GraphRole = Literal["decode", "prefill"]
Form = Literal["joined", "prefill", "separate"]
"""How decode and prefill share engines: both graphs in one network; the prefill graph alone, for one token as well; one each."""
TOP_LOGITS, TOP_TOKENS = "top_logits", "top_tokens"
"""Outputs that compiling adds: the largest logits of each sequence and their tokens, so that a step copies these alone."""


@dataclass(frozen=True)
class EnginePart:
    """What runs decode, or prefill.

    Attributes:
        role: which of the two.
        graph: the graph it was parsed from; "prefill" serves both where TensorRT does not take both in one network.
        prefix: stands before the names of this graph's tensors in the engine: "decode." where both graphs are in it.
        file: the engine, in the folder of engines.
        profile: the number of its optimization profile in that engine.
        min_tokens, max_tokens: tokens per sequence in one run.
        activation_bytes: device memory it needs while it runs, beside weights, state and logits.
    """

    role: GraphRole
    graph: str
    prefix: str
    file: str
    profile: int
    min_tokens: int
    max_tokens: int
    activation_bytes: int


@dataclass(frozen=True)
class Probe:
    """The answers of a small build about the installed TensorRT; None if it was not run, or if the answer cannot be read.

    Attributes:
        joined: whether it takes a network of two graphs of which one is empty in each profile.
        int8_fused: whether it multiplies by INT8 weights without writing them out as floats.
    """

    joined: bool | None
    int8_fused: bool | None


@dataclass(frozen=True)
class EngineRecord:
    """The record of a compiled bundle.

    Attributes:
        target: "tensorrt" or "tensorrt-rtx".
        version: of the product that built it, which must be the one that loads it.
        compute_capabilities: the GPUs it was built for.
        device: the GPU's name if one was present at the build.
        max_batch: the most sequences that step together.
        candidates: how many of the largest logits a step picks on the device.
        parts: decode and prefill; prefill twice where full chunks have a profile of their own.
        form: how they share engines.
        probe: what was asked of this TensorRT before.
        int8: how INT8 weights are read: "none" of them, "planes" of four bits, "fused" as they are, "floats" written at every step.
        weights_bytes: device memory of the weights.
        sources: SHA-256 of each file of the bundle that it was built from.
        files: the engines' own sizes and hashes.
        build_seconds: how long that took.
        anatomy: kernels and bytes of a step and of a chunk.
        anatomy_missing: why one is not there.
    """

    format: Literal["retnet-export engine"]
    format_version: int
    target: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    compute_capabilities: tuple[str, ...]
    device: str | None
    max_batch: int
    candidates: int
    parts: tuple[EnginePart, ...]
    form: Form
    probe: Probe
    int8: Literal["none", "planes", "fused", "floats"]
    weights_bytes: int
    sources: Mapping[str, str]
    files: Mapping[str, FileRecord]
    build_seconds: float
    anatomy: tuple[Anatomy, ...] = ()
    anatomy_missing: str | None = None

    @property
    def stem(self) -> str:
        """The record's name without its ending."""
        return engine_stem(self.target, self.version, self.compute_capabilities)

    def part(self, role: GraphRole, tokens: int = 1) -> EnginePart:
        """What runs so many tokens per sequence: of the parts that can, the one that takes the fewest other numbers."""
        fitting = [part for part in self.parts if part.role == role and part.min_tokens <= tokens <= part.max_tokens]
        return min(fitting, key=lambda part: part.max_tokens - part.min_tokens)

    def anatomy_of(self, role: GraphRole) -> Anatomy | None:
        return next((each for each in self.anatomy if each.role == role), None)


def open_shape(spec: TensorSpec, batch: int, tokens: int, rows: int = 1) -> tuple[int, ...]:
    """An input's shape with its open sizes filled in: the batch on the first axis, on the second tokens or wanted rows."""
    second = rows if spec.name == "rows" else tokens
    return tuple(size if size != -1 else batch if axis == 0 else second for axis, size in enumerate(spec.shape))


def engine_stem(target: str, version: str, capabilities: tuple[str, ...]) -> str:
    """How engines are named: tensorrt-rtx-1.7.1.116-sm86-sm89."""
    return "-".join([target, version, *(f"sm{capability.replace('.', '')}" for capability in capabilities)])


def sources_of(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of the bundle's graphs and weights, as its manifest has them."""
    names = {graph.file for graph in bundle.manifest.graphs.values()} | {"weights.bin"}
    return {name: record.sha256 for name, record in bundle.manifest.files.items() if name in names}


def write_engines(bundle: Bundle, record: EngineRecord, engines: Mapping[str, memoryview]) -> None:
    """Write engines and then their record into the bundle; nothing is left if that fails.

    Args:
        record: its `files` are those of `engines`.
        engines: content by file name.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = bundle.path / FOLDER
    written: list[Path] = []
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"{record.stem}.json").unlink(missing_ok=True)
        for name, content in engines.items():
            written.append(folder / name)
            write_atomically(folder / name, content)
        document = encode(record)
        assert isinstance(document, dict)
        write_atomically(folder / f"{record.stem}.json", sealed(document))
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # which only succeeds if it holds no other engine
        if isinstance(error, OSError):
            raise UserError(f"{folder}: cannot be written: {error.strerror}; no engine was kept") from error
        raise


def read_engines(bundle: Bundle) -> list[EngineRecord]:
    """The records of all engines of a bundle, whether or not they run here."""
    records = []
    for path in sorted((bundle.path / FOLDER).glob("*.json")):
        damaged = "delete it and compile again"
        record = read_sealed(EngineRecord, path, FORMAT, FORMAT_VERSION, damaged, lambda document: "compile again")
        if {part.file for part in record.parts} != set(record.files) or any(Path(name).name != name for name in record.files):
            raise UserError(f"{path}: its engines and their files do not match; compile again")
        records.append(record)
    return records


def find_engine(bundle: Bundle, target: str, version: str, capability: str) -> EngineRecord:
    """The engine of a bundle that this TensorRT can load on this GPU.

    Raises:
        UserError: there is none, or it was built from other graphs; the message says which there are.
    """
    records = read_engines(bundle)
    command = f"retnet-export compile {bundle.path} --target {target}"
    for record in records:
        if record.target == target and record.version == version and capability in record.compute_capabilities:
            if dict(record.sources) != sources_of(bundle):
                raise UserError(
                    f"{bundle.path / FOLDER / record.stem}: built from other graphs or weights than the bundle has now; "
                    f"compile again: {command}"
                )
            return record
    found = ", ".join(record.stem for record in records) or "none"
    raise UserError(
        f"{bundle.path}: no engine for {target} {version} on compute capability {capability} (engines found: {found}); "
        f"compile one: {command}"
    )


def map_engine(bundle: Bundle, record: EngineRecord, name: str, *, check_hash: bool = True) -> mmap.mmap:
    """The content of an engine, mapped: on a device whose memory is shared, no second copy of the weights is held.

    Raises:
        UserError: it is missing or not the file that was recorded.
    """
    path, expected = bundle.path / FOLDER / name, record.files[name]
    if not path.is_file() or path.stat().st_size != expected.bytes or (check_hash and sha256_of(path) != expected.sha256):
        raise UserError(f"{path}: missing, or does not match its record; compile again")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
