"""The request bodies of clients, checked: OpenAI's fields and those of llama.cpp and vLLM.

Rule: a field is used, refused by name, or ignored with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retnet_export.serve.errors import ApiError, not_supported

MOST_STOPS, MOST_LOGPROBS, MOST_BIASES = 16, 20, 1024
LARGEST_INT = 2**63 - 1

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A body; fields that we do not know stay in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), populate_by_name=True)


class StreamOptions(Body):
    """Whether a stream ends with the usage."""

    include_usage: bool | None = None


class Generating(Body):
    """The fields that completions and chats share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=LARGEST_INT)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST_INT)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=10)] | None = Field(default=None)
    logit_bias: Annotated[dict[str, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST_INT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LARGEST_INT)] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    state: str | None = None
    return_token_ids: bool | None = None


class CompletionBody(Generating):
    """`/v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = ""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: int | None = None


class Part(Body):
    """A part of a message."""

    type: str
    text: str | None = None


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class ChatBody(Generating):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=LARGEST_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class TokenizeBody(Body):
    """`/tokenize`: the text as `content` (llama.cpp) or `prompt` (vLLM)."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None


class DetokenizeBody(Body):
    """`/detokenize`."""

    tokens: list[TokenId]


class StateBody(Body):
    """The content of a named state: a prompt or a chat."""

    prompt: str | list[TokenId] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = None


HARMLESS = frozenset({"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"})
"""Fields of OpenAI's that say nothing about the text."""

REFUSED: Mapping[str, str] = {
    "tools": "calling tools",
    "tool_choice": "calling tools",
    "functions": "calling functions",
    "function_call": "calling functions",
    "response_format": "a format of the answer other than text",
    "modalities": "anything but text",
    "audio": "audio",
    "prediction": "predicted output",
    "web_search_options": "searching the web",
    "suffix": "inserting between prompt and suffix",
    "grammar": "a grammar",
    "json_schema": "a JSON schema",
    "guided_json": "a JSON schema",
    "use_beam_search": "beam search",
}
"""Fields that would change the text and that we do not have."""

MEANS_NOTHING: tuple[object, ...] = (None, False, "", "none", [], {}, ["text"], {"type": "text"})
"""Values with which such a field asks for nothing."""

B = TypeVar("B", bound=Body)


def parse(kind: type[B], content: bytes) -> tuple[B, list[str]]:
    """A body from JSON, and the names of fields that were ignored.

    Raises:
        ApiError: it is not JSON, a field is wrong, or one is not supported.
    """
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise _fault(error) from error
    extra = body.model_extra or {}
    fields = {**extra, **{name: getattr(body, name) for name in REFUSED if name in kind.model_fields}}
    for name, what in REFUSED.items():
        if name in fields and not any(type(fields[name]) is type(nothing) and fields[name] == nothing for nothing in MEANS_NOTHING):
            raise not_supported(name, what)
    if isinstance(body, CompletionBody) and body.best_of not in (None, body.n or 1):
        raise not_supported("best_of", "choosing the best of several")
    return body, sorted(name for name in extra if name not in HARMLESS and name not in REFUSED)


def text_of(message: Message, place: int) -> str:
    """The text of a message, whose parts are joined.

    Raises:
        ApiError: it holds something else.
    """
    where = f"messages[{place}]"
    if message.role in ("tool", "function"):
        raise not_supported(f"{where}.role", "calling tools")
    for field in ("tool_calls", "function_call", "audio"):
        if (message.model_extra or {}).get(field) not in (None, []):
            raise not_supported(f"{where}.{field}", "calling tools")
    if message.content is None:
        raise ApiError(400, f"{where}.content: expected a text", param=f"{where}.content")
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise not_supported(f"{where}.content[{number}].type", f"content of the type {part.type[:40]!r}")
    return "".join(part.text or "" for part in message.content)


def _fault(error: ValidationError) -> ApiError:
    """The first fault, in OpenAI's words."""
    fault: Any = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A union names each of its branches behind the field: the field is what a client knows.
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path[:1] if path and path[0] in ("prompt", "stop") else path)[:200]
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {fault['msg']}", code="invalid_json")
    return ApiError(400, f"{name or 'the body'}: {fault['msg']}", param=name or None, code="invalid_value")
