"""Bundle in, engine out: both graphs parsed as strongly typed networks and built for one or more GPUs.

Decode and prefill share one engine. Both are `prefill.onnx`, once with a profile around one token and once around a full chunk:
TensorRT keeps one copy of the weights for all profiles of an engine, and two engines cannot share any. The decode profile
allows two tokens where it needs one, because a profile without any free size makes TensorRT lay the weights out a second
time. Measured: docs/tensorrt.md.

What a step needs on the host are a few candidates, not the vocabulary: a TopK over the logits is added to the network.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retnet_export.export.tensorrt_network import Profile, add_candidates, optimization_profile, parse, parser_message
from retnet_export.export.tensorrt_progress import Progress, make_monitor, run_cancellable
from retnet_export.plan.preflight import check_build
from retnet_export.runtime.backends.tensorrt_api import TARGETS, load_module, make_logger, version_of
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import (
    FORMAT_VERSION,
    EnginePart,
    EngineRecord,
    engine_stem,
    sources_of,
    write_engines,
)
from retnet_export.runtime.bundle.files import sha256_of_bytes, write_atomically
from retnet_export.runtime.bundle.manifest import FileRecord
from retnet_export.runtime.errors import UserError, one_of

if TYPE_CHECKING:
    import tensorrt as trt

MAX_CANDIDATES = 3840
"""The largest k of TensorRT's TopK."""


@dataclass(frozen=True)
class CompileOptions:
    """What `retnet-export compile` decides.

    Attributes:
        target: "tensorrt" or "tensorrt-rtx".
        compute_capabilities: GPUs to build for, "8.6"; empty: this machine's. Only tensorrt-rtx builds for absent GPUs.
        max_batch: the most sequences that step together.
        candidates: how many of the largest logits a step picks on the device; 0 adds no TopK.
        workspace_mb: scratch memory that tactics may use; TensorRT's choice (all of the device's) when None.
        timing_cache: a file that keeps what tactics cost, so that the next build is quicker.
        separate: decode.onnx and prefill.onnx as an engine each; a leaner decode step, and the weights twice.
    """

    target: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt"
    compute_capabilities: tuple[str, ...] = ()
    max_batch: int = 1
    candidates: int = 64
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    separate: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"--target is {self.target!r}, expected {one_of(TARGETS)}")
        if self.max_batch < 1:
            raise UserError(f"--max-batch is {self.max_batch}, expected at least 1")
        if not 0 <= self.candidates <= MAX_CANDIDATES:
            raise UserError(f"--candidates is {self.candidates}, expected 0 to {MAX_CANDIDATES}")
        known = TARGETS[self.target].capabilities
        if self.timing_cache is not None and known is not None:
            raise UserError(
                f"--timing-cache: {self.target} times no kernels when it builds, so there is nothing to keep; leave it out"
            )
        for capability in self.compute_capabilities:
            if known is None:
                raise UserError(
                    f"--compute-capability {capability}: {self.target} builds for the GPU of the machine it runs on; "
                    "leave the option out and compile on the device, or take --target tensorrt-rtx for an RTX GPU"
                )
            if capability not in known:
                raise UserError(
                    f"--compute-capability {capability}: {self.target} builds for {', '.join(known)}"
                    + (
                        "; Jetson Orin (8.7) and Thor (11.0) need --target tensorrt on the device"
                        if capability in ("8.7", "11.0")
                        else ""
                    )
                )


@dataclass(frozen=True)
class _Plan:
    """One engine to build: a graph and its profiles."""

    graph: str
    file: str
    profiles: tuple[Profile, ...]


