"""Bundle in, engine out: the graphs in TensorRT's forms, parsed as a strongly typed network and built for one or more GPUs.

Decode and prefill share one engine, because two engines cannot share any weights. Both graphs stand in one network, each with
inputs of its own, and in the optimization profiles of one the other is empty: so a step runs the decode graph's kernels alone. A
small build asks first whether the installed TensorRT takes that; if not, both roles are played by the prefill graph. Measured:
docs/lab/tensorrt.md.

What a step needs on the host are a few candidates, not the vocabulary: a TopK over the logits is added to the network.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retnet_export.export.tensorrt_anatomy import read_anatomy
from retnet_export.export.tensorrt_forms import JOINED, Forms, tensorrt_forms
from retnet_export.export.tensorrt_memory import return_freed_memory
from retnet_export.export.tensorrt_network import (
    NetworkGraph,
    Profile,
    add_candidates,
    builder_config,
    optimization_profile,
    parser_message,
)
from retnet_export.export.tensorrt_probe import ask
from retnet_export.export.tensorrt_progress import make_monitor, run_cancellable
from retnet_export.plan.preflight import check_build
from retnet_export.runtime.backends.tensorrt_api import TARGETS, load_module, make_logger, version_of
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import (
    FORMAT_VERSION,
    EnginePart,
    EngineRecord,
    Form,
    GraphRole,
    Probe,
    engine_stem,
    sources_of,
    write_engines,
)
from retnet_export.runtime.bundle.files import sha256_of_bytes, write_atomically
from retnet_export.runtime.bundle.manifest import FileRecord
from retnet_export.runtime.errors import ArgumentError, UserError, one_of
from retnet_export.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import tensorrt as trt

ROLES: tuple[GraphRole, ...] = ("decode", "prefill")
MAX_CANDIDATES = 3840
"""The largest k of TensorRT's TopK."""


