"""A folder that is not a checkpoint is named as what it is, with what to do; so is a file that cannot be read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.runtime.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "syncdoth-lm-decay", tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], r"a LoRA adapter.*merge it first.*merge_and_unload"),
        (["zero_to_fp32.py", "latest", "global_step5/mp_rank_00_model_states.pt"], r"DeepSpeed.*python zero_to_fp32\.py"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], r"DeepSpeed.*folder above"),
        (["__0_0.distcp", ".metadata"], r"torch\.distributed, in pieces; join them.*dcp_to_torch"),
        (["model.gguf"], r"a GGUF file.*export the checkpoint that it was made from"),
        (["tf_model.h5"], r"weights of TensorFlow"),
        (["manifest.json", "decode.onnx"], r"a bundle, which is already exported"),
        (["training_args.bin", "optimizer.pt"], r"no weights in it, only optimizer\.pt, training_args\.bin, which are not weights"),
        (["checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors"], r"training run.*give one of .*checkpoint-10"),
        (["model-00001-of-00003.safetensors"], r"model-00002-of-00003\.safetensors is missing, 2 of 3 shards are missing"),
    ],
)
def test_a_folder_that_is_not_a_checkpoint_is_named_as_what_it_is(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_shards_without_an_index_are_read_if_all_are_there(folder):
    (folder / "model.safetensors.index.json").unlink()
    assert open_checkpoint(folder).config == open_checkpoint(GOLDEN / "syncdoth-lm-decay").config


def test_training_arguments_beside_the_weights_are_not_taken_for_weights(tmp_path):
    shutil.copy(GOLDEN / "torchscale-default" / "model.pt", tmp_path)
    shutil.copy(GOLDEN / "torchscale-default" / "args.json", tmp_path)
    torch.save({"learning_rate": 1}, tmp_path / "training_args.bin")
    assert open_checkpoint(tmp_path).family == "torchscale"


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_link_that_leads_nowhere_is_named_with_its_end(folder, file):
    (folder / file).unlink()
    os.symlink("../blobs/absent", folder / file)
    with pytest.raises(UserError, match=rf"{file}: a link to \.\./blobs/absent, which does not exist; download or copy"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model-00001-of-00003.safetensors"])
def test_a_pointer_of_git_lfs_is_named(folder, file):
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=rf"{file}: a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"):
        open_checkpoint(folder)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(folder):
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read: Is a directory"):
        open_checkpoint(folder)


def test_a_checkpoint_that_is_itself_a_dangling_link_is_named(tmp_path):
    os.symlink("absent", tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: a link to absent, which does not exist"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_gguf_file_beside_the_weights_is_no_hindrance(folder):
    (folder / "model.gguf").touch()
    assert open_checkpoint(folder).family == "syncdoth"


def test_one_matrix_saved_as_two_tensors_of_a_wrapper_is_refused(folder, tmp_path):
    tensors = load_file(GOLDEN / "syncdoth-ffn" / "model.safetensors")
    save_file(tensors | {"module.lm_head.weight": tensors["lm_head.weight"].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight and module\.lm_head\.weight|module\.lm_head\.weight and lm_head\.weight"):
        open_checkpoint(tmp_path)
