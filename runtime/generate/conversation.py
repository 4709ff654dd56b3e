"""A conversation: messages and replies in one session, with branches and undo.

Rule: a message is read completely and its reply kept as far as it was generated, or neither happens: an interrupted or
failed reading leaves the session as it was before the message.

What the model sees is always what the template makes of all messages. A conversation remembers what text its state has read;
where that is how the new text begins, only the rest is read. A template may also change what it said before (trim a reply, say):
then the reading goes on from the last place that still holds.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Generation, Options
from retnet_export.runtime.generate.session import Session
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.generate.templates import Message, PlainTemplate, Template

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model


class _StoppedError(Exception):
    """Raised between two chunks of a message, to stop reading it."""


@dataclass(frozen=True)
class _Moment:
    """A place in a conversation.

    Attributes:
        messages: up to there.
        text: what the state has read, as the template renders it; None if that is not known.
        ended: whether the last reply ended with the token that ends a text, and the state has read that.
        snapshot: the state; None for where the session stands now.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = ""
    ended: bool = False
    snapshot: Snapshot | None = None

    def begins(self, text: str) -> bool:
        """Whether a text can be read on from here."""
        return self.text is not None and text.startswith(self.text)


@dataclass
class _Branch:
    """One branch of a conversation.

    Attributes:
        session: where it stands.
        now: what it has read.
        kept: the places before its last messages.
        before_reply: the place between the last message and its reply.
    """

    session: Session
    kept: deque[_Moment]
    now: _Moment = field(default_factory=_Moment)
    before_reply: _Moment | None = None

    def moment(self) -> _Moment:
        return replace(self.now, snapshot=self.session.snapshot())

    def return_to(self, moment: _Moment) -> None:
        assert moment.snapshot is not None
        self.session.restore(moment.snapshot)
        self.now, self.before_reply = replace(moment, snapshot=None), None