@dataclass(frozen=True)
class CompileOptions:
    """The options of `retnet-export compile`.

    Attributes:
        target: "tensorrt" or "tensorrt-rtx".
        compute_capabilities: GPUs to build for, "8.6"; empty: this machine's. Only tensorrt-rtx builds for absent GPUs.
        max_batch: the most sequences that step together.
        candidates: how many of the largest logits a step picks on the device; 0 adds no TopK.
        workspace_mb: scratch memory that tactics may use; TensorRT's choice (all of the device's) when None.
        timing_cache: a file that keeps what tactics cost, so that the next build is quicker.
        largest_weight_mb: products with larger weights are cut into several, for a device on which one large allocation fails;
            no limit when None.
        form: how decode and prefill share engines; None: both graphs in one network where this TensorRT takes that, else the
            prefill graph for both.
    """

    target: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt"
    compute_capabilities: tuple[str, ...] = ()
    max_batch: int = 1
    candidates: int = 64
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    largest_weight_mb: int | None = None
    form: Form | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ArgumentError("target", f"is {self.target!r}, expected {one_of(TARGETS)}")
        for name in ("max_batch", "workspace_mb", "largest_weight_mb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(name, f"is {value}, expected at least 1")
        if not 0 <= self.candidates <= MAX_CANDIDATES:
            raise ArgumentError("candidates", f"is {self.candidates}, expected 0 to {MAX_CANDIDATES}")
        known = TARGETS[self.target].capabilities
        if self.timing_cache is not None and known is not None:
            raise ArgumentError(
                "timing_cache",
                f"has no effect: {self.target} does not measure kernels when it builds; omit it",
            )
        for capability in self.compute_capabilities:
            if known is None:
                raise ArgumentError(
                    "compute_capabilities",
                    f"is {capability}, but {self.target} builds for the GPU of the machine it runs on; "
                    "leave it out and compile on the device, or take target=tensorrt-rtx for an RTX GPU",
                )
            if capability not in known:
                raise ArgumentError(
                    "compute_capabilities",
                    f"is {capability}, but {self.target} builds for {', '.join(known)}"
                    + (
                        "; Jetson Orin (8.7) and Thor (11.0) need target=tensorrt on the device"
                        if capability in ("8.7", "11.0")
                        else ""
                    ),
                )


@dataclass(frozen=True)
class _Plan:
    """One engine to build.

    Attributes:
        source: which of the forms' files it is parsed from.
        file: what the engine is called.
        graphs: in that file.
        profiles: of the engine, by number.
    """

    source: str
    file: str
    graphs: tuple[NetworkGraph, ...]
    profiles: tuple[Profile, ...]

    def part(self, number: int, activation_bytes: int) -> EnginePart:
        """What the record says of a profile."""
        profile = self.profiles[number]
        graph = next(each for each in self.graphs if each.role in (None, profile.role))
        name = "prefill" if graph.role is None else profile.role
        return EnginePart(
            profile.role, name, graph.prefix, self.file, number, profile.min_tokens, profile.max_tokens, activation_bytes
        )


def compile_bundle(bundle: Bundle, options: CompileOptions, *, progress: Progress = silent) -> EngineRecord:
    """Build the engines of a bundle and put them into its folder `engines/`.

    Args:
        bundle: the bundle; its portable graphs are compiled.
        options: for what, and how.
        progress: gets the phase and the share done.

    Returns:
        The record that was written beside the engines.

    Raises:
        UserError: TensorRT is missing or too old, the bundle cannot run there, a graph does not parse, or the build fails.
        KeyboardInterrupt: the user gave up; the build was cancelled and nothing was written.
    """
    fixed_batch = bundle.manifest.graphs["decode"].inputs[0].shape[0]
    if fixed_batch != -1:
        options = replace(options, max_batch=fixed_batch)
    module = load_module(options.target)
    capabilities, device = _capabilities(module, options)
    check_build(
        bundle, options.target, version_of(module), capabilities, max_batch=options.max_batch, on_this_gpu=device is not None
    )
    return_freed_memory()
    stem = engine_stem(options.target, module.__version__, capabilities)
    began = time.perf_counter()
    probe = ask(module, capabilities, device is not None, compute=bundle.manifest.precision.compute)
    form: Form = options.form or ("joined" if probe.joined and fixed_batch == -1 else "prefill")
    if form == "joined" and fixed_batch != -1:
        raise UserError(
            f"{bundle.path}: its batch is fixed to {fixed_batch}, so neither graph can be empty while the other runs; "
            "export it without a fixed batch"
        )
    parts: list[EnginePart] = []
    engines: dict[str, memoryview] = {}
    weights_bytes = 0
    plans = _plans(bundle, stem, form)
    largest = None if options.largest_weight_mb is None else options.largest_weight_mb << 20
    with tensorrt_forms(bundle, join=form == "joined", planes=not probe.int8_fused, largest=largest) as forms:
        readings = []
        for index, plan in enumerate(plans):

            def update(stage: str, share: float, index: int = index) -> None:
                progress(stage, (index + share) / len(plans))

            built = _build(module, bundle, forms, plan, capabilities, options, update)
            engines[plan.file] = built.content
            weights_bytes += built.weights_bytes
            made = [plan.part(number, built.activation_bytes[number]) for number in range(len(plan.profiles))]
            parts += made
            readings.append(
                read_anatomy(module, bundle, made, built.layers, forms.tables, built.content if device else None, options.max_batch)
            )
    record = EngineRecord(
        format="retnet-export engine",
        format_version=FORMAT_VERSION,
        target=options.target,
        version=module.__version__,
        compute_capabilities=capabilities,
        device=device,
        max_batch=options.max_batch,
        candidates=min(options.candidates, bundle.manifest.model.vocab_size),
        parts=tuple(parts),
        form=form,
        probe=probe,
        int8=_int8(forms, probe),
        weights_bytes=weights_bytes,
        sources=sources_of(bundle),
        files={name: FileRecord(content.nbytes, sha256_of_bytes(content)) for name, content in engines.items()},
        build_seconds=round(time.perf_counter() - began, 3),
        anatomy=tuple(each for reading in readings for each in reading.found),
        anatomy_missing="; ".join(reading.missing for reading in readings if reading.missing) or None,
    )
    write_engines(bundle, record, engines)
    progress("done", 1.0)
    return record


def _int8(forms: Forms, probe: Probe) -> Literal["none", "planes", "fused", "floats"]:
    if forms.int8 in ("none", "planes"):
        return forms.int8
    return "fused" if probe.int8_fused else "floats"


def _plans(bundle: Bundle, stem: str, form: Form) -> tuple[_Plan, ...]:
    graphs = bundle.manifest.graphs
    chunk = graphs["prefill"].chunk_size
    decode = Profile("decode", 1, 1, 1)
    # A full chunk has kernels of its own: where the number of tokens is open, TensorRT copies operands into padded ones.
    prefill = (Profile("prefill", chunk, chunk, chunk), Profile("prefill", 1, max(1, chunk // 4), chunk))
    if form == "joined":
        both = tuple(NetworkGraph(role, graphs[role], f"{role}.") for role in ROLES)
        return (_Plan(JOINED, f"{stem}.engine", both, (decode, *prefill)),)
    if form == "separate":
        return (
            _Plan("decode", f"{stem}-decode.engine", (NetworkGraph("decode", graphs["decode"]),), (decode,)),
            _Plan("prefill", f"{stem}-prefill.engine", (NetworkGraph("prefill", graphs["prefill"]),), prefill),
        )
    # Two tokens where one is needed: of a profile without a free size TensorRT lays the weights out a second time.
    decode = Profile("decode", 1, 1, min(2, chunk))
    return (_Plan("prefill", f"{stem}.engine", (NetworkGraph(None, graphs["prefill"]),), (decode, *prefill)),)


def _capabilities(module: Any, options: CompileOptions) -> tuple[tuple[str, ...], str | None]:
    """The compute capabilities to build for, and this machine's GPU if it is among them."""
    from retnet_export.runtime.device import cuda

    device: cuda.Device | None = None
    try:
        if cuda.device_count():
            device = cuda.device()
    except UserError:
        device = None  # without cuda-bindings there is no device to look at
    here = None if device is None else f"{device.compute_capability[0]}.{device.compute_capability[1]}"
    wanted = options.compute_capabilities
    if not wanted:
        if here is None or device is None:
            raise UserError(
                f"{options.target}: this machine has no GPU that CUDA can use, so there is nothing to build for; "
                + (
                    "name the GPUs: compute_capabilities=8.6"
                    if TARGETS[options.target].capabilities
                    else "compile on the device itself, or take target=tensorrt-rtx for an RTX GPU"
                )
            )
        wanted = (here,)
        known = TARGETS[options.target].capabilities
        if known is not None and here not in known:
            raise UserError(f"{options.target} does not run on this GPU ({device.name}, {here}); it runs on {', '.join(known)}")
    return tuple(dict.fromkeys(wanted)), device.name if device is not None and here in wanted else None


@dataclass(frozen=True)
class _Built:
    """A serialized engine, and what TensorRT reported of it."""

    content: memoryview
    weights_bytes: int
    activation_bytes: tuple[int, ...]
    layers: tuple[str, ...]


def _build(
    module: Any,
    bundle: Bundle,
    forms: Forms,
    plan: _Plan,
    capabilities: Sequence[str],
    options: CompileOptions,
    progress: Progress,
) -> _Built:
    logger = make_logger(module)
    # TensorRT-RTX's classes are those of TensorRT, so that the type stubs of the one check our calls of both.
    builder: trt.Builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    path = forms.files[plan.source]
    parser: trt.OnnxParser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise UserError(parser_message(bundle.path, parser, options.target, module.__version__))
    if options.candidates:
        add_candidates(module, network, min(options.candidates, bundle.manifest.model.vocab_size))
    config = builder_config(module, builder, capabilities, bundle.manifest.precision.compute)
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    for profile in plan.profiles:
        config.add_optimization_profile(optimization_profile(builder, plan.graphs, profile, options.max_batch))
    cache = _load_timing_cache(config, options.timing_cache)
    monitor = make_monitor(module, progress)
    config.progress_monitor = monitor
    serialized = run_cancellable(lambda: builder.build_serialized_network(network, config), monitor)
    if serialized is None:
        raise UserError(
            f"{bundle.path}: {options.target} {module.__version__} could not build the engine: {_reason(logger.errors)}"
        )
    if cache is not None and options.timing_cache is not None:
        write_atomically(options.timing_cache, memoryview(config.get_timing_cache().serialize()))
    weights = [int(size) for line in logger.report for size in re.findall(r"Total Weights Memory: (\d+) bytes", line)]
    activations = [int(size) for line in logger.report for size in re.findall(r"Total Activation Memory: (\d+) bytes", line)]
    activations += [0] * (len(plan.profiles) - len(activations))  # a release that does not report them
    return _Built(memoryview(serialized), sum(weights), tuple(activations[: len(plan.profiles)]), tuple(logger.layers))


NO_MEMORY = re.compile(r"out.of.memory|outofmemory|allocat|nvmap|insufficient memory", re.IGNORECASE)
"""What TensorRT and the Jetson's driver say when an allocation fails."""


def _reason(errors: Sequence[str]) -> str:
    """Its last words, and what helps if they are of memory."""
    reason = errors[-1] if errors else "it gave no reason"
    if not any(NO_MEMORY.search(error) for error in errors):
        return reason
    return f"{reason}. What to do: close other programs, or cut large weights with largest_weight_mb=64"


def _load_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    if path is None:
        return None
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path}: the timing cache cannot be read: {error.strerror}") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise UserError(f"{path}: not a timing cache of this TensorRT on this GPU; delete it, and it is made again")
    return cache
