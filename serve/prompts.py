"""From what clients send to tokens: prompts as text or ids, and chats, with the places that the cache should remember.

A chat is written by the bundle's chat template. A base model has none: then its messages are joined as `retnet-export chat`
joins them, with a text before and after each of the user's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model

Message = Mapping[str, Any]


class Template(Protocol):
    """What turns messages into a text."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of messages; with `add_generation_prompt`, up to where the model's reply begins."""


REMEMBERED = 4
"""Of the ends of messages, the last so many are remembered, and the first."""


@dataclass(frozen=True)
class Encoded:
    """A prompt.

    Attributes:
        tokens: what is read.
        marks: token counts that the cache should remember.
    """

    tokens: list[int]
    marks: tuple[int, ...] = ()


class Prompts:
    """Makes tokens of prompts.

    Args:
        model: whose tokenizer it is.
        template: writes a chat.
        begins: whether what the template writes lacks the token that begins a text.
    """

    def __init__(self, model: Model, template: Template, *, begins: bool = True) -> None:
        self._model, self._template, self._begins = model, template, begins
        self._beginning = model.session()  # at position 0, where `encode` puts what begins a text

    def encode(self, text: str) -> list[int]:
        """Tokens of a text at the beginning.

        Raises:
            UserError: the bundle has no tokenizer, or it does not know a character.
        """
        return self._beginning.encode(text)

    def after(self, text: str) -> list[int]:
        """Tokens of a text that comes after another."""
        return self._model.tokenizer.encode(text) if text else []

    def chat(self, messages: Sequence[Message]) -> Encoded:
        """Tokens of a chat, up to where the reply begins; a last message of the assistant's is continued.

        Raises:
            UserError: as `encode`, or the template refuses the messages.
        """
        tokens = self._written(messages, reply=messages[-1]["role"] != "assistant")
        marks = []
        for count in sorted({1, *range(max(1, len(messages) - REMEMBERED), len(messages))}):
            if count < len(messages):
                # Where a token spans two messages, or a template writes fewer messages in another way, there is no such place; the
                # cache finds one when two chats part there.
                with contextlib.suppress(UserError):
                    beginning = self._written(messages[:count], reply=False)
                    if tokens[: len(beginning)] == beginning:
                        marks.append(len(beginning))
        return Encoded(tokens, tuple(marks))

    def _written(self, messages: Sequence[Message], *, reply: bool) -> list[int]:
        text = self._template.render(messages, add_generation_prompt=reply)
        return self.encode(text) if self._begins else self._model.tokenizer.encode(text)


class PlainTemplate:
    """For models that were trained on no template: a text around each message, on a line of its own.

    Args:
        before, after: the text around each of the user's messages.
    """

    def __init__(self, before: str = "", after: str = "\n") -> None:
        self.before, self.after = before, after

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        text = ""
        for message in messages:
            if text and not text.endswith("\n") and not (message["role"] == "user" and self.before.startswith("\n")):
                text += "\n"
            text += f"{self.before}{message['content']}{self.after}" if message["role"] == "user" else message["content"]
        return text
