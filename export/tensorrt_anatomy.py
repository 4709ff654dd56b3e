"""From the layers of an engine to the bytes that a run moves, and the bytes that every engine must move.

Rule: every tensor that a kernel reads or writes crosses memory once in that kernel. A cache may spare some of that; weights and
state are far larger than any. Constants are what is read and written by no kernel and is no input; a table that is gathered from
counts with the rows that are taken; a state is what has the size of a layer's state, whatever its name, so that a copy shows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from retnet_export.export.tensorrt_layers import (
    NO_KERNEL,
    Layer,
    Tensor,
    UnreadableLayersError,
    layers_of_inspector,
    layers_of_log,
)
from retnet_export.export.tensorrt_network import largest_batch
from retnet_export.plan.sizes import sizes_of_bundle
from retnet_export.runtime.backends.tensorrt_api import make_logger
from retnet_export.runtime.bundle.anatomy import Anatomy, Excess
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import EnginePart, GraphRole, open_shape

Source = Literal["builder's log", "engine inspector"]
SHOWN = 5
"""How many things above the floor are recorded."""


@dataclass(frozen=True)
class Reading:
    """What could be read of an engine, and why not the rest."""

    found: tuple[Anatomy, ...]
    missing: str | None


def read_anatomy(
    module: Any,
    bundle: Bundle,
    parts: Sequence[EnginePart],
    log: Sequence[str],
    tables: Mapping[str, int],
    engine: memoryview | None,
    max_batch: int,
) -> Reading:
    """The anatomy of an engine's decode and prefill, for one sequence: of one token, and of a full chunk.

    Args:
        module: TensorRT's.
        bundle: what the engine was built from.
        parts: of this engine.
        log: lines of the builder's verbose log.
        tables: as in `anatomy`.
        engine: the engine's content where this machine has the GPU for it, so that its inspector can be asked.
        max_batch: the most sequences that it was built for.
    """
    found, missing = [], []
    for role, tokens in (("decode", 1), ("prefill", bundle.manifest.graphs["prefill"].chunk_size)):
        # Of several that take this many tokens the one for this number alone, whose sizes are all known.
        fitting = [part for part in parts if part.role == role and part.min_tokens <= tokens <= part.max_tokens]
        if not fitting:
            continue
        part = min(fitting, key=lambda part: part.max_tokens - part.min_tokens)
        try:
            layers, source = _layers(module, bundle, part, log, engine, tokens, max_batch)
            found.append(anatomy(layers, bundle, part.role, profile=part.profile, tokens=tokens, tables=tables, source=source))
        except UnreadableLayersError as error:
            missing.append(f"{role}: {error}")
    return Reading(tuple(found), "; ".join(missing) or None)


def _layers(
    module: Any, bundle: Bundle, part: EnginePart, log: Sequence[str], engine: memoryview | None, tokens: int, max_batch: int
) -> tuple[list[Layer], Source]:
    if engine is not None:
        try:
            return layers_of_inspector(inspect(module, bundle, part, engine, tokens)), "engine inspector"
        except UnreadableLayersError:
            pass  # the log says the same of sizes that are fixed
    # A step's open sizes are all 1. Those of a chunk may be a batch, or a batch of tokens in a row, and the log does not say which.
    if tokens > 1 and (part.min_tokens < tokens or largest_batch(bundle.manifest.graphs[part.graph], max_batch) > 1):
        raise UnreadableLayersError(
            "the log leaves sizes of a chunk open, as this engine does; one for single sequences leaves none open"
        )
    return layers_of_log(log), "builder's log"


def inspect(module: Any, bundle: Bundle, part: EnginePart, content: memoryview, tokens: int) -> str:
    """What TensorRT's inspector says of a part at one sequence of so many tokens, as JSON, with no size left open."""
    from retnet_export.runtime.device import cuda

    logger = make_logger(module)
    engine = module.Runtime(logger).deserialize_cuda_engine(content)
    context = None if engine is None else engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    if engine is None or context is None:
        raise UnreadableLayersError(f"the engine does not load here: {logger.errors[-1] if logger.errors else 'no reason given'}")
    stream = cuda.Stream()
    context.set_optimization_profile_async(part.profile, stream.handle)
    stream.synchronize()
    for name, spec in bundle.manifest.graphs.items():
        idle = name != part.graph
        if idle and not part.prefix:
            continue
        prefix = f"{name}." if part.prefix else ""
        for tensor in spec.inputs:
            shape = open_shape(tensor, 0 if idle else 1, 1 if idle else tokens)
            if not context.set_input_shape(prefix + tensor.name, shape):
                raise UnreadableLayersError(f"the engine does not take {tensor.name} of shape {shape}")
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    answer: str = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    return answer


