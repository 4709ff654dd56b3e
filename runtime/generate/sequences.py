"""The sequences of a runner: they read, they show their logits, and they may be some tokens ahead of the runner's state.

Rule: callers see each sequence after its last token; only this module knows which tokens the state has taken in. A chosen token
enters the state with the next pass. If a pass over a draft has already shown the logits after it, it may wait until something needs
the state itself. Where the runner can undo a pass, guesses enter the state on trial: if they come true, nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import Backend, Copying, Narrowing, Undoing, chunk_tokens, initial_state
from retnet_export.runtime.bundle.manifest import Manifest
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.logits import LastLogits, View
from retnet_export.runtime.generate.sampling import Logits, Tokens
from retnet_export.runtime.generate.slot import Slot
from retnet_export.runtime.generate.state import Snapshot, model_hash


@dataclass(frozen=True)
class _Trial:
    """What the last pass let the state take in: tokens that count, and guesses at what would be chosen after them, (n, …) each."""

    certain: Sequence[list[int]]
    guessed: Sequence[list[int]]


class Sequences:
    """Sequences that step together.

    Args:
        backend: what runs the bundle.
        manifest: the bundle's.
        batch: how many.

    Attributes:
        slots: what is known of each, by its place in the batch; the runner's slots have the same order.
        chunk: the most tokens of a sequence that one pass takes.

    Raises:
        UserError: there is not enough memory for so many.
    """

    def __init__(self, backend: Backend, manifest: Manifest, batch: int) -> None:
        try:
            self._runner = backend.open_runner(batch)
        except MemoryError as error:
            raise UserError(
                f"{manifest.name}: not enough memory for the state of {batch} sequences, "
                f"{manifest.state_bytes / 1e6:.1f} MB each; use a smaller batch"
            ) from error
        self.manifest, self.batch, self.backend = manifest, batch, backend
        self.chunk = chunk_tokens(backend, manifest.graphs["prefill"].chunk_size)
        self._vocab_size = manifest.model.vocab_size
        self._narrowing = self._runner if isinstance(self._runner, Narrowing) else None
        self._undoing = self._runner if isinstance(self._runner, Undoing) else None
        self._copying = self._runner if isinstance(self._runner, Copying) else None
        self.slots = [Slot.empty(self._vocab_size) for _ in range(batch)]
        self._last = LastLogits(self._runner, self.slots, manifest.state)
        self._forget()

    def _forget(self) -> None:
        self._last.changed()
        self._in_use = self.batch  # the first so many places hold sequences
        self._trial: _Trial | None = None
        self._failed = False

    def check_whole(self) -> None:
        """Refuse to go on after a failure.

        Raises:
            UserError: an earlier pass failed, so that the state is unknown.
        """
        if self._failed:
            remedy = "reset() or restore()" if self.batch == 1 else "reset()"
            raise UserError(f"an earlier step of this session failed, so its state is unknown; call {remedy}")

    @property
    def logits(self) -> Logits | None:
        """Float32 (B, V) after the last tokens, valid until the next pass; None if nothing was read."""
        if any(slot.ahead and slot.logits is None for slot in self.slots):
            self.settle()
        return self._last.table() if any(slot.position for slot in self.slots) else None

    def last(self) -> Logits:
        """Float32 (B, V) after a step or a prefill, valid until the next pass."""
        return self._runner.logits()

    def view(self, place: int) -> View:
        """One sequence's logits, for a continuation to choose from."""
        self.check_whole()
        if self.slots[place].ahead and self.slots[place].logits is None:
            self.settle()  # something came in the way of the pass that was to read it
        return self._last.view(place)

    # Passes

    def checked(self, tokens: Sequence[int] | Tokens) -> Tokens:
        """Tokens of this vocabulary.

        Raises:
            UserError: one is not.
        """
        array = np.asarray(tokens, np.int64)
        outside = (array < 0) | (array >= self._vocab_size)
        if outside.any():
            raise UserError(f"token {int(array[outside][0])} is not in the vocabulary of {self._vocab_size}")
        return array

    def step(self, tokens: Tokens) -> None:
        """Read a token of each of the first n sequences, (n,); what the other ones held is given up.

        Raises:
            UserError: the shape does not fit, or a token is not in the vocabulary; likewise below.
        """
        if tokens.ndim != 1 or not 1 <= len(tokens) <= self.batch:
            raise UserError(f"expected one token for each of {self.batch} sequences, found shape {tokens.shape}")
        self.checked(tokens)
        self.settle()
        self._failed = True
        self._runner.step(self._widened(tokens[:, None])[:, 0])
        self._note_read(list(tokens[:, None]))

    def prefill(self, tokens: Tokens, lengths: NDArray[np.int64]) -> None:
        """Read tokens of the first n sequences, (n, C), of each as many as `lengths` (n,) says."""
        self._check_chunk(tokens)
        if lengths.shape != tokens.shape[:1] or lengths.min() < 0 or lengths.max() > tokens.shape[1]:
            raise UserError(f"lengths {lengths.tolist()} do not fit {len(tokens)} rows of {tokens.shape[1]} tokens")
        self.checked(tokens[np.arange(tokens.shape[1]) < lengths[:, None]])
        self.settle()
        self._failed = True
        self._read(tokens, lengths)
        self._note_read([row[:length] for row, length in zip(tokens, lengths, strict=True)])

    def score(self, tokens: Tokens) -> NDArray[np.float32]:
        """Read tokens of the first n sequences, (n, C), and show the logits after each, (n, C, V)."""
        self._check_chunk(self.checked(tokens))
        self.settle()
        self._failed = True
        count, width = tokens.shape
        wide = self._widened(tokens)
        rows = np.tile(np.arange(width), (len(wide), 1))
        logits = self._runner.score(wide, np.full(len(wide), width), rows)[:count]
        self._note_read(list(tokens))
        for slot, own in zip(self.slots, logits, strict=False):
            slot.logits = own[-1].copy()  # the others are the caller's own
        return logits

    @property
    def undoes(self) -> bool:
        """Whether guesses may enter the state on trial."""
        return self._undoing is not None

    def waiting(self, count: int) -> list[int]:
        """How many tokens the state has yet to take in, of each of the first so many sequences."""
        self._end_trial(count)
        return [len(slot.ahead) for slot in self.slots[:count]]

    def take_in(self, drafts: Sequence[list[int]], on_trial: int = 0) -> Sequence[Logits | None]:
        """Let the state take in what was chosen in the first n sequences, and look at what follows drafts in the same pass.

        Args:
            drafts: what may follow in each, (n,), maybe nothing.
            on_trial: the state takes in so many tokens of each, too, if it `undoes`.

        Returns:
            For each sequence its logits after the last token and after each one of the draft, (1 + len(draft), V); None if nothing
            was drafted, and the logits are where the runner has them.
        """
        self.check_whole()
        self._end_trial(len(drafts))
        self._failed = True
        slots = self.slots[: len(drafts)]
        certain, guessed = [slot.ahead for slot in slots], [draft[:on_trial] for draft in drafts]
        shown: Sequence[Logits | None] = [None] * len(slots)
        if not any(drafts) and max(map(len, certain)) == 1:
            self._runner.step(self._widened(np.array(certain))[:, 0])
        else:
            shown = self._pass(certain, guessed, drafts)
            self._trial = _Trial(certain, guessed) if any(guessed) else None
        for slot, rows in zip(slots, shown, strict=True):
            slot.ahead, slot.logits = [], None if rows is None else rows[0]
        self._last.changed()
        self._failed = False
        return shown

    def settle(self) -> None:
        """Let the state take in all tokens that count, and nothing else; all logits stay as they are."""
        self.check_whole()
        self._end_trial(self._in_use)
        slots = self.slots[: self._in_use]
        if not any(slot.ahead for slot in slots):
            return
        for place, slot in enumerate(slots):
            if slot.position and slot.logits is None and not slot.ahead:
                slot.logits = self._last.row(place).copy()  # the runner will have others
        self._failed = True
        lengths = np.array([len(slot.ahead) for slot in slots])
        self._read(_rows([slot.ahead for slot in slots]), lengths)
        for slot in slots:
            slot.ahead = []
        self._last.changed()
        self._failed = False

    def _end_trial(self, count: int) -> None:
        """Keep what the state took in on trial if it came true in the first so many sequences; take it back if not."""
        if self._trial is None or self._undoing is None:
            return
        (certain, guessed), self._trial = (self._trial.certain, self._trial.guessed), None
        slots = self.slots[:count]
        if all(slot.ahead[: len(guess)] == guess for slot, guess in zip(slots, guessed, strict=False)):
            for slot, guess in zip(slots, guessed, strict=False):
                del slot.ahead[: len(guess)]
        else:
            self._failed = True
            self._undoing.undo()
            for slot, own in zip(slots, certain, strict=False):
                slot.ahead = [*own, *slot.ahead]
            self._failed = False

    def _pass(
        self, certain: Sequence[Sequence[int]], guessed: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]
    ) -> list[Logits]:
        """Let the state take in tokens and guesses, with which drafts begin; logits after the tokens and after each one drafted."""
        wanted = 1 + max(map(len, drafts))
        wide = self._widened(_rows([[*own, *draft] for own, draft in zip(certain, drafts, strict=True)]))
        lasts = np.array([[len(own) - 1, len(draft)] for own, draft in zip(certain, drafts, strict=True)])
        rows = lasts[:, :1] + np.minimum(np.arange(wanted), lasts[:, 1:])  # beyond its end a draft's last one
        lengths = np.array([len(own) + len(guess) for own, guess in zip(certain, guessed, strict=True)])
        more = len(wide) - len(drafts)
        score = self._runner.score if self._undoing is None or not any(guessed) else self._undoing.score_on_trial
        if more:
            lengths, rows = np.pad(lengths, (0, more)), np.pad(rows, ((0, more), (0, 0)))
        logits = score(wide, lengths, rows)
        return [logits[place, : 1 + len(draft)] for place, draft in enumerate(drafts)]

    def _check_chunk(self, tokens: Tokens) -> None:
        if tokens.ndim != 2 or not 1 <= len(tokens) <= self.batch or not 1 <= tokens.shape[1] <= self.chunk:
            raise UserError(f"expected up to {self.chunk} tokens for each of {self.batch} sequences, found shape {tokens.shape}")

    def _read(self, tokens: Tokens, lengths: NDArray[np.int64]) -> None:
        wide = self._widened(tokens)
        self._runner.prefill(wide, np.pad(lengths, (0, len(wide) - len(lengths))))

    def _note_read(self, tokens: Sequence[Tokens]) -> None:
        """A pass over these tokens of the first sequences has succeeded."""
        for slot, own in zip(self.slots, tokens, strict=False):
            slot.note_read(own)
        self._last.changed()
        self._failed = False

    def _widened(self, tokens: Tokens) -> Tokens:
        """Tokens (n, C) of the first n sequences as the runner wants them: as they are if it can leave the others out."""
        self._in_use = len(tokens)
        if self._narrowing is not None:
            self._narrowing.narrow(len(tokens))
            return tokens
        return np.pad(tokens, ((0, self.batch - len(tokens)), (0, 0)))

    # Places

    def reset(self) -> None:
        """Back to the start of all sequences, whatever has happened."""
        start = initial_state(self.manifest.state)
        for place in range(self.batch):
            self._runner.write_state(place, start)
            self.slots[place] = Slot.empty(self._vocab_size)
        self._forget()

    def snapshot(self, place: int) -> Snapshot:
        """A copy of one sequence."""
        self.settle()
        slot = self.slots[place]
        logits = self._last.row(place) if slot.position else None
        return slot.snapshot(model_hash(self.manifest), self._runner.read_state(place), logits)

    def restore(self, snapshot: Snapshot, place: int) -> None:
        """Let a sequence go on from a snapshot, which fits the model; a single one may do so after a failure."""
        if self.batch > 1:
            self.check_whole()
            self._end_trial(self._in_use)
        self._trial = None
        self._runner.write_state(place, snapshot.state)
        self.slots[place] = Slot.restored(snapshot)
        self._in_use = max(self._in_use, place + 1)
        self._failed = False

    def move(self, source: int, target: int) -> None:
        """Let one sequence go on in another place."""
        self.check_whole()
        self._end_trial(self._in_use)
        slot = self.slots[source]
        if slot.position and slot.logits is None:
            slot.logits = self._last.row(source).copy()  # the runner has them in a row that another sequence will get
        if self._copying is not None:
            self._copying.copy_state(source, target)
        else:
            self._runner.write_state(target, self._runner.read_state(source))
        self.slots[target], self.slots[source] = slot, Slot.empty(self._vocab_size)


def _rows(tokens: Sequence[Sequence[int]]) -> Tokens:
    """Tokens of several sequences as one array, (n, C); what one has less is padding."""
    rows = np.zeros((len(tokens), max(map(len, tokens))), np.int64)
    for row, own in zip(rows, tokens, strict=True):
        row[: len(own)] = own
    return rows
