"""The states among a graph's inputs and outputs, and how the graph says that it keeps them otherwise than (B, H, Dk, Dv).

Rule: a rewrite that changes the layout writes it into the model's metadata, from where it comes into the manifest. A graph without
that metadata keeps its states as (B, H, Dk, Dv).
"""

from __future__ import annotations

import onnx_ir as ir

from retnet_export.graph.inserter import Inserter
from retnet_export.runtime.bundle.layout import AXES, StateLayout
from retnet_export.runtime.bundle.manifest import state_name

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
AXES_KEY, PIECES_KEY = "retnet.state_axes", "retnet.state_pieces"
STEPS_KEY, CHUNKS_KEY = "retnet.steps_in_place", "retnet.chunks_in_place"


def states(graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """Input and output of each layer's state, the first layer first."""
    inputs, outputs = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    names: list[str] = []
    while (name := state_name(len(names))) in inputs:
        names.append(name)
    return [(inputs[name], outputs[f"{name}_out"]) for name in names]


def declare_layout(model: ir.Model, layout: StateLayout) -> None:
    """Say how the model's graph keeps its states."""
    model.metadata_props[AXES_KEY] = ",".join(layout.axes)
    model.metadata_props[PIECES_KEY] = str(layout.pieces)


def layout_of(model: ir.Model) -> StateLayout:
    """What `declare_layout` said."""
    axes = model.metadata_props.get(AXES_KEY, ",".join(AXES)).split(",")
    pieces = int(model.metadata_props.get(PIECES_KEY, "1"))
    return StateLayout(tuple(axis for name in axes for axis in AXES if axis == name), pieces)


def allow_in_place(model: ir.Model, *, chunks: bool = False) -> None:
    """Say that a run of one token for each sequence, or any run, may write the states of the layers where it reads them."""
    model.metadata_props[STEPS_KEY] = "1"
    if chunks:
        model.metadata_props[CHUNKS_KEY] = "1"


def steps_in_place(model: ir.Model) -> bool:
    """Whether `allow_in_place` was called."""
    return model.metadata_props.get(STEPS_KEY) == "1"


def chunks_in_place(model: ir.Model) -> bool:
    """Whether `allow_in_place` was called for chunks."""
    return model.metadata_props.get(CHUNKS_KEY) == "1"


def store_states_as_float16(model: ir.Model) -> None:
    """Keep the states of a graph as float16 between runs, in place: a Cast behind each input and before each output.

    The update stays float32.
    """
    graph = model.graph
    for layer, (value, new) in enumerate(states(graph)):
        scope = f"layers.{layer}.retention"
        up = Inserter(graph, graph.node(0), scope).op("Cast", value, name="state_float32", dtype=FLOAT, to=FLOAT)
        value.replace_all_uses_with(up)
        up.producer().replace_input_with(0, value)  # type: ignore[union-attr]
        value.type = ir.TensorType(FLOAT16)
        stored = Inserter(graph, None, scope).op("Cast", new, name="state_stored", dtype=FLOAT16, to=FLOAT16)
        stored.name, new.name, stored.shape = new.name, f"{scope}.state_after", new.shape
        graph.outputs[graph.outputs.index(new)] = stored
