"""However the files lie (shards, links, a hub cache, half precision, torch or safetensors), the weights read are the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a small syncdoth checkpoint that a test may take apart."""
    return Path(shutil.copytree(GOLDEN / "syncdoth-ffn", tmp_path / "checkpoint"))


def weights(path: Path) -> dict[str, np.ndarray]:
    opened = open_checkpoint(path)
    return {name: np.asarray(opened.weight(name), np.float32) for name in weight_shapes(opened.config)}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_pytorch_model_bin_reads_as_safetensors_do(folder):
    before = weights(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same(weights(folder), before)


def test_a_file_of_torch_before_1_6_is_read_too(folder):
    before = weights(folder)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert_same(weights(folder), before)


def test_shards_of_torch_files_are_read_by_their_index(folder):
    before = weights(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"pytorch_model-{1 + position % 2:05d}-of-00002.bin" for position, name in enumerate(tensors)}
    for file in set(index.values()):
        torch.save({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(weights(folder), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_half_precision_is_read_as_it_is(folder, dtype, file):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    opened = open_checkpoint(folder)
    read = opened.weight("layers.0.retention.q.weight")
    assert read.dtype.itemsize == 2
    expected = tensors["model.layers.0.retention.q_proj.weight"].float().numpy()
    np.testing.assert_array_equal(read.astype(np.float32), expected)


def test_a_hub_cache_of_links_is_read_from_its_root_and_from_its_snapshot(folder, tmp_path):
    before = weights(folder)
    root = tmp_path / "models--owner--name"
    snapshot, blobs = root / "snapshots" / "0123abcd", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / f"{number:040x}")
        os.symlink(f"../../blobs/{number:040x}", snapshot / file.name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abcd")
    assert_same(weights(snapshot), before)
    assert_same(weights(root), before)


def test_a_fairseq_file_alone_in_a_folder_may_be_given_by_its_folder(tmp_path):
    file = GOLDEN / "torchscale-fairseq-deepnorm" / "checkpoint_cfg.pt"
    shutil.copy(file, tmp_path)
    assert_same(weights(tmp_path), weights(file))


def test_where_several_files_could_be_meant_one_must_be_named():
    with pytest.raises(UserError, match=r"holds checkpoint_cfg\.pt, checkpoint_namespace\.pt; give one of these files"):
        open_checkpoint(GOLDEN / "torchscale-fairseq")


def test_a_file_that_would_run_code_is_refused_with_the_name_of_what_it_wants(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save({"model": {"x": torch.zeros(1)}, "args": Evil()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"torch cannot load it as plain tensors \(.*mkdir"):
        open_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_refused(folder, file):
    if file.endswith("bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    whole = (folder / file).read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        (folder / file).write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"truncated|if it is whole"):
            open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "syncdoth-lm-decay", tmp_path / "checkpoint"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00003\.safetensors, which is missing"):
        open_checkpoint(folder)


def test_a_path_with_nothing_usable_says_what_was_expected(tmp_path):
    for path, message in ((tmp_path / "nowhere", "no such file or folder"), (tmp_path, "no weights")):
        with pytest.raises(UserError, match=rf"{message}; expected a folder with config\.json"):
            open_checkpoint(path)
