"""Tensors under the names that their package gave them, whatever wrapped the model when it was saved.

    module._orig_mod.model.layers.0.attn.q_proj.weight   ->   model.layers.0.attn.q_proj.weight

`torch.compile`, FSDP and activation checkpointing put a word of their own wherever they wrap; DataParallel, DistributedDataParallel
and DeepSpeed put `module.` in front; a LightningModule puts the attribute in front that holds the model, most often `model.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from retnet_export.export.checkpoints.sources import Array, TensorSource, described
from retnet_export.runtime.errors import UserError

WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Parts of a name that a wrapper adds, wherever they stand."""
PARALLEL = "module"
"""What parallel training adds in front."""


class RenamedSource:
    """A source whose tensors have other names.

    Args:
        names: the name in the files, by the new name.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, dict(names)

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def tensor(self, name: str, rows: slice | None = None) -> Array:
        return self._source.tensor(self._names[name], rows)


def candidates(source: TensorSource) -> Iterator[TensorSource]:
    """The source without what wrappers add to names, and then, for each first part of them, without that part.

    Raises:
        UserError: two tensors would have the same name.
    """
    plain = _renamed(source, {name: _unwrapped(name) for name in source.names})
    yield plain
    for first in dict.fromkeys(name.partition(".")[0] for name in plain.names if "." in name):
        short = {name: name.removeprefix(f"{first}.") for name in plain.names}
        if len(set(short.values())) == len(short):
            yield _renamed(plain, short)


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == PARALLEL:
        del parts[0]
    return ".".join(parts)


def _renamed(source: TensorSource, new_names: Mapping[str, str]) -> TensorSource:
    """The same tensors, called `new_names[name]`."""
    old_names: dict[str, str] = {}
    for old, new in new_names.items():
        if new in old_names:
            raise UserError(
                f"{described(source)}: {old_names[new]} and {old} are one tensor under two names, with and without a wrapper's "
                "prefix; save one state_dict"
            )
        old_names[new] = old
    return source if all(old == new for new, old in old_names.items()) else RenamedSource(source, old_names)
