"""The same weights are read whatever wrapped the model when it was saved, and under whichever names the file has a tied matrix."""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLE
from safetensors.torch import load_file, save_file, save_model

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.export.verify import verify
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.errors import CheckpointWarning, UserError
from retnet_export.runtime.model import load

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = {
    "fla-tied": ("model.embeddings.weight", "lm_head.weight"),
    "syncdoth-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "torchscale-shared-scaled-embedding": ("embed_tokens.weight", "output_projection.weight"),
}


def weights(path: Path) -> dict[str, np.ndarray]:
    opened = open_checkpoint(path)
    return {name: np.asarray(opened.weight(name), np.float32) for name in weight_shapes(opened.config)}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "model.safetensors"
    return load_file(file) if file.exists() else torch.load(folder / "model.pt", weights_only=True)


def rewritten(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with these tensors."""
    shutil.copytree(source, target)
    if (target / "model.safetensors").exists():
        save_file(tensors, target / "model.safetensors")
    else:
        torch.save(tensors, target / "model.pt")
    return target


@pytest.mark.parametrize("family", ["fla-default", "syncdoth-ffn", "torchscale-default"])
@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "_fsdp_wrapped_module.",
        "model.",
        "net.",
        "model._orig_mod.",
    ],
)
def test_weights_of_a_wrapped_model_are_the_models(family, prefix, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in tensors_of(GOLDEN / family).items()}
    expected = weights(GOLDEN / family)
    for name, value in weights(rewritten(GOLDEN / family, tmp_path / "wrapped", tensors)).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_wrapper_of_each_layer_is_no_part_of_a_name_either(tmp_path):
    tensors = {
        name.replace(".attn.", "._checkpoint_wrapped_module.attn."): value
        for name, value in tensors_of(GOLDEN / "fla-default").items()
    }
    assert (
        weights(rewritten(GOLDEN / "fla-default", tmp_path / "wrapped", tensors)).keys() == weights(GOLDEN / "fla-default").keys()
    )


def test_a_lightning_checkpoint_is_read_beside_its_config(tmp_path):
    tensors = {f"model.{name}": tensor for name, tensor in tensors_of(GOLDEN / "fla-default").items()}
    shutil.copy(GOLDEN / "fla-default" / "config.json", tmp_path)
    torch.save({"epoch": 3, "state_dict": tensors, "hyper_parameters": {"lr": 1e-3}}, tmp_path / "last.ckpt")
    assert weights(tmp_path).keys() == weights(GOLDEN / "fla-default").keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_may_have_its_matrix_under_the_heads_name_alone(family, tmp_path):
    embedding, head = FAMILIES[family]
    tensors = tensors_of(GOLDEN / family)
    expected = weights(GOLDEN / family)
    tensors[head] = tensors.pop(embedding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = weights(rewritten(GOLDEN / family, tmp_path / "saved", tensors))
    np.testing.assert_array_equal(actual["embedding.weight"], expected["embedding.weight"])
    assert actual.keys() == expected.keys()


def test_what_save_model_writes_of_a_tied_model_is_read(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self, tensors):
            super().__init__()
            self.model, self.lm_head = torch.nn.Module(), torch.nn.Module()
            self.model.embeddings, self.lm_head.weight = torch.nn.Module(), torch.nn.Parameter(tensors["model.embeddings.weight"])
            self.model.embeddings.weight = self.lm_head.weight

    tensors = tensors_of(GOLDEN / "fla-tied")
    save_model(Tied(tensors), str(tmp_path / "shared.safetensors"))
    saved = load_file(tmp_path / "shared.safetensors")
    assert len(saved) == 1
    others = {name: value for name, value in tensors.items() if name not in FAMILIES["fla-tied"]}
    folder = rewritten(GOLDEN / "fla-tied", tmp_path / "saved", others | saved)
    np.testing.assert_array_equal(weights(folder)["embedding.weight"], weights(GOLDEN / "fla-tied")["embedding.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_is_not_the_embedding_is_the_head_whatever_the_settings_say(family, tmp_path):
    embedding, head = FAMILIES[family]
    tensors = tensors_of(GOLDEN / family)
    tensors[head] = tensors[embedding] * 2 + 1
    folder = rewritten(GOLDEN / family, tmp_path / "other", tensors)
    with pytest.warns(CheckpointWarning, match=rf"{head} is not {embedding}: the model is exported with {head} as its head"):
        opened = open_checkpoint(folder)
    assert not opened.config.tied_embeddings
    for name, tensor in (("head.weight", tensors[head]), ("embedding.weight", tensors[embedding])):
        np.testing.assert_array_equal(opened.weight(name).astype(np.float32), tensor.float().numpy())


def test_the_exported_graph_and_the_verifying_model_take_the_files_own_head(tmp_path):
    """Logits of a head that is twice the embedding are twice the logits of the tied model."""
    tensors = load_file(EXAMPLE / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"] * 2
    (tmp_path / "doubled").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(EXAMPLE / name, tmp_path / "doubled")
    save_file(tensors, tmp_path / "doubled" / "model.safetensors")
    with pytest.warns(CheckpointWarning, match=r"lm_head\.weight is not"):
        opened = open_checkpoint(tmp_path / "doubled")
    models = [
        load(export_bundle(checkpoint, tmp_path / f"{name}.retnet").path, "onnxruntime")
        for name, checkpoint in (("tied", open_checkpoint(EXAMPLE)), ("doubled", opened))
    ]
    tied, doubled = (model.session().step([5]).copy() for model in models)
    np.testing.assert_allclose(doubled, 2 * tied, rtol=1e-5, atol=1e-5)
    assert verify(models[1], opened, tokens=64).passed
    with pytest.raises(UserError, match="their model configurations differ"):
        verify(models[0], opened, tokens=64)


def test_a_fairseq_checkpoint_with_numpy_values_beside_the_model_is_read(tmp_path):
    file = GOLDEN / "torchscale-fairseq" / "checkpoint_namespace.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        document = torch.load(file, weights_only=True)
    document["extra_state"] = {"best": np.float64(3.5), "losses": np.arange(3.0), "names": np.array(["a"], dtype=object)}
    document["args"].decoder_layers = np.int64(document["args"].decoder_layers)
    torch.save(document, tmp_path / "checkpoint.pt")
    expected = weights(file)
    for name, value in weights(tmp_path / "checkpoint.pt").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"attn": {}},
        {"attn": {"layers": []}},
        {"attn": {"layers": [], "window_size": None}},
        {"quantization_config": None, "feature_map": None, "something_of_a_later_version": None},
        {"_attn_implementation_autoset": True, "do_sample": False, "max_length": 20, "temperature": 1.0},
    ],
)
def test_settings_without_effect_give_no_warning(tmp_path, settings):
    folder = rewritten(GOLDEN / "fla-default", tmp_path / "copy", tensors_of(GOLDEN / "fla-default"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(folder)


def test_quantized_weights_are_refused_with_what_to_export_instead(tmp_path):
    folder = rewritten(GOLDEN / "fla-default", tmp_path / "copy", tensors_of(GOLDEN / "fla-default"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UserError, match=r"quantization_config is .*bitsandbytes.*export the checkpoint that they were made from"):
        open_checkpoint(folder)
