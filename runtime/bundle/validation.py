"""What a manifest must satisfy beyond its field types, before anything is allocated or run.

Rule: everything a host does with a manifest (names it opens, sizes it allocates, inputs it binds) is checked here, against
the other fields and against the sizes of the files. A manifest is untrusted: it may be damaged, or written by anyone.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from retnet_export.runtime.backends.base import NUMPY_DTYPES
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.manifest import Dialect, GraphSpec, Manifest, is_in_pieces
from retnet_export.runtime.errors import UserError

LARGEST_SIZE = 2**31 - 1
"""Of one axis of a tensor."""
LARGEST_CHUNK = 2**16
LARGEST_STATE_BYTES = 2**37
"""Of one sequence: 500 times the state of the largest published RetNet."""


def check_manifest(manifest: Manifest, manifest_name: str) -> None:
    """Compare the parts of a manifest with one another.

    Args:
        manifest: its fields have the right types.
        manifest_name: the name of the manifest's own file, which it must not list.

    Raises:
        UserError: they contradict one another, or ask for something absurd.
    """
    for name in manifest.files:
        _check_name(name, manifest_name)
    for graph_name in ("decode", "prefill"):
        if graph_name not in manifest.graphs:
            raise UserError(f"the bundle has no {graph_name} graph; export the checkpoint again")
    named = [(f"graphs.{name}.file", graph.file) for name, graph in manifest.graphs.items()]
    if manifest.tokenizer is not None:
        named += [("tokenizer", name) for name in manifest.tokenizer.files]
    for where, name in named:
        if name not in manifest.files:
            raise UserError(f"{where} is {name!r}, which is not among the bundle's files")
    _check_model(manifest)
    for name, graph in manifest.graphs.items():
        _check_graph(name, graph, manifest)
    _check_state(manifest)


def _check_name(name: str, manifest_name: str) -> None:
    plain = PurePosixPath(name)
    if (
        plain.is_absolute()
        or ".." in plain.parts
        or str(plain) != name
        or name in (".", manifest_name)
        or any(character in name for character in "\\:\0")
    ):
        raise UserError(f"the file name {name!r} is not a plain name inside the bundle")


def _check_model(manifest: Manifest) -> None:
    config = manifest.model
    stored = sum(record.bytes for record in manifest.files.values())
    if parameters_at_least(config) > 8 * stored:
        raise UserError(
            f"the model configuration has at least {parameters_at_least(config):,} parameters, "
            f"which the {stored:,} bytes of the bundle's files cannot hold"
        )
    prefix = () if manifest.tokenizer is None else manifest.tokenizer.prefix_ids
    if outside := [token for token in (*manifest.eos_ids, *prefix) if not 0 <= token < config.vocab_size]:
        raise UserError(f"token {outside[0]}, which begins or ends a text, is not in the vocabulary of {config.vocab_size}")


def parameters_at_least(config: ModelConfig) -> int:
    """Parameters of the largest matrices, which every family has."""
    projections = config.hidden_size * (config.key_size + config.value_size)
    feed_forward = config.hidden_size * config.ffn_size
    return config.vocab_size * config.hidden_size + config.num_layers * (projections + feed_forward)


def _check_graph(name: str, graph: GraphSpec, manifest: Manifest) -> None:
    inputs, outputs = {spec.name for spec in graph.inputs}, {spec.name for spec in graph.outputs}
    if len(inputs) != len(graph.inputs) or len(outputs) != len(graph.outputs):
        raise UserError(f"graph {name!r} names an input or output twice")
    if not 1 <= graph.chunk_size <= LARGEST_CHUNK:
        raise UserError(f"graph {name!r}: chunk_size is {graph.chunk_size}, expected 1 to {LARGEST_CHUNK}")
    for spec in (*graph.inputs, *graph.outputs):
        if not spec.shape or any(size != -1 and not 1 <= size <= LARGEST_SIZE for size in spec.shape):
            raise UserError(f"graph {name!r}: {spec.name} has the shape {list(spec.shape)}; sizes are 1 or more, or -1 for any")
    tokens = graph.inputs[0] if graph.inputs else None
    if tokens is None or (tokens.name, tokens.dtype, len(tokens.shape)) != ("tokens", "int64", 2):
        raise UserError(f"graph {name!r}: its first input is not 'tokens', int64 with two axes")
    logits = next((spec for spec in graph.outputs if spec.name == "logits"), None)
    if logits is None or (logits.dtype, logits.shape[-1]) != ("float32", manifest.model.vocab_size):
        raise UserError(f"graph {name!r}: it has no output 'logits', float32 with {manifest.model.vocab_size} columns")
    if name == "prefill":
        rows = next((spec for spec in graph.inputs if spec.name == "rows"), None)
        if rows is None or (rows.dtype, len(rows.shape), len(logits.shape)) != ("int64", 2, 3):
            raise UserError(
                "graph 'prefill': expected an input 'rows', int64 with two axes, and 'logits' with three; "
                "an older version wrote this bundle: export the checkpoint again"
            )


def _same_state(graph: tuple[int, ...], state: tuple[int, ...], dialect: Dialect) -> bool:
    """Whether a graph's state is the host's: of the same shape, or, in the CPU's dialect, in pieces of its heads."""
    return graph == state or (dialect == "onnxruntime-cpu" and graph[0] == state[0] and is_in_pieces(graph[1:], state[1:]))