class Conversation:
    """Messages to a model and its replies.

    Args:
        model: the model, with a tokenizer.
        options: how replies are made; the position is added to a seed, so that replies differ.
        template: how messages become text; the model's own if None, or `before` and `after` if it has none.
        before: text before each message, for models without a template.
        after: text after each message, likewise.
        keep: how many messages `rewind` can remove.

    Attributes:
        options: of the replies to come; may be replaced.
        current: index of the branch that goes on.
        stats: of the last reply.
    """

    def __init__(
        self,
        model: Model,
        options: Options,
        *,
        template: Template | None = None,
        before: str = "",
        after: str = "\n",
        keep: int = 16,
    ) -> None:
        self.model, self.options = model, options
        self.template: Template = template or model.chat_template or PlainTemplate(before, after)
        self._keep = max(keep, 1)
        self._start: _Moment | None = None
        self._branches = [_Branch(model.session(), deque(maxlen=self._keep))]
        self.current = 0
        self.stats = Stats()

    def __repr__(self) -> str:
        return f"<Conversation of {len(self.messages)} messages, {self.session.position} tokens>"

    @property
    def _branch(self) -> _Branch:
        return self._branches[self.current]

    @property
    def session(self) -> Session:
        """The session of the current branch."""
        return self._branch.session

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages of the current branch."""
        return self._branch.now.messages

    @property
    def branches(self) -> int:
        """How many branches there are."""
        return len(self._branches)

    @property
    def kept(self) -> int:
        """How many messages `rewind` can remove."""
        return len(self._branch.kept)

    def begin_with(self, text: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Read a text that comes before the conversation, the system's message, and that `reset` comes back to.

        Raises:
            UserError: it is empty or cannot be encoded.
        """
        session, messages = self.model.session(), ({"role": "system", "content": text},)
        read = ""
        if isinstance(self.template, PlainTemplate):
            read = text
        else:
            # If it wants a user's message, too, the first one brings this along, or the reason why not.
            with contextlib.suppress(UserError):
                read = self.template.render(messages, add_generation_prompt=False)
        if read or not text:
            session.feed(read, progress=progress, prefix=self._has_prefix)
        self._start = _Moment(messages, read, snapshot=session.snapshot())
        self.reset()

    def say(self, message: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Read a message and reply.

        Args:
            message: one message.
            stopped: asked between tokens; true ends the reply there, or the message if it is still being read.

        Yields:
            The reply, piece by piece.

        Raises:
            UserError: the message cannot be read, or the model's logits are not finite; the message is removed.
        """
        branch, self.stats = self._branch, Stats()
        if not message:
            raise UserError("the message is empty")
        messages = (*branch.now.messages, {"role": "user", "content": message})
        text = self.template.render(messages, add_generation_prompt=True)
        before = branch.moment()

        def check(done: int, total: int) -> None:
            if stopped() and done < total:
                raise _StoppedError

        try:
            self._read_to(text, check)
            branch.now = _Moment(messages, text)
            branch.before_reply = branch.moment()
            options = self.options
            if options.seed is not None:
                options = replace(options, seed=options.seed + branch.session.position)
            generation, tokens, reply = branch.session.pieces(options, stats=self.stats), [], ""
            branch.kept.append(before)
            for piece in generation:
                reply += piece.text
                tokens += [] if piece.token is None else [piece.token]
                branch.now = self._after(generation, messages, text, reply)
                yield piece.text
                if stopped():
                    return
            branch.now = self._after(generation, messages, text, reply)
            if self.model.tokenizer.decode(tokens) != self.model.tokenizer.decode(tokens, special=True):
                branch.now = replace(branch.now, text=None)
            if generation.finish == "end of text" and isinstance(self.template, PlainTemplate):
                # The model saw it there in training; a template has it in its text.
                branch.session.feed([generation.ended_by or 0])
                branch.now = replace(branch.now, ended=True)
        except (UserError, _StoppedError) as error:
            if branch.kept and branch.kept[-1] is before:
                branch.kept.pop()
            branch.return_to(before)
            if isinstance(error, UserError):
                raise

    def _after(self, generation: Generation, messages: tuple[Message, ...], text: str, reply: str) -> _Moment:
        known = None if generation.holds_text else text + reply
        return _Moment((*messages, {"role": "assistant", "content": reply}), known)

    @property
    def _has_prefix(self) -> bool:
        """Whether a text begins as the tokenizer has it, and not as the template does."""
        return isinstance(self.template, PlainTemplate)

    def _read_to(self, text: str, check: Callable[[int, int], None]) -> None:
        """Let the session stand after `text`: from the latest place that is how it begins, read on."""
        branch = self._branch
        places = [branch.now, branch.before_reply, *reversed(branch.kept), self._start]
        place = next((place for place in places if place is not None and place.begins(text)), None)
        if place is None:
            branch.session.reset()
            place = _Moment()
        elif place.snapshot is not None:
            branch.session.restore(place.snapshot)
        rest = text[len(place.text or "") :]
        if place.ended and isinstance(self.template, PlainTemplate):
            rest = rest.removeprefix(self.template.line_break(place.text or ""))
        if rest:
            branch.session.feed(rest, self.stats, check, prefix=self._has_prefix)

    def fork(self) -> int:
        """Continue in a copy; returns its index."""
        branch = self._branch
        self._branches.append(_Branch(branch.session.fork(), deque(branch.kept, self._keep), branch.now, branch.before_reply))
        self.current = len(self._branches) - 1
        return self.current

    def switch(self, branch: int) -> None:
        """Continue another branch.

        Raises:
            UserError: there is none of that number.
        """
        if not 0 <= branch < len(self._branches):
            raise UserError(f"there is no branch {branch + 1}; there are 1 to {len(self._branches)}")
        self.current = branch

    def rewind(self, messages: int = 1) -> None:
        """Remove the last messages and their replies.

        Raises:
            UserError: fewer are kept.
        """
        branch = self._branch
        if not 1 <= messages <= len(branch.kept):
            raise UserError(f"cannot remove {messages} messages: {len(branch.kept)} are kept, at most {self._keep}")
        branch.return_to(branch.kept[-messages])
        for _ in range(messages):
            branch.kept.pop()

    def reset(self) -> None:
        """Back to the start of the current branch, or after the text it began with."""
        branch = self._branch
        branch.session.reset()
        branch.kept.clear()
        branch.now, branch.before_reply = _Moment(), None
        if self._start is not None:
            branch.return_to(self._start)

    def save(self, path: str | Path) -> None:
        """Save the current branch to a file: the state, and what was said."""
        now = self._branch.now
        chat = json.dumps({"messages": now.messages, "text": now.text, "ended": now.ended}, ensure_ascii=False)
        replace(self.session.snapshot(), chat=chat).save(path)

    def load(self, path: str | Path) -> None:
        """Continue a saved state in the current branch; `rewind` undoes that, as it does a message.

        Raises:
            UserError: it cannot be read, or belongs to another model.
        """
        snapshot, branch = Snapshot.load(path), self._branch
        before = branch.moment()
        branch.session.restore(snapshot)
        branch.kept.append(before)
        branch.now, branch.before_reply = self._loaded(snapshot), None

    def _loaded(self, snapshot: Snapshot) -> _Moment:
        if snapshot.chat:
            try:
                chat = json.loads(snapshot.chat)
                messages = tuple({"role": str(each["role"]), "content": str(each["content"])} for each in chat["messages"])
                return _Moment(messages, chat["text"], bool(chat["ended"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{snapshot.source}: its conversation cannot be read ({error}); save it again") from error
        if not isinstance(self.template, PlainTemplate) or not snapshot.position:
            return _Moment()
        # A text without messages: all that matters of it is how it ends.
        end = self.model.tokenizer.decode(snapshot.tail)
        return _Moment(({"role": "system", "content": end},), end)
