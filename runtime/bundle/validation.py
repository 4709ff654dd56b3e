"""What a manifest must satisfy beyond its field types, before anything is allocated or run.

Rule: everything a host does with a manifest (names it opens, sizes it allocates, inputs it binds) is checked here, against
the other fields and against the sizes of the files. A manifest is untrusted: it may be damaged, or written by anyone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath

from retnet_export.runtime.backends.base import NUMPY_DTYPES
from retnet_export.runtime.bundle.manifest import PORTABLE, POSITION, GraphSpec, Manifest, StateSpec, state_specs
from retnet_export.runtime.bundle.weights import parameters
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
    _check_variants(manifest)
    graphs = _graphs(manifest)
    named = [(f"the file of graph {name!r}", graph.file) for name, graph in graphs.items()]
    if manifest.tokenizer is not None:
        named += [("tokenizer", name) for name in manifest.tokenizer.files]
    for where, name in named:
        if name not in manifest.files:
            raise UserError(f"{where} is {name!r}, which is not one of the bundle's files")
    _check_model(manifest)
    for name, graph in graphs.items():
        _check_graph(name, graph, manifest)
    _check_state(manifest)


def _check_variants(manifest: Manifest) -> None:
    if PORTABLE not in manifest.variants:
        raise UserError(f"the bundle has no {PORTABLE} graphs; export the checkpoint again")
    for name, variant in manifest.variants.items():
        if set(variant.graphs) != {"decode", "prefill"}:
            found = ", ".join(variant.graphs) or "none"
            raise UserError(f"the graphs of variant {name!r} are {found}, expected decode and prefill; export the checkpoint again")
        if (variant.needs is None) != (name == PORTABLE):
            raise UserError(
                f"variant {name!r} {'needs nothing' if variant.needs is None else 'has needs'}; only {PORTABLE!r} has none"
            )
        if variant.needs is not None and re.fullmatch(r"\d{1,4}\.\d{1,4}", variant.needs.onnxruntime) is None:
            raise UserError(f"variant {name!r} needs ONNX Runtime {variant.needs.onnxruntime!r}, expected a version like 1.25")


def _graphs(manifest: Manifest) -> dict[str, GraphSpec]:
    """All graphs, those of a variant other than the portable one under "variant/graph"."""
    return {
        graph if name == PORTABLE else f"{name}/{graph}": spec
        for name, variant in manifest.variants.items()
        for graph, spec in variant.graphs.items()
    }


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
    if parameters(config) > 8 * stored:
        raise UserError(
            f"the model configuration has {parameters(config):,} parameters, which the {stored:,} bytes of the bundle's files "
            "cannot hold"
        )
    prefix = () if manifest.tokenizer is None else manifest.tokenizer.prefix_ids
    if outside := [token for token in (*manifest.eos_ids, *prefix) if not 0 <= token < config.vocab_size]:
        raise UserError(f"token {outside[0]}, which begins or ends a text, is not in the vocabulary of {config.vocab_size}")


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


def _check_state(manifest: Manifest) -> None:
    """The state is what the model configuration asks for, and every graph has it, in the layout that it declares."""
    if len({spec.input for spec in manifest.state}) != len(manifest.state):
        raise UserError("the state names a tensor twice")
    for spec in manifest.state:
        if spec.dtype not in NUMPY_DTYPES or not -LARGEST_SIZE <= spec.initial <= LARGEST_SIZE:
            raise UserError(
                f"state {spec.input!r} is {spec.dtype} and begins with {spec.initial}; "
                f"expected one of {', '.join(NUMPY_DTYPES)} and a number of 32 bits"
            )
    _check_specs(manifest)
    for name, graph in _graphs(manifest).items():
        _check_state_of_graph(name, graph, manifest)
    for name, variant in manifest.variants.items():
        if variant.graphs["decode"].state_layout != variant.graphs["prefill"].state_layout:
            raise UserError(f"the graphs of variant {name!r} keep the state differently; they must be able to share it")
        if variant.graphs["prefill"].chunk_size != manifest.graphs["prefill"].chunk_size:
            raise UserError(f"variant {name!r} reads other chunks than the {PORTABLE} graphs")
    if manifest.state_bytes > LARGEST_STATE_BYTES:
        raise UserError(f"the state of a sequence is {manifest.state_bytes:,} bytes, expected at most {LARGEST_STATE_BYTES:,}")


def _check_specs(manifest: Manifest) -> None:
    config = manifest.model
    layers = [spec for spec in manifest.state if spec.layer is not None]
    if len(layers) != config.num_layers or len(manifest.state) != config.num_layers + 1:
        raise UserError(
            f"the state has {len(layers)} layers and {len(manifest.state) - len(layers)} tensors more, "
            f"the model configuration asks for {config.num_layers} and {POSITION!r}"
        )
    batch = manifest.state[0].shape[0] if manifest.state[0].shape else -1
    for found, expected in zip(manifest.state, state_specs(config, layers[0].dtype, None if batch == -1 else batch), strict=True):
        if replace(found, initial=0) != expected:
            raise UserError(f"the state has {_described(found)}; the model configuration asks for {_described(expected)}")


def _described(spec: StateSpec) -> str:
    place = "" if spec.layer is None else f" of layer {spec.layer}"
    return f"{spec.input!r}{place} (after a step {spec.output!r}), {spec.dtype}{list(spec.shape)} over {', '.join(spec.axes)}"


def _check_state_of_graph(name: str, graph: GraphSpec, manifest: Manifest) -> None:
    layout = graph.state_layout
    if not layout.is_valid or manifest.model.head_value_dim % layout.pieces:
        raise UserError(
            f"graph {name!r}: its state_layout is {list(layout.axes)} in {layout.pieces} pieces; expected batch, head, key, value, "
            f"or value before key, and pieces that divide the head_value_dim {manifest.model.head_value_dim}"
        )
    for spec in manifest.state:
        shape = spec.shape if spec.layer is None else layout.shape(spec.shape)
        for kind, tensor, specs in (("input", spec.input, graph.inputs), ("output", spec.output, graph.outputs)):
            found = next((candidate for candidate in specs if candidate.name == tensor), None)
            if found is None or (found.dtype, found.shape) != (spec.dtype, shape):
                raise UserError(
                    f"state {spec.input!r} is {spec.dtype}{list(shape)} in the layout of graph {name!r}, which has "
                    + (f"no {kind} {tensor!r}" if found is None else f"{kind} {tensor!r} as {found.dtype}{list(found.shape)}")
                )
