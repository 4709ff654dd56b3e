"""A graph cut at the residual stream: what leaves each layer, and sessions of ONNX Runtime over the parts between.

Rule: a part keeps the nodes of the graph as they are, and the weights stay in the bundle's file, of which a session reads
those of its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from retnet_export.graph.variants.element_types import InferElementTypes
from retnet_export.runtime.backends.onnxruntime_api import read_weights_from
from retnet_export.runtime.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    import onnxruntime


def layer_of(node: ir.Node) -> int | None:
    """3 for `layers.3.retention.o`, None for a node of no layer."""
    parts = (node.name or "").split(".")
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal() else None


def residual_streams(graph: ir.Graph, layers: int) -> list[ir.Value]:
    """The value that leaves each layer: the one that its nodes compute and that nodes of other scopes read.

    Raises:
        UserError: a layer has none, or several.
    """
    leaving: list[dict[str, ir.Value]] = [{} for _ in range(layers)]
    for node in graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            layer = None if producer is None else layer_of(producer)
            if value is not None and value.name is not None and layer is not None and layer != layer_of(node):
                leaving[layer][value.name] = value
    if any(len(values) != 1 for values in leaving):
        raise UserError(f"{graph.name}: the names of its nodes do not show its layers, so it cannot run layer by layer")
    return [value for values in leaving for value in values.values()]


class LayerCutter:
    """Opens parts of a graph.

    Args:
        folder: where its weights file is.
        purpose: what the parts are run for, for messages.
    """

    def __init__(self, model: ir.Model, folder: Path, purpose: str) -> None:
        # A copy, since the types of values would go into what is made of the model otherwise.
        self.model = InferElementTypes()(ir.from_proto(ir.to_proto(model))).model
        self._folder, self._purpose = folder, purpose
        self._values = ir.convenience.create_value_mapping(self.model.graph)

    def open(self, inputs: Sequence[str], outputs: Sequence[str], threads: int | None = None) -> onnxruntime.InferenceSession:
        """A session that computes `outputs` with the values `inputs` given, and of the graph's own inputs those that it needs.

        Raises:
            UserError: ONNX Runtime refuses the part.
            MissingExtraError: ONNX Runtime is not installed.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "cpu", self._purpose) from error
        graph = ir.convenience.extract(self.model.graph, [*inputs, *self._needed(inputs, outputs)], outputs)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Steps of one layer are short: threads that spin between them would only take the cores from each other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        read_weights_from(self._folder, options, self._purpose)
        part = ir.to_proto(ir.Model(graph, ir_version=self.model.ir_version)).SerializeToString()
        # ONNX Runtime 1.32 fuses a layer norm in float32 with the cast to float16 before it, and then refuses what it made.
        fusions = ["LayerNormFusion", "LayerNormFusionL1", "LayerNormFusionL2"]
        try:
            return onnxruntime.InferenceSession(part, options, providers=["CPUExecutionProvider"], disabled_optimizers=fusions)
        except Exception as error:  # its errors share no narrower base class
            raise UserError(f"{self._folder}: ONNX Runtime {onnxruntime.__version__} cannot load a layer: {error}") from error

    def _needed(self, given: Sequence[str], outputs: Sequence[str]) -> list[str]:
        """The graph's inputs on the way to `outputs`, beside the values given."""
        seen, open_names, found = set(given), list(outputs), []
        while open_names:
            name = open_names.pop()
            if name in seen:
                continue
            seen.add(name)
            value = self._values[name]
            producer = value.producer()
            if producer is not None:
                open_names += [each.name for each in producer.inputs if each is not None and each.name]
            elif value.is_graph_input() and not value.is_initializer():
                found.append(name)
        return found
