"""Chat templates: messages become the text that the model was trained to see.

Rule: as `transformers.apply_chat_template` renders them (utils/chat_template_utils.py), in jinja2's immutable sandbox, because a
template comes from whoever made the checkpoint. What it may name besides the messages is what transformers gives it: the
special tokens, `raise_exception`, `strftime_now`, `tojson`, and the blocks `generation`, `break` and `continue`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from retnet_export.runtime.errors import MissingExtraError, UserError

Message = Mapping[str, Any]
"""At least `role` ("system", "user", "assistant", …) and `content`."""


class Template(Protocol):
    """What turns messages into a text."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of messages; with `add_generation_prompt`, up to where the model's reply begins."""


class ChatTemplate:
    """A Jinja template.

    Args:
        source: the template.
        special_tokens: texts by name, as `bos_token`, that it may use.
        where: where it was found, for messages.

    Raises:
        UserError: it is not a valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, where: str = "the chat template") -> None:
        self.source, self.where = source, where
        self._special_tokens = dict(special_tokens or {})
        self._template = _compiled(source, where)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """The text of messages.

        It holds the special tokens that begin it, if any: encode it with `Tokenizer.encode`, which adds none.

        Args:
            messages: in order.
            add_generation_prompt: go on to where the model's reply begins.
            tools: JSON schemas of functions, for templates that show them.
            variables: what else the template knows.

        Raises:
            UserError: the template refuses the messages, or fails on them.
        """
        import jinja2

        given = {**self._special_tokens, **variables}
        chat = [_with_reasoning({name: value for name, value in each.items() if value is not None}) for each in _plain(messages)]
        try:
            text: str = self._template.render(
                messages=chat,
                tools=_plain(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{name: _plain(value) for name, value in given.items()},
            )
            return text
        except jinja2.TemplateError as error:
            raise UserError(f"{self.where}: it refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{self.where}: it fails on these messages: {type(error).__name__}: {error}") from error


class PlainTemplate:
    """For models without a template: a text around each message, on a separate line.

    Args:
        before, after: the text around each of the user's messages.
    """

    def __init__(self, before: str = "", after: str = "\n") -> None:
        self.before, self.after = before, after

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        text = ""
        for message in messages:
            if message["role"] == "user":
                text += self.line_break(text) + self.before + message["content"] + self.after
            else:
                text += message["content"]
        return text

    def line_break(self, text: str) -> str:
        """What stands between a text and the next message: it begins on a new line, wherever the last reply was cut."""
        return "" if not text or text.endswith("\n") or self.before.startswith("\n") else "\n"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Names of a model's reasoning; templates read the first or the second."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value copied into JSON's types, so that a template sees no object that has its own methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _compiled(source: str, where: str) -> Any:
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtraError("jinja2", "chat", "a chat template") from error

    class GenerationBlock(Extension):
        """`{% generation %}…{% endgeneration %}`, which marks the model's own text for training: here, just its content."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Without attributes that begin with an underscore, which lead out of the sandbox."""

        def __init__(*args: Any, **values: Any) -> None:  # as jinja2 has it: `self` may be a name
            for name in (attributes := dict(*args[1:], **values)):
                _check_name(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: object) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=Namespace, dict=_Dict())
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: not a valid Jinja template: {error.message}") from error


class _Dict:
    """`dict(…)` without the class, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)
