"""The layers of an engine after fusion, with the tensors that each reads and writes: from the builder's log or from the inspector.

Rule: what cannot be read is reported, never guessed. Three forms are known, and a test holds a recording of each:

    log of full TensorRT 10  Name: a, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,40], Format/Datatype: Int32 }], …
    log of RTX, newer 10     the same with Constants: […] between; of a tensor Dimensions, Strides, StrideOrder, Datatype, Format
    JSON of the inspector    {"Layers": [{"Name": "a", "LayerType": "kgen", "Inputs": [{"Name": "x", "Dimensions": [1, 40], …

All need profiling verbosity DETAILED at build. A size that the build leaves open stands as -1, and an engine with several profiles
lists the layers of all of them, those of the second with "[profile 1]" in some name.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ITEM_BYTES = {
    "int4": 0.5,
    "fp4": 0.5,
    "int8": 1.0,
    "uint8": 1.0,
    "fp8": 1.0,
    "bool": 1.0,
    "e8m0": 1.0,
    "half": 2.0,
    "fp16": 2.0,
    "bfloat16": 2.0,
    "bf16": 2.0,
    "float": 4.0,
    "fp32": 4.0,
    "int32": 4.0,
    "int64": 8.0,
}
"""Bytes of an element by TensorRT's names, in small letters: "Half", or "FP16" in "Row major linear FP16 format"."""

NO_KERNEL = {"signal", "wait", "shape_call", "NoOp", "Constant", "Shape", "ShapeHostToDevice"}
"""Layer types that launch nothing of size: events between streams, host arithmetic on shapes, constants."""


class UnreadableLayersError(Exception):
    """The list of layers is missing or of a form that is not known; the message says which."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as a layer names it.

    Attributes:
        name: of the tensor.
        dims: sizes; -1 where the build leaves one open.
        item_bytes: bytes of an element.
    """

    name: str
    dims: tuple[int, ...]
    item_bytes: float

    def elements(self, open_size: int) -> int:
        """Elements, with open sizes taken to be `open_size`."""
        total = 1
        for size in self.dims:
            total *= open_size if size < 0 else size
        return total

    def bytes(self, open_size: int) -> float:
        return self.elements(open_size) * self.item_bytes


