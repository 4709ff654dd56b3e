"""A graph too large for memory, run a layer at a time: each layer reads the whole text before the next one is loaded.

A layer of a RetNet needs nothing of later layers, and only the residual stream of the one before it. So the graph is cut
where that stream passes from layer to layer; each piece keeps the nodes and weights of the bundle as they are, and what the
pieces compute one after another is what the whole graph computes, in a layer's worth of memory.

    tokens ─ [embedding, layer 0] ─ x (every chunk) ─ [layer 1] ─ x ─ … ─ [layer L-1] ─ x ─ [norm, head] ─ logits
                state.0 ↺                          state.1 ↺          state.L-1 ↺
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import initial_state
from retnet_export.runtime.backends.onnxruntime_api import check_computes, read_weights_from
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Array = NDArray[np.generic]
WEIGHTS = "weights.bin"


def logits_by_layer(
    bundle: Bundle,
    graph: str,
    tokens: NDArray[np.int64],
    *,
    threads: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> NDArray[np.float32]:
    """Run one of a bundle's graphs on ONNX Runtime, a layer at a time.

    Args:
        bundle: the bundle.
        graph: "decode" or "prefill".
        tokens: int64 (T,); they are read as many at a time as the graph takes.
        threads: threads per operator; ONNX Runtime's choice when None.
        progress: told the share done.

    Returns:
        Logits after each run of the graph, (T, V) for decode, (⌈T/C⌉, V) for prefill.

    Raises:
        UserError: ONNX Runtime refuses a piece, or the graph's layers cannot be told apart.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "running a graph layer by layer") from error
    check_computes(bundle.manifest, bundle.path)
    spec, manifest = bundle.manifest.graphs[graph], bundle.manifest
    model = onnx.load(str(bundle.file(spec.file)), load_external_data=False)
    # In the cache of the Hugging Face Hub the bundle's files are links, which ONNX Runtime does not follow out of the folder;
    # `open_bundle` has compared what they lead to with the manifest.
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"):
        entry.value = bundle.file(entry.value).resolve().name
    folder = bundle.file(WEIGHTS).resolve().parent
    layers = manifest.model.num_layers
    streams = _residual_streams(model, layers)
    chunks = np.split(tokens, range(spec.chunk_size, len(tokens), spec.chunk_size))
    feeds: list[dict[str, Array]] = []
    position = 0
    for chunk in chunks:
        feed: dict[str, Array] = {"tokens": chunk[None], "position": np.array([position]), "length": np.array([len(chunk)])}
        feed["rows"] = np.array([[len(chunk) - 1]])
        feeds.append(feed)
        position += len(chunk)
    state = initial_state(manifest.state)
    rows: list[Array] = []
    for piece in range(layers + 1):
        before = [] if piece == 0 else [streams[piece - 1]]
        names = [spec.input for spec in manifest.state if spec.layer == piece]
        wanted = ["logits"] if piece == layers else [streams[piece], *(f"{name}_out" for name in names)]
        session = _session(cut(model, before, wanted), folder, threads)
        taken = {value.name for value in session.get_inputs()}
        carried = {name: state[name] for name in names}
        for feed in feeds:
            results = session.run(wanted, {key: value for key, value in (feed | carried).items() if key in taken})
            if piece == layers:
                rows.append(results[0].reshape(1, -1))
            else:
                feed[streams[piece]], carried = results[0], dict(zip(names, results[1:], strict=True))
                for done in before:
                    del feed[done]
        del session  # before the next piece is loaded: one layer's weights at a time
        progress((piece + 1) / (layers + 1))
    return np.concatenate(rows).astype(np.float32, copy=False)


def cut(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The part of a model that computes `outputs`, with the float32 values `inputs` given instead of computed."""
    import onnx
    from onnx import helper

    producers = {output: node for node in model.graph.node for output in node.output}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    given = {value.name: value for value in model.graph.input}
    declared = given | {value.name: value for value in model.graph.output}
    needed: set[str] = set()
    open_names = list(outputs)
    while open_names:
        name = open_names.pop()
        if name and name not in needed:
            needed.add(name)
            if name in producers and name not in inputs:
                open_names += producers[name].input

    def unknown(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)

    graph = helper.make_graph(
        [node for node in model.graph.node if any(name in needed and name not in inputs for name in node.output)],
        model.graph.name,
        [unknown(name) for name in inputs] + [value for name, value in given.items() if name in needed],
        [declared.get(name, unknown(name)) for name in outputs],
        [tensor for name, tensor in initializers.items() if name in needed],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _residual_streams(model: onnx.ModelProto, layers: int) -> list[str]:
    """The value that leaves each layer: the one that its nodes compute and that nodes outside it, or the next layer, read."""
    scope = {output: _layer(node.name) for node in model.graph.node for output in node.output}
    leaving: list[set[str]] = [set() for _ in range(layers)]
    for node in model.graph.node:
        for name in node.input:
            if (layer := scope.get(name)) is not None and layer != _layer(node.name):
                leaving[layer].add(name)
    if any(len(names) != 1 for names in leaving):
        raise UserError(f"{model.graph.name}: its layers cannot be told apart by the names of its nodes; it cannot be run by layer")
    return [names.pop() for names in leaving]


def _layer(node_name: str) -> int | None:
    """3 for `layers.3.retention.o`, None for a node of no layer."""
    parts = node_name.split(".")
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal() else None


def _session(model: onnx.ModelProto, folder: Path, threads: int | None) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "running a graph layer by layer") from error
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    read_weights_from(folder, options, "running a graph layer by layer")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no narrower base class
        raise UserError(f"{folder}: ONNX Runtime {onnxruntime.__version__} cannot load a layer: {error}") from error
