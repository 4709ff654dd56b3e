"""Prompts and drafts of many slots as runs: which rows go together, packed slot by slot, so that padding costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOGITS_AT_ONCE = 256
"""Rows of one run whose logits are asked for."""
FEW_ROWS = 128
"""A run of so few rows is captured at once, since its launches take longer than the GPU needs; a larger one when it comes again."""


@dataclass(frozen=True)
class Piece:
    """Rows of one run, packed slot by slot.

    Attributes:
        tokens, slot_of, index_of: of each row, its token, its slot, and which of the slot's tokens in this piece it is.
        lengths, needed, starts: of each slot, how many of its tokens the state takes, how many rows it has, and where they begin.
        kept: of each slot, tokens in front of its rows.
        picked, places: the rows whose logits are wanted, and which of those asked for they are: slot, and index in its row.
    """

    tokens: NDArray[np.int64]
    slot_of: NDArray[np.int32]
    index_of: NDArray[np.int32]
    lengths: NDArray[np.int64]
    needed: NDArray[np.int32]
    starts: NDArray[np.int32]
    kept: NDArray[np.int32]
    picked: NDArray[np.int32]
    places: tuple[NDArray[np.int64], NDArray[np.int64]]


def cut(
    tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64], kept: NDArray[np.int64], rows_at_once: int
) -> list[Piece]:
    """The runs that read a prompt.

    Args:
        tokens: (S, C).
        lengths: (S,), how many of a slot's tokens the state takes.
        rows: (S, R), of which tokens the logits are wanted; -1 for none.
        kept: (S,), tokens in front that need no row: their keys and values are there from the last pass.
        rows_at_once: rows of one run; more only if a slot has drafts and needs them.
    """
    needed = needed_rows(lengths, rows)
    if len(tokens) == 1 and 0 < needed[0] - kept[0] <= rows_at_once:
        return [_whole(tokens[0], lengths, rows[0], int(kept[0]), int(needed[0]))]
    found: list[Piece] = []
    begun = kept
    for take in takes(lengths - kept, needed - kept, rows.shape[1], rows_at_once):
        ends, starts = begun + take, np.cumsum(take) - take
        before = np.zeros_like(kept) if found else kept
        slot, place = np.nonzero((rows >= begun[:, None]) & (rows < ends[:, None]))
        found.append(
            Piece(
                tokens=np.concatenate([row[first:end] for row, first, end in zip(tokens, begun, ends, strict=True)]),
                slot_of=np.repeat(np.arange(len(tokens), dtype=np.int32), take),
                index_of=np.concatenate([np.arange(a, a + n, dtype=np.int32) for a, n in zip(before, take, strict=True)]),
                lengths=np.clip(lengths - begun, 0, take) + before,
                needed=take.astype(np.int32),
                starts=starts.astype(np.int32),
                kept=before.astype(np.int32),
                picked=(starts[slot] + rows[slot, place] - begun[slot]).astype(np.int32),
                places=(slot, place),
            )
        )
        begun = ends
    return found


def _whole(tokens: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64], kept: int, needed: int) -> Piece:
    """What one sequence reads in one run, as `cut` would make it, in a fifth of the time: a pass over a draft waits for it."""
    count = needed - kept
    places = np.flatnonzero(rows >= kept)
    return Piece(
        tokens=tokens[kept:needed],
        slot_of=np.zeros(count, np.int32),
        index_of=np.arange(kept, needed, dtype=np.int32),
        lengths=lengths,
        needed=np.array([count], np.int32),
        starts=np.zeros(1, np.int32),
        kept=np.array([kept], np.int32),
        picked=(rows[places] - kept).astype(np.int32),
        places=(np.zeros(len(places), np.int64), places),
    )


def needed_rows(lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens of each slot (S,) must be looked at."""
    needed: NDArray[np.int64] = np.maximum(lengths, rows.max(1, initial=-1) + 1)
    return needed


def still_right(drafts: Sequence[NDArray[np.int64]], tokens: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of the tokens that each slot (S,) begins with are those of its last draft.

    Args:
        drafts: of each slot, the tokens that the last pass looked at and the state did not take; none where that is not known.
        tokens: (S, C), to be read now.
        most: (S,), at most.
    """
    kept = np.zeros(len(tokens), np.int64)
    for slot, draft in enumerate(drafts[: len(tokens)]):
        count = min(len(draft), int(most[slot]))
        wrong = np.flatnonzero(draft[:count] != tokens[slot, :count])
        kept[slot] = wrong[0] if len(wrong) else count
    return kept


def takes(lengths: NDArray[np.int64], needed: NDArray[np.int64], wanted: int, rows_at_once: int) -> list[NDArray[np.int64]]:
    """How many rows of each slot go into each run.

    A slot with drafts goes whole, since drafts leave nothing for a later run to go on from; others are cut where a run is full.

    Args:
        lengths: (S,), tokens that the state takes.
        needed: (S,), rows of a slot; more than its length with drafts.
        wanted: logits asked for of a slot, at most.
        rows_at_once: rows of one run.
    """
    done, found = np.zeros_like(needed), []
    while (done < needed).any():
        take, room, logits = np.zeros_like(needed), rows_at_once, LOGITS_AT_ONCE
        for slot in np.flatnonzero(done < needed):
            left, drafts = int(needed[slot] - done[slot]), needed[slot] > lengths[slot]
            if take.any() and (logits < wanted or (drafts and left > room)):
                continue
            take[slot] = left if drafts else min(left, room)
            room -= int(take[slot])
            logits -= wanted
            if room <= 0:
                break
        found.append(take)
        done += take
    return found


def padded_rows(rows: int) -> int:
    """Rows that a run is padded to: few different numbers where runs are captured."""
    return padded_count(rows) if rows <= FEW_ROWS else -(-rows // 64) * 64


def padded_count(count: int) -> int:
    """The next power of two, at least eight."""
    return max(8, 1 << (count - 1).bit_length())
