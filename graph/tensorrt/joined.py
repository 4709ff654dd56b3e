"""Both graphs in one network over one copy of the weights.

Rule: an engine stores a weight once however many of its optimization profiles read it, and two engines share nothing. So decode and
prefill are put side by side, each with inputs and outputs of its own, `decode.tokens` and `prefill.tokens`, reading the same
initializers. In the profile of one, the batch of the other is 0: what is empty costs no kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto


def joined(models: Mapping[str, ModelProto]) -> ModelProto:
    """One model of several.

    Args:
        models: by the prefix that their tensors get. Large tensors, those with external data, are the same tensor under one name.

    Returns:
        The model, with the newest of their operator sets.
    """
    from onnx import TensorProto, helper

    initializers: dict[str, TensorProto] = {}
    nodes: list[NodeProto] = []
    inputs: list[ValueInfoProto] = []
    outputs: list[ValueInfoProto] = []
    for prefix, model in models.items():
        names = {}
        for tensor in model.graph.initializer:
            shared = tensor.data_location == TensorProto.EXTERNAL
            names[tensor.name] = tensor.name if shared else prefix + tensor.name
            if names[tensor.name] not in initializers:
                renamed = copy.deepcopy(tensor)
                renamed.name = names[tensor.name]
                initializers[renamed.name] = renamed
        for source in model.graph.node:
            node = copy.deepcopy(source)
            node.name = prefix + node.name
            node.input[:] = [name and names.get(name, prefix + name) for name in node.input]
            node.output[:] = [name and prefix + name for name in node.output]
            nodes.append(node)
        for values, target in ((model.graph.input, inputs), (model.graph.output, outputs)):
            for each in values:
                value = copy.deepcopy(each)
                value.name = prefix + value.name
                for size in value.type.tensor_type.shape.dim:
                    if size.dim_param:
                        size.dim_param = prefix + size.dim_param
                target.append(value)
    graph = helper.make_graph(nodes, "decode and prefill", inputs, outputs, list(initializers.values()))
    versions: dict[str, int] = {}
    for model in models.values():
        for entry in model.opset_import:
            versions[entry.domain] = max(versions.get(entry.domain, 0), entry.version)
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=max(model.ir_version for model in models.values()))
