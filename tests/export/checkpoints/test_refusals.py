"""A setting that changes the function is refused by name; an unknown one gives a warning; tensors must fit the settings."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.runtime.errors import CheckpointWarning, UserError

GOLDEN = Path(__file__).parents[2] / "golden"
CLASSICS = Path(__file__).parents[3] / "examples" / "classics"


@pytest.fixture
def change(tmp_path) -> Callable[..., Path]:
    """Copies a checkpoint with some settings changed and some tensors added, renamed (to None: removed) or replaced."""

    def changed(source: Path, settings: dict[str, object] | None = None, tensors: dict[str, object] | None = None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(source, folder)
        file = next(folder / name for name in ("config.json", "args.json") if (folder / name).exists())
        document = json.loads(file.read_text()) | (settings or {})
        file.write_text(json.dumps(document))
        if tensors:
            weights = next(folder / name for name in ("model.safetensors", "model.pt") if (folder / name).exists())
            held = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
            for name, value in tensors.items():
                if value is None:
                    del held[name]
                else:
                    held[name] = torch.zeros(2, 2) if value == "new" else value
            save_file(held, weights) if weights.suffix == ".safetensors" else torch.save(held, weights)
        return folder

    return changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_map": "relu"}, "feature_map is 'relu': .*train without feature_map"),
        ({"attn": {"layers": [1]}}, "attn is .*softmax attention"),
        ({"attnres_block_size": 2}, "attnres_block_size is 2"),
        ({"hidden_act": "powlu"}, "hidden_act is 'powlu', expected 'swish'"),
        ({"num_heads": "4"}, "num_heads is '4', expected a whole number"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor"),
    ],
)
def test_fla_settings_that_are_another_model_are_refused(change, settings, message):
    with pytest.raises(UserError, match=message):
        open_checkpoint(change(CLASSICS, settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multiway": True}, "multiway is True"),
        ({"moe_freq": 2}, "moe_freq is 2: mixture-of-experts"),
        ({"no_output_layer": True}, "no_output_layer is True: without an output layer"),
        ({"activation_fn": "tanh"}, "activation_fn is 'tanh', expected 'gelu'"),
        ({"decoder_ffn_embed_dim": 19}, r"shapes do not match its settings: layers\.0\.ffn\.fc1\.weight is \[20, 32\]"),
        ({"decoder_layers": 3}, r"missing: layers\.2\."),
    ],
)
def test_torchscale_settings_that_are_another_model_are_refused(change, settings, message):
    with pytest.raises(UserError, match=message):
        open_checkpoint(change(GOLDEN / "torchscale-default", settings))


@pytest.mark.parametrize("field", ["rotary_percentage", "retnet_stability_update", "hybrid_attention_layers", "parallel_residual"])
def test_xatl_is_refused_by_its_fields(change, field):
    with pytest.raises(UserError, match=f"{field} are fields of XATL's fork"):
        open_checkpoint(change(GOLDEN / "syncdoth-ffn", {field: False}))


def test_a_decay_that_the_settings_do_not_give_is_refused(change):
    with pytest.raises(UserError, match=r"its saved model\.retnet_rel_pos\.decay .* another rotation or decay"):
        open_checkpoint(change(GOLDEN / "syncdoth-ffn", {"use_lm_decay": True}))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("layers.1.moe_layer.experts.0.fc1.weight", "of mixture-of-experts layers: only dense"),
        ("layers.0.retention.q_proj.A.weight", "of multiway layers"),
        ("model.blocks.0.msr.qkv.weight", "syncdoth/RetNet in its first months"),
        ("model.layers.0.attn.q_conv1d.weight", "short convolutions .*train without use_short_conv"),
        ("model.layers.0.retention.group_norm.weight", "XATL's fork"),
        ("model.layers.0.attn_res_norm.weight", "attention over residuals"),
        ("retentions.0.W_G", "Jamie-Stirling/RetNet: that model has neither embedding nor output layer"),
        ("something.else", "not a known family .* its tensors are something.else"),
    ],
)
def test_tensors_of_other_models_are_named(tmp_path, tensor, message):
    save_file({tensor: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_every_unused_and_missing_tensor_is_listed(change):
    folder = change(
        GOLDEN / "syncdoth-ffn", tensors={"model.extra.weight": "new", "other": "new", "model.layers.1.ffn.fc2.bias": None}
    )
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.ffn\.fc2\.bias; not used: model\.extra\.weight, other$"):
        open_checkpoint(folder)


def test_a_mixture_of_old_and_new_modules_is_refused(change):
    folder = change(GOLDEN / "torchscale-default", tensors={"layers.0.retention.q_proj.bias": torch.zeros(32)})
    with pytest.raises(UserError, match=r"mixes modules of before and after 2023-09-28 \(biased projections: yes, LayerNorm: no"):
        open_checkpoint(folder)


def test_a_bare_state_dict_without_settings_asks_for_them(tmp_path):
    shutil.copy(GOLDEN / "torchscale-default" / "model.pt", tmp_path)
    with pytest.raises(UserError, match=r"put args\.json into its folder"):
        open_checkpoint(tmp_path / "model.pt")


def test_unknown_fields_are_warned_of_by_name(change):
    folder = change(GOLDEN / "syncdoth-ffn", {"new_thing": 1, "use_novelty": False})
    with pytest.warns(CheckpointWarning, match="new_thing, use_novelty are unknown and not read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "folder", [*sorted(path.parent for path in GOLDEN.glob("*/config.json")), CLASSICS], ids=lambda path: path.name
)
def test_what_the_packages_write_by_themselves_is_not_warned_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(folder)


def test_short_convolutions_that_fla_never_made_are_ignored(change):
    opened = open_checkpoint(change(CLASSICS, {"use_short_conv": True}))
    assert opened.config == open_checkpoint(CLASSICS).config
