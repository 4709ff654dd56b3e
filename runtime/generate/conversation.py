"""A conversation: messages and replies in one session, with branches, and a way back.

Rule: a message is read wholly and its reply kept as far as it came, or neither happened: an interrupted or failed reading
leaves the session where it stood before the message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.session import Session
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model


class _StoppedError(Exception):
    """Raised between two chunks of a message, to stop reading it."""


class Conversation:
    """Messages to a model, and what it makes of them.

    Args:
        model: the model, with a tokenizer.
        options: how replies are made; a seed is counted on with the position, so that replies differ.
        before, after: text around each message: the roles that the model was trained on, if any.
        keep: how many messages can be taken back.

    Attributes:
        branches: a session each; `fork` adds one.
        current: index of the one that goes on.
        stats: of the last reply.
    """

    def __init__(self, model: Model, options: Options, *, before: str = "", after: str = "\n", keep: int = 16) -> None:
        self._model, self._options, self._before, self._after = model, options, before, after
        self._keep = max(keep, 1)
        self._start: Snapshot | None = None
        self.branches = [model.session(keep=self._keep)]
        self.current = 0
        self.stats = Stats()

    @property
    def session(self) -> Session:
        """The session of the current branch."""
        return self.branches[self.current]

    def begin_with(self, text: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Read a text that comes before the conversation and that `reset` comes back to.

        Raises:
            UserError: it is empty or cannot be encoded.
        """
        session = self._model.session()
        session.feed(text, progress=progress)
        self._start = session.snapshot()
        self.reset()

    def say(self, message: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Read a message and reply.

        Args:
            message: one message.
            stopped: asked between tokens; true ends the reply there, or the message if it is still being read.

        Yields:
            The reply, piece by piece.

        Raises:
            UserError: the message cannot be read, or the model's logits are not finite; the message is taken back.
        """
        session, self.stats = self.session, Stats()

        def check(done: int, total: int) -> None:
            if stopped() and done < total:
                raise _StoppedError

        tokens = session.encode(self._line_break() + self._before + message + self._after)
        if not tokens:
            raise UserError("the message is empty")
        try:
            session.feed(tokens, self.stats, check)
            options = self._options
            if options.seed is not None:
                options = replace(options, seed=options.seed + session.position)
            for piece in session.generate(options, stats=self.stats):
                yield piece
                if stopped():
                    return
        except (UserError, _StoppedError) as error:
            session.rewind()
            if isinstance(error, UserError):
                raise

    def fork(self) -> int:
        """Go on in a copy; returns its index."""
        self.branches.append(self.session.fork())
        self.current = len(self.branches) - 1
        return self.current

    def switch(self, branch: int) -> None:
        """Go on in another branch.

        Raises:
            UserError: there is none of that number.
        """
        if not 0 <= branch < len(self.branches):
            raise UserError(f"there is no branch {branch + 1}; there are 1 to {len(self.branches)}")
        self.current = branch

    def rewind(self, messages: int = 1) -> None:
        """Take messages and their replies back.

        Raises:
            UserError: so many are not kept.
        """
        if not 1 <= messages <= self.session.kept:
            raise UserError(f"cannot take back {messages} messages: {self.session.kept} are kept, of at most {self._keep}")
        self.session.rewind(messages)

    def reset(self) -> None:
        """Back to the start of the current branch, or after the text it began with."""
        self.session.reset()
        if self._start is not None:
            self.session.restore(self._start)

    def save(self, path: str | Path) -> None:
        """Save the current branch to a file."""
        self.session.snapshot().save(path)

    def load(self, path: str | Path) -> None:
        """Go on, in the current branch, from a saved state; that can be taken back like a message."""
        snapshot = Snapshot.load(path)
        self.session.mark()
        try:
            self.session.restore(snapshot)
        except UserError:
            self.session.rewind()
            raise

    def _line_break(self) -> str:
        """A message begins on a line of its own, wherever the last reply was cut."""
        if self.session.position == 0 or self._before.startswith("\n"):
            return ""
        return "" if self._model.tokenizer.decode(self.session.tail).endswith("\n") else "\n"