def anatomy(
    layers: Sequence[Layer],
    bundle: Bundle,
    role: GraphRole,
    *,
    profile: int,
    tokens: int,
    open_size: int = 1,
    tables: Mapping[str, int],
    source: Source,
) -> Anatomy:
    """Count one run of one sequence.

    Args:
        layers: of the whole engine.
        bundle: what it was built from.
        role: decode or prefill.
        profile: its optimization profile.
        tokens: read in the run.
        open_size: what the sizes are that the build leaves open: the batch, and in decode the tokens.
        tables: rows of the constants that a Gather reads, by the Gather's name.
        source: where `layers` come from.
    """
    config = bundle.manifest.model
    state_elements = config.num_heads * config.head_key_dim * config.head_value_dim
    here = [layer for layer in layers if layer.profile == profile and layer.kind not in NO_KERNEL and _runs(layer)]
    written = {tensor.name for layer in here for tensor in layer.outputs}
    sums: Counter[str] = Counter()
    above: Counter[str] = Counter()
    seen: set[str] = set()
    for layer in here:
        what, operators = _what(layer), {_operator(name) for name in layer.operators}
        for tensor, output in {(tensor.name, output): (tensor, output) for tensor, output in _tensors(layer)}.values():
            elements = tensor.elements(open_size)
            if min(tensor.dims, default=0) < 0 and elements == config.head_key_dim * config.head_value_dim:
                elements *= config.num_heads  # a product over heads has made one open size of batch and heads
            size, first = elements * tensor.item_bytes, tensor.name not in seen
            seen.add(tensor.name)
            named_state = re.search(r"state\.\d+(_out)?(?= \[profile|$)", tensor.name) is not None
            # In a chunk, other tensors may happen to have a state's size.
            alike = tokens == 1 and elements == state_elements and not _constant(tensor, written)
            if named_state or alike:
                sums["state"] += round(size)
                needed = named_state and first
            elif not output and _constant(tensor, written):
                rows = next((rows for name, rows in tables.items() if name in operators and tensor.dims[:1] == (rows,)), None)
                size = size if rows is None else size * tokens / rows
                sums["weights"] += round(size)
                needed = first
            else:
                sums["other"] += round(size)
                needed = re.search(r"(^|\.)(logits|tokens|position|length|rows)", tensor.name) is not None
            if not needed:
                above[what] += round(size)
    sizes = sizes_of_bundle(bundle.manifest)
    floor = sizes.bytes_per_step(1) + (tokens - 1) * sizes.embedding_bytes / config.vocab_size + 4 * config.vocab_size
    return Anatomy(
        role=role,
        tokens=tokens,
        kernels=len(here),
        layers=config.num_layers,
        weight_bytes=sums["weights"],
        state_bytes=sums["state"],
        other_bytes=sums["other"],
        state_passes=round(sums["state"] / sizes.state_bytes, 3),
        floor_bytes=round(floor),
        excess=tuple(Excess(what, size) for what, size in above.most_common(SHOWN)),
        source=source,
    )


def _runs(layer: Layer) -> bool:
    """Whether a layer of this profile has anything to do: one whose outputs are all empty has not."""
    return not layer.outputs or any(0 not in tensor.dims for tensor in layer.outputs)


def _tensors(layer: Layer) -> list[tuple[Tensor, bool]]:
    return [(tensor, False) for tensor in layer.inputs] + [(tensor, True) for tensor in layer.outputs]


def _constant(tensor: Tensor, written: set[str]) -> bool:
    io = re.search(r"(^|\.)(tokens|position|length|rows|state\.\d+)( \[profile \d+\])?$", tensor.name)
    return tensor.name not in written and io is None


def _what(layer: Layer) -> str:
    """The graph's operators that a kernel does, the same for all layers of the model; TensorRT's name where it gives none."""
    joined = sorted({re.sub(r"\blayers\.\d+\.", "layers.*.", _operator(name)) for name in layer.operators})
    if not joined:
        return re.sub(r"_myl\d+_\d+$", "", layer.name)
    return joined[0] if len(joined) == 1 else f"{joined[0]} and {len(joined) - 1} more"


def _operator(name: str) -> str:
    """The name of a node in the bundle's graph."""
    return re.sub(r"^(decode|prefill)\.", "", re.sub(r" \[profile \d+\]", "", name))
