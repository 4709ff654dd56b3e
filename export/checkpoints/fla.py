"""flash-linear-attention (`model_type: retnet` with `num_heads`): Hugging Face folders.

Source: fla/models/retnet/configuration_retnet.py, modeling_retnet.py, fla/layers/multiscale_retention.py and
fla/modules/mlp.py (0.6.0).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, cast

from retnet_export.export.checkpoints.base import HUGGING_FACE_FIELDS, Checkpoint, Fields, Stored, make_checkpoint, with_embedding
from retnet_export.export.checkpoints.files import Found
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.errors import UserError

ACTIVATIONS = {"swish": "silu", "silu": "silu"}
HARMLESS = HUGGING_FACE_FIELDS | {
    "attn_mode",  # chunk, fused_recurrent: forms of the same function
    "conv_size",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "max_position_embeddings",  # no limit, rotation works at any position
    "use_l2warp",  # of the loss
    "use_short_conv",  # fla never passes it to the layer; convolutions would show as tensors
}
MODULES = {
    "embedding": "model.embeddings",
    "norm": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "retention_norm": "attn_norm",
    "retention": "attn",
    "ffn_norm": "mlp_norm",
    "ffn": "mlp",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "o_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are fla's."""
    # safetensors' save_model keeps a matrix with two names under one of them.
    return "model.layers.0.attn.q_proj.weight" in names and bool({"model.embeddings.weight", "lm_head.weight"} & set(names))


def checkpoint_from(found: Found) -> Checkpoint:
    """Open a folder that fla's `save_pretrained` wrote.

    Raises:
        UserError: a field is missing or unusable, or the tensors are not those that the configuration describes.
    """
    if not found.settings:
        raise UserError(f"{found.path}: no config.json in the folder of the weights; copy the whole checkpoint folder")
    fields = Fields(found)
    config = model_config(fields)
    fields.warn_of_others(HARMLESS)
    found = with_embedding(found, "model.embeddings.weight", "lm_head.weight", config.tied_embeddings)
    fused_norm = any(name.endswith("g_norm_swish_gate.weight") for name in found.source.names)
    # Before 2025-02-09 fla kept gate and up projection in one matrix, rows of the gate first.
    packed = "model.layers.0.mlp.up_proj.weight" not in found.source.names

    def stored(name: str) -> Stored:
        in_file = file_name(name, fused_norm)
        if packed and name.endswith("ffn.up.weight"):
            return Stored(in_file.replace("up_proj", "gate_proj"), slice(config.ffn_size, None))
        if packed and name.endswith("ffn.gate.weight"):
            return Stored(in_file, slice(0, config.ffn_size))
        return Stored(in_file)

    return make_checkpoint(found, "fla", config, stored)


def model_config(fields: Fields) -> ModelConfig:
    """fla's RetNetConfig as ours; defaults are fla's, but the sizes that every saved config.json holds are required.

    Raises:
        UserError: a field is missing, or asks for something that is no plain RetNet.
    """
    fields.refuse("feature_map", None, "queries and keys would pass a nonlinearity first; train without feature_map to export")
    fields.refuse(
        "attn",
        None,
        "some layers are softmax attention, whose cache grows with the text; only models of retention alone are exported",
    )
    fields.refuse("attnres_block_size", None, "attention over residuals is not exported; train without attnres_block_size")
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_heads")
    ratio = fields.number("hidden_ratio", 2)
    default_ffn = 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)
    eps = fields.number("norm_eps", 1e-6)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_kv_heads", heads),
        head_key_dim=round(hidden_size * fields.number("expand_k", 1.0)) // max(heads, 1),
        head_value_dim=round(hidden_size * fields.number("expand_v", 2.0)) // max(heads, 1),
        ffn_size=fields.integer("intermediate_size", default_ffn),
        ffn_activation=cast(Literal["silu"], fields.choice("hidden_act", ACTIVATIONS, "swish")),
        norm_eps=eps,
        head_norm_eps=eps,
        head_norm_affine="shared" if fields.flag("elementwise_affine", True) else "none",
        output_gate=fields.flag("use_output_gate", True),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )


def file_name(name: str, fused_norm: bool) -> str:
    """The tensor in the file that holds a canonical weight."""
    modules = MODULES | {
        "gate": "gate_proj" if ".ffn." in name else "g_proj",
        "head_norm": "g_norm_swish_gate" if fused_norm else "g_norm",
    }
    return ".".join(modules.get(part, part) for part in name.split("."))
