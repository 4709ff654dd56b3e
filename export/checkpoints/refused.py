"""Models that cannot be exported, recognised by tensors that only they have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from retnet_export.export.checkpoints.base import listed
from retnet_export.export.checkpoints.sources import TensorSource, described
from retnet_export.runtime.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """A kind of model: a pattern of its tensors' names, what it is, and why that stands in the way."""

    pattern: str
    what: str
    why: str


REFUSALS = (
    Refusal(r"\.moe_layer\.", "mixture-of-experts layers", "only dense models are exported"),
    Refusal(r"\.[AB]\.(weight|bias)$", "multiway layers", "only models with one set of weights per layer are exported"),
    Refusal(
        r"_conv1d\.",
        "short convolutions (fla's use_short_conv)",
        "they need a state of their own; train without use_short_conv to export",
    ),
    Refusal(
        r"\.(attn|mlp)_res_|^model\.res_",
        "attention over residuals (fla's attnres_block_size)",
        "it is not implemented; train without attnres_block_size to export",
    ),
    Refusal(
        r"^model\.blocks\.\d+\.msr\.",
        "syncdoth/RetNet in its first months",
        "it computes differently (xPos scales, GroupNorm, an MLP with biases); train with its later version, or with fla",
    ),
    Refusal(r"\.decay_proj\.", "a decay that depends on the input (tensor_parallel)", "it is not implemented"),
    Refusal(
        r"\.retention\.(down_proj|group_norm)\.|^lm_head\.bias$",
        "XATL's fork of syncdoth/RetNet",
        "its retention computes differently; only syncdoth's own RetNets are exported",
    ),
    Refusal(
        r"^retentions\.\d+\.(W_[GO]|retentions\.)",
        "Jamie-Stirling/RetNet",
        "that model has neither embedding nor output layer, so there is nothing to generate with",
    ),
)


def refuse(source: TensorSource) -> None:
    """Refuse a model by name if its tensors show what it is."""
    for refusal in REFUSALS:
        if matches := [name for name in source.names if re.search(refusal.pattern, name)]:
            raise UserError(f"{described(source)}: {listed(matches, 2)} are of {refusal.what}: {refusal.why}")