@dataclass(frozen=True)
class Layer:
    """One kernel, or several that TensorRT lists as one.

    Attributes:
        name: TensorRT's.
        kind: TensorRT's layer type.
        inputs: what it reads, constants included.
        outputs: what it writes.
        operators: names of the graph's nodes that it does.
        profile: the optimization profile that it belongs to.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: tuple[str, ...]
    profile: int = 0


def layers_of_log(lines: Iterable[str]) -> list[Layer]:
    """The layers that a build with a verbose log listed.

    Raises:
        UnreadableLayersError: there is no list, or a line of it has an unknown form.
    """
    found: list[Layer] = []
    listed = False
    for line in "\n".join(lines).splitlines():
        if line.rstrip().endswith("Layers:"):
            listed = True
        elif ", LayerType: " in line:
            found.append(_layer_of_line(line.strip()))
        elif line.lstrip().startswith("Layer(") and not listed:
            raise UnreadableLayersError("the builder listed layers without their tensors (profiling verbosity is not DETAILED)")
    if not found:
        raise UnreadableLayersError("the builder's log has no list of layers")
    return _with_profiles(found)


LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$")
TENSOR = re.compile(r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[-\d, ]*)\](?P<rest>[^{}]*)\}")
DATATYPE = re.compile(r"(?:Format/Datatype|Datatype): ([^,}]+)")
OPERATOR = re.compile(r"\[ONNX Layer: ([^\]]*(?:\[profile \d+\])?)\]")


def _layer_of_line(line: str) -> Layer:
    match = LINE.match(line)
    if match is None or "Outputs: [" not in match["rest"]:
        raise UnreadableLayersError(f"a layer in an unknown form: {line[:120]}")
    before, _, after = match["rest"].partition("Outputs: [")
    after, _, end = after.partition("TacticName:")
    inputs, outputs = (tuple(_tensor_of_text(each, line) for each in TENSOR.finditer(part)) for part in (before, after))
    if len(inputs) + len(outputs) != len(re.findall(r"\{ Name: ", before + after)):
        raise UnreadableLayersError(f"a tensor in an unknown form: {line[:120]}")
    operators = tuple(OPERATOR.findall(end))
    return Layer(match["name"], match["kind"], inputs, outputs, operators)


def _tensor_of_text(match: re.Match[str], line: str) -> Tensor:
    kind = DATATYPE.search(match["rest"])
    if kind is None:
        raise UnreadableLayersError(f"the tensor {match['name']} has no data type: {line[:120]}")
    dims = tuple(int(size) for size in match["dims"].split(",") if size.strip())
    return Tensor(match["name"], dims, _item_bytes(kind[1], match["name"]))


def _item_bytes(text: str, tensor: str) -> float:
    for word in re.findall(r"\w+", text.lower()):
        if word in ITEM_BYTES:
            return ITEM_BYTES[word]
    raise UnreadableLayersError(f"the tensor {tensor} has an unknown type: {text.strip()}")


def layers_of_inspector(document: str) -> list[Layer]:
    """The layers in the JSON of `IEngineInspector.get_engine_information`.

    Raises:
        UnreadableLayersError: it has names only, or an unknown form.
    """
    try:
        listed = json.loads(document)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableLayersError(f"the inspector's answer has no list of layers ({error})") from error
    if not listed or any(not isinstance(entry, dict) for entry in listed):
        raise UnreadableLayersError("the inspector names layers without their tensors (profiling verbosity is not DETAILED)")
    try:
        return _with_profiles([_layer_of_entry(entry) for entry in listed])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnreadableLayersError(f"the inspector lists a layer in an unknown form ({error!r})") from error


def _layer_of_entry(entry: dict[str, object]) -> Layer:
    def tensors(key: str) -> tuple[Tensor, ...]:
        result = []
        for each in entry.get(key, ()):  # type: ignore[attr-defined]
            kind = each.get("Datatype") or each["Format/Datatype"]
            result.append(Tensor(each["Name"], tuple(int(size) for size in each["Dimensions"]), _item_bytes(kind, each["Name"])))
        return tuple(result)

    operators = tuple(OPERATOR.findall(str(entry.get("Metadata", "")).replace("\x1e", "")))
    weights = []
    for key in ("Weights", "Bias"):  # of layers outside Myelin, whose constants are no tensors
        held = entry.get(key)
        if isinstance(held, dict) and held.get("Count"):
            weights.append(Tensor(f"{entry['Name']} {key}", (int(held["Count"]),), _item_bytes(str(held["Type"]), key)))
    kind = str(entry["LayerType"])
    return Layer(str(entry["Name"]), kind, (*tensors("Inputs"), *tensors("Constants"), *weights), tensors("Outputs"), operators)


def _with_profiles(layers: Sequence[Layer]) -> list[Layer]:
    """Give each layer its profile: the layers of one compiled subgraph (…_myl1_7) share one, and some of them name it."""
    groups: dict[str, list[Layer]] = defaultdict(list)
    for index, layer in enumerate(layers):
        subgraph = re.search(r"_myl(\d+)_\d+$", layer.name)
        groups[f"myl{subgraph[1]}" if subgraph else f"alone{index}"].append(layer)
    profile_of: dict[int, int] = {}
    for members in groups.values():
        named = {
            int(number)
            for layer in members
            for text in (layer.name, *(tensor.name for tensor in (*layer.inputs, *layer.outputs)))
            for number in re.findall(r"\[profile (\d+)\]", text)
        }
        if len(named) > 1:
            raise UnreadableLayersError(f"{members[0].name}: its subgraph is in the profiles {sorted(named)} at once")
        profile_of |= {id(layer): named.copy().pop() if named else 0 for layer in members}
    return [Layer(layer.name, layer.kind, layer.inputs, layer.outputs, layer.operators, profile_of[id(layer)]) for layer in layers]