def _heads_together(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a layer's state whose heads lie in several tensors (a mixed state), or (): they do not go together."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len({shape[1:] for shape in shapes}) == 1 else ()


def _check_state(manifest: Manifest) -> None:
    if len({spec.input for spec in manifest.state}) != len(manifest.state):
        raise UserError("the state names a tensor twice")
    for spec in manifest.state:
        if spec.dtype not in NUMPY_DTYPES or not -LARGEST_SIZE <= spec.initial <= LARGEST_SIZE:
            raise UserError(
                f"state {spec.input!r} is {spec.dtype} and begins with {spec.initial}; "
                f"expected one of {', '.join(NUMPY_DTYPES)} and a number of 32 bits"
            )
        if not spec.shape or -1 in spec.shape[1:]:
            raise UserError(f"state {spec.input!r} has the shape {list(spec.shape)}; only the batch, the first axis, may be any")
        for graph_name, graph in manifest.graphs.items():
            for kind, name, specs in (("input", spec.input, graph.inputs), ("output", spec.output, graph.outputs)):
                found = next((candidate for candidate in specs if candidate.name == name), None)
                if found is None or found.dtype != spec.dtype or not _same_state(found.shape, spec.shape, manifest.dialect):
                    raise UserError(
                        f"state {spec.input!r} is {spec.dtype}{list(spec.shape)}, but graph {graph_name!r} has "
                        + (f"no {kind} {name!r}" if found is None else f"{kind} {name!r} as {found.dtype}{list(found.shape)}")
                    )
    if not any((spec.input, spec.dtype, len(spec.shape)) == ("position", "int64", 1) for spec in manifest.state):
        raise UserError("the state has no 'position', int64 with one axis")
    config = manifest.model
    expected = (config.num_heads, config.head_key_dim, config.head_value_dim)
    allowed = [expected]
    if manifest.dialect == "onnxruntime-cuda":  # its operator wants a head's state the other way round
        allowed.append((config.num_heads, config.head_value_dim, config.head_key_dim))
    layers: dict[str, list[tuple[int, ...]]] = {}
    for spec in manifest.state:
        if spec.input.startswith("state."):
            layers.setdefault(spec.input.split(".")[1], []).append(spec.shape[1:])
    if len(layers) != config.num_layers or any(_heads_together(shapes) not in allowed for shapes in layers.values()):
        found_shapes = sorted({shape for shapes in layers.values() for shape in shapes})
        raise UserError(
            f"the state has {len(layers)} layers of shapes {found_shapes} a sequence, "
            f"the model configuration asks for {config.num_layers} of {expected}"
        )
    if manifest.state_bytes > LARGEST_STATE_BYTES:
        raise UserError(f"the state of a sequence is {manifest.state_bytes:,} bytes, expected at most {LARGEST_STATE_BYTES:,}")
