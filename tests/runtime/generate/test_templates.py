"""Chat templates are rendered as transformers renders them; a template is not trusted."""

from __future__ import annotations

import pytest

pytest.importorskip("jinja2")

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.templates import ChatTemplate, PlainTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

MARKED_TURNS = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|begin|>system\\nYou answer briefly.<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|begin|>' + message.role + '\\n' + message.content + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|begin|>assistant\\n' }}
{%- endif %}
"""

INSTRUCTIONS_IN_BRACKETS = """\
{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
{% set turns = messages[1:] %}
{% else %}
{% set system = '' %}
{% set turns = messages %}
{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
{% else %}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{% endif %}
{% endfor %}"""

HEADERS_WITH_TOOLS = """\
{{- bos_token }}
{%- set date = date_string if date_string is defined else '26 Jul 2024' %}
{%- set ns = namespace(system='', first_user=true) %}
{%- if messages[0]['role'] == 'system' %}{% set ns.system = messages[0]['content'] | trim %}{% endif %}
{{- '<|header|>system<|/header|>\\n\\nToday: ' ~ date ~ '\\n' ~ ns.system }}
{%- if tools is not none and tools %}
    {{- '\\nFunctions:\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{{ '\\n' if not loop.last }}{% endfor %}
{%- endif %}
{{- '<|eot|>' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.tool_calls is defined %}
        {{- '<|header|>assistant<|/header|>\\n\\n' + (message.tool_calls[0].function | tojson) + '<|eot|>' }}
    {%- else %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}
"""

RENAMED_ROLES = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('this model has no system role') }}{% endif %}\
{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<turn>' + role + '\\n' + message['content'] | trim + '</turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""

MACROS_AND_BLOCKS = """\
{%- macro turn(role, text) -%}
<|{{ role }}|>
{{ text }}{{ eos_token }}
{% endmacro -%}
{%- for message in messages -%}
    {%- if loop.index > 6 %}{% break %}{% endif -%}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{ turn('assistant', message['content']) }}{% endgeneration %}
    {%- else -%}
        {{ turn(message['role'], message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join(' ')) }}
    {%- endif -%}
    {%- if message.reasoning_content %}{{ '(' ~ message.reasoning_content ~ ')' }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}<|assistant|>
{% endif %}
"""  # noqa: E501 (as such templates are)

TEMPLATES = {
    "marked turns": MARKED_TURNS,
    "instructions in brackets": INSTRUCTIONS_IN_BRACKETS,
    "headers with tools": HEADERS_WITH_TOOLS,
    "renamed roles": RENAMED_ROLES,
    "macros and blocks": MACROS_AND_BLOCKS,
}
CHAT = [
    {"role": "user", "content": " Who are you? <b>&'\"  "},
    {"role": "assistant", "content": "A model.\n"},
    {"role": "user", "content": "日本 🎉"},
]
SYSTEM = [{"role": "system", "content": " Be kind. "}, *CHAT]
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "a < b & é", "parameters": {"type": "object"}}}]
RICH = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "c", "thinking": "hm", "name": None},
    *CHAT[:1] * 6,
]
CALLS = [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1.5, "b": None}}}]}]


def by_transformers(source: str, messages, **options) -> str:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=source, **SPECIAL)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    ("name", "messages", "options"),
    [
        *((name, CHAT, {}) for name in TEMPLATES),
        *((name, SYSTEM, {}) for name in TEMPLATES if name != "renamed roles"),
        ("headers with tools", SYSTEM, {"tools": TOOLS, "date_string": "1 Jan 2030"}),
        ("headers with tools", CALLS, {"tools": TOOLS}),
        ("macros and blocks", RICH, {}),
    ],
)
def test_a_template_gives_what_transformers_gives(name, messages, options, prompt):
    expected = by_transformers(TEMPLATES[name], messages, add_generation_prompt=prompt, **options)
    assert expected
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, add_generation_prompt=prompt, **options) == expected


def test_the_time_is_known():
    import datetime

    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("name", "messages", "why"), [("renamed roles", SYSTEM, "no system role"), ("instructions in brackets", CHAT[1:], "take turns")]
)
def test_what_a_template_refuses_is_said(name, messages, why):
    with pytest.raises(UserError, match=f"refuses these messages: .*{why}"):
        ChatTemplate(TEMPLATES[name], SPECIAL).render(messages)


def test_a_template_that_is_none_is_refused_with_its_line():
    with pytest.raises(UserError, match="line 2: not a valid Jinja template"):
        ChatTemplate("fine\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_stays_in_the_sandbox(source):
    with pytest.raises(UserError, match="refuses these messages"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_objects_reach_a_template_as_plain_data():
    class Thing:
        def secret(self) -> str:
            return "secret"

    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": Thing()}]) == "<Thing>"


def test_without_a_template_each_message_stands_on_a_line_of_its_own():
    plain = PlainTemplate("User: ", "\nModel: ")
    assert plain.render(CHAT) == "User:  Who are you? <b>&'\"  \nModel: A model.\nUser: 日本 🎉\nModel: "
