"""A bundle that was damaged, or made to harm, is refused by name before anything runs or much is allocated."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet_export.runtime.bundle.bundle import open_bundle, record_files
from retnet_export.runtime.bundle.external_data import external_locations
from retnet_export.runtime.bundle.files import sha256_of
from retnet_export.runtime.bundle.seal import check_seal, sealed
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.model import load

FILES = ("decode.onnx", "prefill.onnx", "decode.onnxruntime-cpu.onnx", "prefill.onnxruntime-cpu.onnx", "weights.bin")


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    tiny.bundle(folder, tiny.config(), chunk=8)
    return folder / "tiny.retnet"


@pytest.fixture
def bundle(original, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "tiny.retnet"))


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


def write_manifest(bundle: Path, document: dict) -> None:
    """Sealed, as whoever makes a harmful bundle would."""
    (bundle / "manifest.json").write_bytes(sealed({name: value for name, value in document.items() if name != "sha256"}))


def sign(bundle: Path) -> None:
    """Make the manifest agree with the files, as whoever makes a harmful bundle would."""
    document = manifest_of(bundle)
    document["files"] = {name: vars(record) for name, record in record_files(bundle).items()}
    write_manifest(bundle, document)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_of_a_file_is_noticed(bundle, name):
    content = (bundle / name).read_bytes()
    generator = np.random.default_rng(1)
    for place in generator.integers(0, len(content), 8):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        (bundle / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}: its SHA-256 does not match the manifest"):
            open_bundle(bundle)


def test_of_200_bits_flipped_anywhere_in_a_bundle_all_are_noticed(example_bundle, tmp_path):
    """In the files that are read to the end; weights.bin is all but a few of the bits of a bundle."""
    bundle = tmp_path / "flipped.retnet"
    bundle.mkdir()
    (bundle / "weights.bin").symlink_to(bundle / "weights")  # keeps its hash; its own bits are flipped above
    shutil.copyfile(example_bundle.file("weights.bin"), bundle / "weights")
    names = [name for name in [*example_bundle.manifest.files, "manifest.json"] if name != "weights.bin"]
    contents = {name: example_bundle.file(name).read_bytes() for name in names}
    for name, content in contents.items():
        (bundle / name).write_bytes(content)
    open_bundle(bundle, check_hashes=False)
    generator = np.random.default_rng(7)
    for _ in range(200):
        name = names[int(generator.integers(len(names)))]
        damaged = bytearray(contents[name])
        damaged[int(generator.integers(len(damaged)))] ^= 1 << int(generator.integers(8))
        (bundle / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            _open_without_weights(bundle)
        (bundle / name).write_bytes(contents[name])


def _open_without_weights(bundle: Path) -> None:
    """`open_bundle` with all hashes but that of weights.bin, which would take a second each time."""
    manifest = open_bundle(bundle, check_hashes=False).manifest
    for name, record in manifest.files.items():
        if name != "weights.bin" and sha256_of(bundle / name) != record.sha256:
            raise UserError(f"{name}: its SHA-256 does not match the manifest")


def test_the_manifests_own_hash_covers_every_byte():
    document = {"name": "ü", "files": {"a": {"sha256": "1" * 64}}, "prose": [1, 2.5, None, "text"]}
    content = sealed(document)
    check_seal(json.loads(content), content)
    for place in range(len(content)):
        flipped = [content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :] for bit in range(8)]
        for damaged in (*flipped, content[:place] + content[place + 1 :]):
            with pytest.raises((UserError, ValueError)):
                check_seal(json.loads(damaged), damaged)


def test_a_manifest_written_by_hand_is_refused(bundle):
    document = manifest_of(bundle)
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="does not match its own SHA-256; copy the bundle or export it again"):
        open_bundle(bundle)
    (bundle / "manifest.json").write_text(json.dumps({name: value for name, value in document.items() if name != "sha256"}))
    with pytest.raises(UserError, match="it has no checksum of itself, so it is damaged or was written by hand"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_refused(bundle, name):
    content = (bundle / name).read_bytes()
    for size in (0, len(content) // 2, len(content) - 1):
        (bundle / name).write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"{name}: .* bytes, the manifest says {len(content):,}"):
            open_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        open_bundle(bundle)


def test_swapped_files_are_refused(bundle):
    for name, other in (("a", "decode.onnx"), ("decode.onnx", "prefill.onnx"), ("prefill.onnx", "a")):
        (bundle / other).rename(bundle / name)
    with pytest.raises(UserError, match=r"(decode|prefill)\.onnx: .* bytes, the manifest says"):
        open_bundle(bundle)


def test_a_file_of_another_bundle_is_refused(bundle, tmp_path):
    from random_weights import random_weights

    (tmp_path / "other").mkdir()
    tiny.bundle(tmp_path / "other", tiny.config(), random_weights(tiny.config(), seed=9), chunk=8)
    shutil.copyfile(tmp_path / "other" / "tiny.retnet" / "weights.bin", bundle / "weights.bin")
    with pytest.raises(UserError, match=r"weights\.bin: its SHA-256"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name",
    ["../weights.bin", "/etc/passwd", "a/../../b", "./weights.bin", "a//b", "..", ".", "", "manifest.json", "a\\b", "C:b", "a\0b"],
)
def test_a_name_that_is_not_plainly_inside_is_refused(bundle, name):
    document = manifest_of(bundle)
    document["files"][name] = document["files"]["weights.bin"]
    write_manifest(bundle, document)
    with pytest.raises(UserError, match="is not a plain name inside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "weights.bin/x"])
def test_a_name_that_the_system_cannot_open_is_refused(bundle, name):
    document = manifest_of(bundle)
    document["files"][name] = document["files"]["weights.bin"]
    write_manifest(bundle, document)
    with pytest.raises(UserError, match=r"missing|cannot be read"):
        open_bundle(bundle)


def test_a_link_out_of_the_bundle_is_refused_even_with_the_right_content(bundle, tmp_path):
    (bundle / "weights.bin").rename(tmp_path / "elsewhere.bin")
    os.symlink(tmp_path / "elsewhere.bin", bundle / "weights.bin")
    with pytest.raises(UserError, match=r"weights\.bin: a link that leaves the bundle"):
        open_bundle(bundle)


def test_a_link_within_the_bundle_and_to_the_bundle_are_fine(bundle, tmp_path):
    (bundle / "weights.bin").rename(bundle / "real.bin")
    os.symlink("real.bin", bundle / "weights.bin")
    os.symlink(bundle, tmp_path / "link.retnet")
    open_bundle(tmp_path / "link.retnet")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "absent.bin", "real/../../secret.bin"])
@pytest.mark.parametrize("name", ["decode.onnx", "prefill.onnx"])
def test_a_graph_whose_weights_are_elsewhere_is_refused_even_if_every_hash_is_right(bundle, tmp_path, name, location):
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    model = onnx.load(bundle / name, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    onnx.save(model, bundle / name)
    sign(bundle)
    with pytest.raises(UserError, match=rf"{name}: the graph looks for its weights in '{location}'"):
        load(bundle, "onnxruntime")


def test_external_data_is_found_wherever_onnx_may_hold_it():
    def tensor(location: str) -> onnx.TensorProto:
        value = onnx.TensorProto(name=location, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        value.external_data.add(key="offset", value="0")
        value.external_data.add(key="location", value=location)
        return value

    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[tensor("in a subgraph")])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner)
    node.attribute.append(onnx.helper.make_attribute("value", tensor("in an attribute")))
    many = onnx.AttributeProto(name="many", type=onnx.AttributeProto.TENSORS)
    many.tensors.append(tensor("in a list"))
    sparse = onnx.SparseTensorProto(values=tensor("sparse values"), indices=tensor("sparse indices"), dims=[1])
    graph = onnx.helper.make_graph([node], "g", [], [], initializer=[tensor("initializer")], sparse_initializer=[sparse])
    function = onnx.FunctionProto(name="f", domain="d")
    function.node.add(op_type="X").attribute.append(many)
    model = onnx.helper.make_model(graph, functions=[function])
    assert external_locations(model.SerializeToString()) == {
        "initializer",
        "in a subgraph",
        "in an attribute",
        "in a list",
        "sparse values",
        "sparse indices",
    }


def test_the_graphs_we_write_name_the_weights_file_alone(original):
    for name in ("decode.onnx", "prefill.onnx"):
        assert external_locations((original / name).read_bytes()) == {"weights.bin"}


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_onnx_file_give_a_message_or_nothing(content):
    with contextlib.suppress(UserError):
        external_locations(content)


def changed(document: dict, path: str, value: object) -> dict:
    path = f"variants/portable/{path}" if path.startswith("graphs/") else path
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    target = document
    for part in parents:
        target = target[part]
    target[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model/vocab_size", 10**12, "parameters, which the .* bytes of the bundle's files cannot hold"),
        ("model/hidden_size", 10**30, "cannot hold"),
        ("model/num_layers", 10**9, "cannot hold"),
        ("model/vocab_size", 49, "no output 'logits', float32 with 49 columns"),
        ("model/head_key_dim", 7, r"manifest\.json\.model: model configuration: head_key_dim is 7, expected an even number"),
        ("model/vocab_size", "50", r"model\.vocab_size: expected a whole number, found '50'"),
        ("model/vocab_size", True, "expected a whole number, found True"),
        ("model/norm_eps", "small", "expected a number"),
        ("model/decay", "none", "expected one of 'power_of_two'"),
        (
            "state/1/shape",
            [-1, 4, 8, 13],
            r"'state.000' of layer 0 .*float32\[-1, 4, 8, 13\] .*; the model .*\[-1, 4, 8, 12\]",
        ),
        ("state/1/shape", [-1, -1, -1, -1], r"float32\[-1, -1, -1, -1\] over batch, head, key, value; the model configuration"),
        ("state/1/axes", ["batch", "head", "value", "key"], "over batch, head, value, key; the model configuration asks for"),
        ("state/1/layer", 1, "'state.000' of layer 1 .*; the model configuration asks for 'state.000' of layer 0"),
        ("state/1/layer", None, "the state has 1 layers and 2 tensors more, the model configuration asks for 2 and 'position'"),
        ("state/1/output", "state.001_out", "after a step 'state.001_out'"),
        (
            "graphs/decode/state_layout/axes",
            ["batch", "head", "value", "key"],
            r"float32\[-1, 4, 12, 8\] in the layout of graph",
        ),
        (
            "graphs/decode/state_layout/axes",
            ["head", "batch", "key", "value"],
            "its state_layout is .* in 1 pieces; expected",
        ),
        ("graphs/decode/state_layout/axes", [], "its state_layout is"),
        (
            "graphs/decode/state_layout/pieces",
            5,
            "in 5 pieces; expected .* pieces that divide the head_value_dim 12",
        ),
        ("graphs/decode/state_layout/pieces", 0, "in 0 pieces"),
        (
            "graphs/decode/state_layout/pieces",
            2,
            r"float32\[-1, 8, 8, 6\] in the layout of graph 'decode', which has input",
        ),
        ("graphs/decode/outputs/1/name", "position_after", "which has no output 'position_out'"),
        ("state/1/dtype", "bfloat16", "begins with 0; expected one of float32"),
        ("state/1/initial", 10**40, "and a number of 32 bits"),
        ("state/1/input", "state.001", "names a tensor twice"),
        ("graphs/decode/file", "absent.onnx", "which is not one of the bundle's files"),
        ("graphs/decode/inputs", [], "its first input is not 'tokens'"),
        ("graphs/decode/inputs/0/shape", [0, 1], "sizes are 1 or more, or -1 for any"),
        ("graphs/decode/inputs/1/name", "tokens", "names an input or output twice"),
        (
            "graphs/prefill/inputs/3/name",
            "row",
            "expected an input 'rows', int64 with two axes.*export the checkpoint again",
        ),
        ("graphs/prefill/outputs/0/shape", [-1, 50], "'logits' with three; an older version wrote this bundle"),
        ("graphs/prefill/chunk_size", 0, "chunk_size is 0, expected 1 to"),
        ("graphs/prefill/chunk_size", 10**15, "expected 1 to"),
        ("variants", {}, "the bundle has no portable graphs"),
        ("variants/portable/graphs", {}, "the graphs of variant 'portable' are none, expected decode and prefill"),
        ("variants/portable/needs", {"onnxruntime": "1.25", "provider": "cpu", "operators": []}, "'portable' has needs; only"),
        ("variants/onnxruntime-cpu/needs", None, "'onnxruntime-cpu' needs nothing; only 'portable'"),
        ("variants/onnxruntime-cpu/needs/onnxruntime", "newest", "needs ONNX Runtime 'newest', expected a version like 1.25"),
        ("variants/onnxruntime-cpu/needs/provider", "any", "expected one of 'cpu', 'cuda', found 'any'"),
        ("variants/onnxruntime-cpu/graphs/decode/chunk_size", 0, "graph 'onnxruntime-cpu/decode': chunk_size is 0"),
        ("variants/onnxruntime-cpu/graphs/prefill/chunk_size", 7, "reads other chunks than the portable graphs"),
        ("variants/onnxruntime-cpu/graphs/prefill/state_layout/pieces", 2, "in the layout of graph 'onnxruntime-cpu/prefill'"),
        ("files/weights.bin", None, "expected an object, found None"),
        ("format_version", 99, "bundle format 99, this version of retnet-export reads 4"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("eos_ids", [50], "token 50, which begins or ends a text, is not in the vocabulary"),
        ("tokenizer", {"file": "weights.bin", "prefix_ids": [50]}, "token 50, which begins or ends a text"),
        ("tokenizer", {"file": "weights.bin", "chat_template": "no.jinja"}, "tokenizer is 'no.jinja', which is not one of"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(bundle, path, value, message):
    write_manifest(bundle, changed(manifest_of(bundle), path, value))
    with pytest.raises(UserError, match=message) as caught:
        open_bundle(bundle)
    assert "manifest.json" in str(caught.value)


def test_a_manifest_that_contradicts_the_graph_is_refused_before_a_buffer_is_made(bundle):
    document = manifest_of(bundle)
    for variant in document["variants"].values():
        variant["graphs"]["prefill"]["inputs"].append({"name": "extra", "dtype": "int64", "shape": [-1]})
    write_manifest(bundle, document)
    with pytest.raises(
        UserError, match=r"prefill.*\.onnx: the manifest has input 'extra' as int64\[-1\], it has none of that name"
    ):
        load(bundle, "onnxruntime")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not a description of a bundle"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"format": 1e999}', "not a description of a bundle"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": 1, "format": 2}', "the key 'format' twice"),
        (b" " * (17 << 20), "the description of a bundle has at most"),
    ],
    ids=["empty", "not UTF-8", "a list", "deep", "infinity", "NaN", "a key twice", "huge"],
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle, content, message):
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_bundle(bundle)


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308]),
    st.sampled_from(["", "..", "/", "state.000", "weights.bin", "float16"]),
    st.text(max_size=8),
    st.lists(st.integers(-2, 10**12), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_is_done_to_a_manifest_it_is_refused_by_a_message_or_it_runs(original, tmp_path_factory, data):
    document = manifest_of(original)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        path = data.draw(st.sampled_from(places(document)[1:]), label="place")
        target = document
        for part in path[:-1]:
            target = target[part]
        how = data.draw(st.sampled_from(["replace", "delete", "copy", "add"]), label="how")
        if how == "replace":
            target[path[-1]] = data.draw(STRANGE, label="value")
        elif how == "delete":
            del target[path[-1]]
        elif isinstance(target, list):
            target.insert(0, copy.deepcopy(target[path[-1]]))
        elif how == "copy":
            target[path[-1]] = copy.deepcopy(target[data.draw(st.sampled_from(sorted(target)), label="from")])
        else:
            target[data.draw(st.text(max_size=5), label="key")] = data.draw(STRANGE, label="value")
    bundle = tmp_path_factory.mktemp("mutated") / "tiny.retnet"
    bundle.mkdir()
    for name in FILES:
        os.link(original / name, bundle / name)
    write_manifest(bundle, document)
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            session = load(bundle, "onnxruntime", threads=1).session()
            session.feed([1, 2, 3])
            assert np.isfinite(session.step([1])).all()
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_the_command_line_refuses_a_damaged_bundle_in_one_message(bundle):
    from typer.testing import CliRunner

    from retnet_export.cli import app

    content = bytearray((bundle / "weights.bin").read_bytes())
    content[1000] ^= 1
    (bundle / "weights.bin").write_bytes(content)
    assert sha256_of(bundle / "weights.bin")
    for command in (["generate", "--prompt", "x"], ["chat"], ["inspect"]):
        result = CliRunner().invoke(app, [command[0], str(bundle), *command[1:]])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "weights.bin" in result.stderr
        assert result.stdout == ""
