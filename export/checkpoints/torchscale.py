"""torchscale, Microsoft's reference: a .pt file, bare or inside a fairseq checkpoint; and what its Hugging Face port shares.

Source: torchscale 0.3.0, architecture/{config,retnet}.py and component/{multiscale_retention,gate_linear_unit,
feedforward_network,rms_norm}.py; before 2023-09-28, the same at commit e2db7ae123e1.

Tensors decide wherever they can, because settings mislead: fairseq applies `deepnorm` after RetNetConfig has derived
pre- or post-norm from it, so a model with deepnorm may be pre-norm. The saved buffers `angle` and `decay` are checked and
not used: files in half precision have rounded them too, by up to 2⁻⁹ of the phase.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from retnet_export.export.checkpoints.base import Checkpoint, Fields, Stored, make_checkpoint, rows, with_embedding, words
from retnet_export.export.checkpoints.files import Found
from retnet_export.export.checkpoints.folders import ARGS
from retnet_export.export.checkpoints.sources import described
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.errors import UserError

ACTIVATIONS = {"gelu": "gelu", "swish": "silu", "silu": "silu", "relu": "relu"}
OLD_HEAD_NORM_EPS = 1e-6
"""Before 2023-09-28 the head norm's eps did not follow layernorm_eps."""
BUFFER_ROUNDING = 2.0**-7
"""Saved buffers may differ from exact ones by bfloat16's rounding, with room; another decay differs by far more."""
READ_FROM_TENSORS = words("decoder_normalize_before decoder_value_embed_dim subln vocab_size")
"""Fields that settings of some kind lack, or state wrongly, and that tensors show."""
TRAINING_FIELDS = words("""
    activation_dropout checkpoint_activations chunkwise_recurrent ddp_rank drop_path_rate dropout fsdp max_rel_pos
    max_target_positions moe_eval_capacity_token_fraction moe_expert_count moe_gating_use_fp32
    moe_normalize_gate_prob_before_dropping moe_second_expert_policy moe_top1_expert recurrent_chunk_size rel_pos_buckets
    use_xmoe xpos_rel_pos xpos_scale_base
""")
"""Fields of RetNetConfig that do not reach the logits of a trained dense model."""
MODULES = {
    "embedding": "embed_tokens",
    "embedding_norm": "layernorm_embedding",
    "norm": "layer_norm",
    "retention_norm": "retention_layer_norm",
    "ffn_norm": "final_layer_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "out_proj",
    "down": "fc2",
    "inner_norm": "ffn_layernorm",
}


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are torchscale's, bare or in fairseq's `decoder.`."""
    return any(f"{prefix}layers.0.retention.q_proj.weight" in names for prefix in ("", "decoder."))


def checkpoint_from(found: Found) -> Checkpoint:
    """Open a torchscale or fairseq file.

    Raises:
        UserError: it has no settings, or is a model that cannot be exported.
    """
    prefix = "decoder." if "decoder.layers.0.retention.q_proj.weight" in found.source.names else ""
    if not found.settings:
        raise UserError(
            f"{found.path}: has tensors but no settings; put {ARGS} into its folder, a JSON object of the "
            "fields of its RetNetConfig (`json.dumps(vars(config))`)"
        )
    fields = Fields(found)
    fields.refuse("multiway", False, "multiway models have two sets of weights per layer; only single-way models are exported")
    fields.refuse("moe_freq", 0, "mixture-of-experts layers are not exported; only dense models are")
    fields.refuse("no_output_layer", False, "without an output layer there are no logits; only language models are exported")
    tied = fields.flag("share_decoder_input_output_embed", False)
    found = with_embedding(found, f"{prefix}embed_tokens.weight", f"{prefix}output_projection.weight", tied)
    config = model_config(found, fields, prefix, tied)
    if found.settings_from.endswith(ARGS):  # fairseq's hold a whole training run, of which RetNetConfig takes what it knows
        fields.warn_of_others(READ_FROM_TENSORS | TRAINING_FIELDS)
    return make_decoder(found, "torchscale", config, prefix, f"{prefix}output_projection")


def model_config(found: Found, fields: Fields, prefix: str, tied: bool) -> ModelConfig:
    """RetNetConfig and tensors as our configuration; defaults are RetNetConfig's.

    Args:
        prefix: of the decoder's tensors.
        tied: whether the output matrix is the embedding.

    Raises:
        UserError: a field is missing or unusable, or the modules are those of no known commit of torchscale.
    """
    source = found.source
    names = set(source.names)
    layer = f"{prefix}layers.0"
    biased, layer_norm = f"{layer}.retention.q_proj.bias" in names, f"{layer}.retention_layer_norm.bias" in names
    glu = f"{layer}.ffn.gate.weight" in names
    if biased != layer_norm or (biased and glu):
        raise UserError(
            f"{described(source)}: mixes modules of before and after 2023-09-28 (biased projections: {_yes(biased)}, LayerNorm: "
            f"{_yes(layer_norm)}, gated feed-forward: {_yes(glu)}); no known commit of torchscale does that, so "
            "what the model computes is unknown"
        )
    hidden_size, heads = fields.integer("decoder_embed_dim", 768), fields.integer("decoder_retention_heads", 3)
    layers, eps = fields.integer("decoder_layers", 12), fields.number("layernorm_eps", 1e-6)
    inner_norm = f"{layer}.ffn.ffn_layernorm"
    pre_norm = f"{prefix}layer_norm.weight" in names
    return ModelConfig(
        vocab_size=rows(source, f"{prefix}embed_tokens.weight"),
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_key_dim=hidden_size // max(heads, 1),
        head_value_dim=rows(source, f"{layer}.retention.v_proj.weight") // max(heads, 1),
        ffn_size=fields.integer("decoder_ffn_embed_dim", 1280),
        decay="log_spaced" if fields.flag("use_lm_decay", False) else "power_of_two",
        rotary_layout="interleaved",
        rotary_spacing="inclusive",
        scaled="key",
        score_norm=True,
        head_norm="layer" if biased else "rms",
        head_norm_affine="none",
        head_norm_eps=OLD_HEAD_NORM_EPS if biased else eps,
        retention_bias=biased,
        ffn="glu" if glu else "mlp",
        ffn_activation=cast(Literal["silu", "gelu", "relu"], fields.choice("activation_fn", ACTIVATIONS, "gelu")),
        ffn_bias=not glu,
        ffn_inner_norm="none" if f"{inner_norm}.weight" not in names else "layer" if f"{inner_norm}.bias" in names else "rms",
        norm="layer" if layer_norm else "rms",
        norm_eps=eps,
        post_norm=not pre_norm,
        final_norm=pre_norm,
        residual_scale=(2 * layers) ** 0.25 if fields.flag("deepnorm", False) else 1.0,
        embedding_scale=1.0 if fields.flag("no_scale_embedding", True) else hidden_size**0.5,
        embedding_norm=fields.flag("layernorm_embedding", False),
        tied_embeddings=tied,
    )


def make_decoder(found: Found, family: str, config: ModelConfig, prefix: str, head: str) -> Checkpoint:
    """A checkpoint of torchscale's tensors under `prefix`, with the output matrix called `head`.

    Raises:
        UserError: the tensors are not those that the configuration describes.
    """
    angle, decay = f"{prefix}retnet_rel_pos.angle", f"{prefix}retnet_rel_pos.decay"
    checkpoint = make_checkpoint(
        found,
        family,
        config,
        lambda name: Stored(f"{head}.weight" if name == "head.weight" else prefix + file_name(name, config)),
        ignored={angle, decay},
    )
    for name, exact in ((angle, np.repeat(config.theta, 2)), (decay, np.log(config.gamma))):
        if name in found.source.names:
            _check_buffer(found, name, exact)
    return checkpoint


def _check_buffer(found: Found, name: str, exact: NDArray[np.float64]) -> None:
    saved = np.asarray(found.source.tensor(name), np.float64)
    if saved.shape != exact.shape or not np.allclose(saved, exact, rtol=BUFFER_ROUNDING, atol=0):
        raise UserError(
            f"{described(found.source)}: its saved {name} is {list(saved.shape)} {_numbers(saved)}, torchscale's is "
            f"{list(exact.shape)} {_numbers(exact)} with these settings; it was trained by code with another rotation or decay"
        )


def file_name(name: str, config: ModelConfig) -> str:
    """The tensor that holds a canonical weight, without the prefix."""
    # torchscale activates fc1, which is our gate where there is one; its own `gate` stays linear.
    modules = MODULES | (
        {"gate": "g_proj"} if ".ffn." not in name else {"gate": "fc1", "up": "gate"} if config.ffn == "glu" else {"up": "fc1"}
    )
    return ".".join(modules.get(part, part) for part in name.split("."))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _numbers(values: NDArray[np.float64], most: int = 3) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values[:most]) + (", …)" if len(values) > most else ")")
