"""Checkpoints: one reader per family behind `open_checkpoint`, which recognises the family by what it finds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from retnet_export.export.checkpoints import fla, syncdoth, torchscale
from retnet_export.export.checkpoints.base import Checkpoint, listed
from retnet_export.export.checkpoints.files import Found, find
from retnet_export.export.checkpoints.names import candidates
from retnet_export.export.checkpoints.refused import refuse
from retnet_export.export.checkpoints.sources import described
from retnet_export.runtime.errors import UserError


class Family(Protocol):
    """What the module of a family offers."""

    def recognises(self, names: Collection[str]) -> bool:
        """Whether tensors of these names are the family's."""

    def checkpoint_from(self, found: Found) -> Checkpoint:
        """Open what was found."""


FAMILIES: Sequence[Family] = (fla, torchscale, syncdoth)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a trained RetNet, whichever public family it is of. Names of tensors decide; `model_type` is shared by several.

    Args:
        path: a Hugging Face folder, a repository of a hub cache, or a .pt file (or the folder with it alone).

    Raises:
        UserError: nothing is there, it is damaged, or it is of no family that can be exported.
    """
    found = find(Path(path))
    for source in candidates(found.source):
        refuse(source)
        names = set(source.names)
        for family in FAMILIES:
            if family.recognises(names):
                return family.checkpoint_from(replace(found, source=source))
    raise UserError(
        f"{described(found.source)}: not a known family (flash-linear-attention, torchscale, fairseq, syncdoth/RetNet); "
        f"its tensors are {listed(sorted(found.source.names), 4)}"
    )
