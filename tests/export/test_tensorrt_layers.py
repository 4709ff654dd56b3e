"""The list of layers is read in every form that TensorRT gives it; anything else is reported.

Recordings in layers/: a build's log of TensorRT-RTX 1.7.1 (some lines of it), lines of full TensorRT 10 in the form that its users
published, and an inspector's answer in the fields of TensorRT 8 to 10, with names and numbers of our own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from retnet_export.export.tensorrt_layers import (
    UnreadableLayersError,
    layers_of_inspector,
    layers_of_log,
)

FOLDER = Path(__file__).parent / "layers"


def log(name: str) -> list[str]:
    return (FOLDER / name).read_text().splitlines()


def test_a_log_of_full_tensorrt_10():
    first, second = layers_of_log(log("full-10.10.txt"))
    assert (first.name, first.kind, first.operators) == ("__myl_MulSum_myl0_0", "kgen", ("linear1",))
    assert [(tensor.name, tensor.dims, tensor.item_bytes) for tensor in first.inputs] == [
        ("__mye116_dconst", (10, 10), 4),
        ("x", (10, 1), 4),
    ]
    assert [tensor.bytes(1) for tensor in second.inputs + second.outputs] == [600, 40, 120]


def test_a_log_of_rtx_with_an_engine_of_two_graphs():
    layers = layers_of_log(log("rtx-1.7.1.txt"))
    update = next(
        layer for layer in layers if any(tensor.name == "decode.state.0_out" for tensor in layer.outputs if 0 not in tensor.dims)
    )
    assert update.profile == 0
    assert "layers.0.retention.read_sum" in "".join(update.operators)
    state = next(tensor for tensor in update.inputs if tensor.name == "decode.state.0")
    assert (state.dims, state.elements(1), state.elements(3), state.bytes(1)) == ((-1, 4, 16, 32), 2048, 6144, 8192)
    assert any(tensor.item_bytes == 0.5 for layer in layers for tensor in layer.inputs)
    assert {layer.profile for layer in layers if "_myl1_" in layer.name} == {1}


def test_the_inspectors_answer_with_constants_that_are_no_tensors():
    reformat, convolution, cast = layers_of_inspector((FOLDER / "inspector.json").read_text())
    assert [tensor.bytes(1) for tensor in reformat.inputs + reformat.outputs] == [2 * 3 * 224 * 224] * 2
    assert [tensor.bytes(1) for tensor in convolution.inputs[1:]] == [9408, 256]
    assert convolution.operators == ("conv1", "relu1")
    assert (cast.profile, cast.outputs[0].bytes(1)) == (1, 256)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the builder's log has no list of layers"),
        (log("names-only.txt"), "without their tensors"),
        (["Layers:", "Name: a, LayerType: kgen, Somewhere: []"], "a layer in an unknown form: Name: a"),
        (["Layers:", "Name: a, LayerType: kgen, Inputs: [ { Name: x, Size: 4 }], Outputs: []"], "a tensor in an unknown form"),
        (
            ["Layers:", "Name: a, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [4], Datatype: Complex }], Outputs: []"],
            "the tensor x has an unknown type: Complex",
        ),
        (
            ["Layers:", "Name: a, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [4], Strides: [1] }], Outputs: []"],
            "no data type",
        ),
    ],
)
def test_an_unknown_form_is_reported(lines, message):
    with pytest.raises(UnreadableLayersError, match=message):
        layers_of_log(lines)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "no list of layers"),
        ('{"Layers": ["a", "b"]}', "names layers without their tensors"),
        ('{"Layers": [{"Name": "a", "LayerType": "kgen", "Inputs": [{"Name": "x"}]}]}', "in an unknown form"),
        (
            '{"Layers": [{"Name": "a", "LayerType": "kgen", "Inputs": '
            '[{"Name": "x", "Dimensions": [-1], "Format/Datatype": "N/A due to dynamic shapes"}]}]}',
            "x has an unknown type: N/A due to dynamic shapes",
        ),
    ],
)
def test_an_unknown_form_of_the_inspectors_answer_is_reported(document, message):
    with pytest.raises(UnreadableLayersError, match=message):
        layers_of_inspector(document)
