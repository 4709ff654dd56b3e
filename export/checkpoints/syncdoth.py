"""syncdoth/RetNet, the Hugging Face port of torchscale (`model_type: retnet` with `decoder_…`): torchscale under `model.`.

Source: retnet/{configuration,modeling}_retnet.py at commit 083360cc55d9.
"""

from __future__ import annotations

from collections.abc import Collection

from retnet_export.export.checkpoints.base import HUGGING_FACE_FIELDS, Checkpoint, Fields, listed, with_embedding, words
from retnet_export.export.checkpoints.files import Found
from retnet_export.export.checkpoints.torchscale import READ_FROM_TENSORS, TRAINING_FIELDS, make_decoder, model_config
from retnet_export.runtime.errors import UserError

HARMLESS = (
    HUGGING_FACE_FIELDS
    | READ_FROM_TENSORS
    | TRAINING_FIELDS
    | words("use_glu use_ffn_rms_norm")  # tensors show them
    | words("disable_fused_ops forward_impl output_retentions z_loss_coeff")
)
XATL_FIELDS = words("""
    groupnorm_affine hybrid_attention_layers lm_head_bias parallel_residual retnet_bottleneck retnet_stability_update
    rotary_percentage shared_attention_norm use_bias use_rms_norm
""")


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are syncdoth's."""
    # A torchscale model in an attribute `model` has the same names, but for its output matrix.
    return (
        "model.layers.0.retention.q_proj.weight" in names
        and bool({"model.embed_tokens.weight", "lm_head.weight"} & set(names))
        and "model.output_projection.weight" not in names
    )


def checkpoint_from(found: Found) -> Checkpoint:
    """Open a folder that syncdoth's `save_pretrained` wrote.

    Raises:
        UserError: a field is missing or unusable, or it is a fork with other maths.
    """
    if xatl := sorted(XATL_FIELDS & set(found.settings)):
        raise UserError(
            f"{found.settings_from}: {listed(xatl)} are fields of XATL's fork, which is another model even with its defaults: it "
            "does not divide the state by √Σγ, has other decays, and rotates differently on GPU and CPU; only syncdoth's "
            "own RetNets are exported"
        )
    if not found.settings:
        raise UserError(f"{found.path}: no settings; put the model's config.json into the folder of the weights")
    fields = Fields(found)
    tied = fields.flag("tie_word_embeddings", False)
    found = with_embedding(found, "model.embed_tokens.weight", "lm_head.weight", tied)
    config = model_config(found, fields, "model.", tied)
    fields.warn_of_others(HARMLESS)
    return make_decoder(found, "syncdoth", config, "model.", "lm_head")
