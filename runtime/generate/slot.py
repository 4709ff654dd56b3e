"""What a session knows of one sequence beside its state: how much it has read, and how that ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import State
from retnet_export.runtime.generate.sampling import Logits, Tokens
from retnet_export.runtime.generate.speculation import History
from retnet_export.runtime.generate.state import Snapshot

TAIL = 16
"""Tokens a session remembers literally: enough for text to join on to, and of constant size."""


@dataclass(eq=False)
class Slot:
    """One sequence. It keeps its identity when it moves to another place of its batch, and loses it when it is restored.

    Attributes:
        read: int32 (V,), how often each token was read; a continuation looks at this very array.
        position: tokens read so far.
        tail: the last of them.
        unread: spaces at the end of the text, for a tokenizer that reads them only together with what follows.
        history: more of the last tokens, which drafts are looked up in.
        ahead: the last tokens, as far as the state has not taken them in; they count everywhere else.
        logits: (V,) after the last token, where the runner does not hold them; None where it does.
    """

    read: NDArray[np.int32]
    position: int = 0
    tail: deque[int] = field(default_factory=lambda: deque(maxlen=TAIL))
    unread: str = ""
    history: History = field(default_factory=History)
    ahead: list[int] = field(default_factory=list)
    logits: Logits | None = None

    @classmethod
    def empty(cls, vocab_size: int) -> Slot:
        """At the start of a sequence."""
        return cls(np.zeros(vocab_size, np.int32))

    @classmethod
    def restored(cls, snapshot: Snapshot) -> Slot:
        """Where a snapshot stands."""
        return cls(
            snapshot.read.copy(),
            snapshot.position,
            deque(snapshot.tail, TAIL),
            snapshot.unread,
            History(snapshot.history.tolist() or snapshot.tail),
            logits=snapshot.logits,
        )

    def snapshot(self, model: str, state: State, logits: Logits | None) -> Snapshot:
        """This place, of that model, with that state and those logits (V,)."""
        return Snapshot(
            model=model,
            state=state,
            logits=None if logits is None else logits.copy(),
            read=self.read.copy(),
            tail=tuple(self.tail),
            unread=self.unread,
            history=self.history.tokens,
        )

    def note_read(self, tokens: Tokens) -> None:
        """Count tokens (T,) that the state has taken in, and whose logits the runner holds."""
        np.add.at(self.read, tokens, 1)
        listed = tokens.tolist()
        self.tail.extend(listed[-TAIL:])
        self.history.extend(listed)
        self.position += len(listed)
        self.logits = None
        if listed:
            self.unread = ""

    def choose(self, token: int, logits: Logits | None) -> None:
        """Count a token that was chosen; the state takes it in later. `logits` (V,) if a pass has shown what follows it."""
        self.read[token] += 1
        self.tail.append(token)
        self.history.note(token)
        self.position += 1
        self.unread = ""
        self.ahead.append(token)
        self.logits = logits