def compile_bundle(bundle: Bundle, options: CompileOptions, *, progress: Progress = lambda stage, share: None) -> EngineRecord:
    """Build the engines of a bundle and put them into its folder `engines/`.

    Args:
        bundle: the bundle, in the portable dialect.
        options: for what, and how.
        progress: is told the phase and the share done.

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
    stem = engine_stem(options.target, module.__version__, capabilities)
    began = time.perf_counter()
    parts: list[EnginePart] = []
    engines: dict[str, memoryview] = {}
    weights_bytes = 0
    plans = _plans(bundle, stem, options.separate)
    for index, plan in enumerate(plans):

        def update(stage: str, share: float, index: int = index) -> None:
            progress(stage, (index + share) / len(plans))

        built = _build(module, bundle, plan, capabilities, options, update)
        engines[plan.file] = built.content
        weights_bytes += built.weights_bytes
        parts += [
            EnginePart(profile.role, plan.graph, plan.file, number, profile.max_tokens, built.activation_bytes[number])
            for number, profile in enumerate(plan.profiles)
        ]
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
        weights_bytes=weights_bytes,
        sources=sources_of(bundle),
        files={name: FileRecord(content.nbytes, sha256_of_bytes(content)) for name, content in engines.items()},
        build_seconds=round(time.perf_counter() - began, 3),
    )
    write_engines(bundle, record, engines)
    progress("done", 1.0)
    return record


def _plans(bundle: Bundle, stem: str, separate: bool) -> tuple[_Plan, ...]:
    chunk = bundle.manifest.graphs["prefill"].chunk_size
    prefill = Profile("prefill", chunk, chunk)
    if separate:
        return (
            _Plan("decode", f"{stem}-decode.engine", (Profile("decode", 1, 1),)),
            _Plan("prefill", f"{stem}-prefill.engine", (prefill,)),
        )
    return (_Plan("prefill", f"{stem}.engine", (Profile("decode", 1, min(2, chunk)), prefill)),)


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
                    "name the GPUs: --compute-capability 8.6"
                    if TARGETS[options.target].capabilities
                    else "compile on the device itself, or take --target tensorrt-rtx for an RTX GPU"
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


def _build(
    module: Any, bundle: Bundle, plan: _Plan, capabilities: Sequence[str], options: CompileOptions, progress: Progress
) -> _Built:
    logger = make_logger(module)
    # TensorRT-RTX's classes are those of TensorRT, so that the type stubs of the one check our calls of both.
    builder: trt.Builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = bundle.manifest.graphs[plan.graph]
    path = bundle.file(graph.file)
    parser: trt.OnnxParser = module.OnnxParser(network, logger)
    if not parse(parser, bundle, path):
        raise UserError(parser_message(path, parser, options.target, module.__version__))
    if options.candidates:
        add_candidates(module, network, min(options.candidates, bundle.manifest.model.vocab_size))
    config = builder.create_builder_config()
    # TF32 rounds float32 products to 11 bits. A step is bound by memory and gains nothing from it.
    config.clear_flag(module.BuilderFlag.TF32)
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if TARGETS[options.target].capabilities is not None:
        rtx_config: Any = config  # which has these two members more
        rtx_config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            rtx_config.set_compute_capability(getattr(module.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
    for profile in plan.profiles:
        config.add_optimization_profile(optimization_profile(builder, graph, profile, options.max_batch))
    cache = _load_timing_cache(config, options.timing_cache)
    monitor = make_monitor(module, progress)
    config.progress_monitor = monitor
    serialized = run_cancellable(lambda: builder.build_serialized_network(network, config), monitor)
    if serialized is None:
        raise UserError(f"{path}: {options.target} {module.__version__} could not build the engine: {_last(logger.errors)}")
    if cache is not None and options.timing_cache is not None:
        write_atomically(options.timing_cache, memoryview(config.get_timing_cache().serialize()))
    weights = [int(size) for line in logger.report for size in re.findall(r"Total Weights Memory: (\d+) bytes", line)]
    activations = [int(size) for line in logger.report for size in re.findall(r"Total Activation Memory: (\d+) bytes", line)]
    activations += [0] * (len(plan.profiles) - len(activations))  # a release that does not report them
    return _Built(memoryview(serialized), sum(weights), tuple(activations[: len(plan.profiles)]))


def _last(errors: Sequence[str]) -> str:
    return errors[-1] if errors else "it gave no reason"


def _load_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    if path is None:
        return None
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path}: the timing cache cannot be read: {error.strerror}") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise UserError(f"{path}: not a timing cache of this TensorRT on this GPU; delete it, and it is made anew")
    return cache
