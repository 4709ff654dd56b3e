"""A graph too large for memory, run a layer at a time: each layer reads the whole text before the next one is loaded.

A layer of a RetNet needs nothing of later layers, and only the residual stream of the one before it. So the graph is cut
where that stream passes from layer to layer; each piece keeps the nodes and weights of the bundle as they are, and what the
pieces compute one after another is what the whole graph computes, in a layer's worth of memory.

    tokens ─ [embedding, layer 0] ─ x (every chunk) ─ [layer 1] ─ x ─ … ─ [layer L-1] ─ x ─ [norm, head] ─ logits
                state.0 ↺                          state.1 ↺          state.L-1 ↺
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import initial_state
from retnet_export.runtime.backends.onnxruntime_api import check_computes
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.errors import MissingExtraError

Array = NDArray[np.generic]
WEIGHTS, PURPOSE = "weights.bin", "running a graph layer by layer"


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
        graph: "decode" or "prefill".
        tokens: int64 (T,); they are read as many at a time as the graph takes.
        threads: threads per operator; ONNX Runtime's choice when None.

    Returns:
        Logits after each run of the graph, (T, V) for decode, (⌈T/C⌉, V) for prefill.

    Raises:
        UserError: ONNX Runtime refuses a piece, or the graph's nodes do not show its layers.
    """
    try:
        from retnet_export.graph.layers import LayerCutter, residual_streams
        from retnet_export.graph.loading import load_graph
    except ImportError as error:
        raise MissingExtraError("onnx-ir", "export", PURPOSE) from error
    check_computes(bundle.manifest, bundle.path)
    spec, manifest = bundle.manifest.graphs[graph], bundle.manifest
    layers = manifest.model.num_layers
    cutter = LayerCutter(load_graph(bundle, spec.file), bundle.file(WEIGHTS).resolve().parent, PURPOSE)
    streams = [str(value.name) for value in residual_streams(cutter.model.graph, layers)]
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
        session = cutter.open(before, wanted, threads)
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
