"""flash-linear-attention (`model_type: retnet` with `num_heads`): Hugging Face folders.

Source: fla/models/retnet/configuration_retnet.py, modeling_retnet.py and fla/layers/multiscale_retention.py (0.6.0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from retnet_export.export.checkpoints.base import Checkpoint, Fields, check_weights, token_ids
from retnet_export.export.checkpoints.safetensors import SafetensorsSource
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.config import ModelConfig

ACTIVATIONS = {"swish": "silu", "silu": "silu"}
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


def read(folder: Path, document: dict[str, Any]) -> Checkpoint:
    """Open a folder that fla's `save_pretrained` wrote.

    Raises:
        UserError: a field is missing or unusable, or the tensors are not those that the configuration describes.
    """
    config = model_config(Fields(folder / "config.json", document))
    source = SafetensorsSource(folder)
    fused_norm = any(name.endswith("g_norm_swish_gate.weight") for name in source.names)
    names = {name: file_name(name, fused_norm) for name in weight_shapes(config)}
    check_weights(config, source, names, ignored=["lm_head.weight"] if config.tied_embeddings else [])
    tokenizer = folder / "tokenizer.json"
    bos_id, eos_ids = token_ids(document)
    return Checkpoint(
        path=folder,
        family="fla",
        config=config,
        read=lambda name: source.read(names[name]),
        files=source.files,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


def model_config(fields: Fields) -> ModelConfig:
    """fla's RetNetConfig as ours; defaults are fla's."""
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_heads")
    ratio = fields.number("hidden_ratio", 2)
    default_ffn = 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)
    eps = fields.number("norm_eps", 1e-6)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_key_dim=int(hidden_size * fields.number("expand_k", 1.0)) // heads,
        head_value_dim=int(hidden_size * fields.number("expand_v", 2.0)) // heads,
        ffn_size=fields.integer("intermediate_size", default_ffn),
        ffn_activation=cast(Literal["silu"], fields.choice("hidden_act", ACTIVATIONS, "swish")),
        norm_eps=eps,
        head_norm_eps=eps,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )


def file_name(name: str, fused_norm: bool) -> str:
    """The tensor in the file that holds a canonical weight."""
    modules = MODULES | {
        "gate": "gate_proj" if ".ffn." in name else "g_proj",
        "head_norm": "g_norm_swish_gate" if fused_norm else "g_norm",
    }
    return ".".join(modules.get(part, part) for part in name.split("."))
