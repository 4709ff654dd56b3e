"""From what clients send to tokens: prompts as text or ids, and chats, with the places that the cache should remember.

A chat is written by the bundle's chat template. A base model has none: then its messages are joined as `retnet-export chat`
joins them, with a text before and after each of the user's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.slot import TAIL
from retnet_export.runtime.generate.templates import Message, PlainTemplate, Template

if TYPE_CHECKING:
    from retnet_export.runtime.model import Model

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
    """

    def __init__(self, model: Model, template: Template) -> None:
        self._model, self._template = model, template

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, after those that begin any if `special`.

        Raises:
            UserError: the bundle has no tokenizer, or it does not know a character.
        """
        return self._model.tokenizer.encode(text, prefix=special)

    def encode_after(self, tokens: Sequence[int], text: str) -> list[int]:
        """Tokens of a text that goes on after others."""
        return self._model.tokenizer.encode_after(tokens[-TAIL:], text, whole=len(tokens) <= TAIL) if text else []

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
        # A chat template writes the tokens that begin a text itself.
        return self.encode(text, special=isinstance(self._template, PlainTemplate))
