"""The server as clients see it: the `openai` package, and plain HTTP where that is not enough."""

from __future__ import annotations

import asyncio
import json
import math
import time

import httpx
import numpy as np
import pytest

openai = pytest.importorskip("openai", reason="the client that the server is made for is not installed")
from serving import server  # noqa: E402

from retnet_export.runtime.generate.generation import Continuation, Options  # noqa: E402
from retnet_export.runtime.generate.sampling import log_softmax  # noqa: E402
from retnet_export.serve.service import Limits  # noqa: E402

PROMPT = "In the beginning God created"


@pytest.fixture(scope="module")
def running(writer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    with server(writer, states=folder, slots=4, queue=8, before="Q: ", after="\nA: ") as (address, service):
        yield address, service


@pytest.fixture(scope="module")
def address(running):
    return running[0]


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def text_of(model, prompt, **options) -> str:
    return "".join(model.generate(prompt, Options(**options)))


def test_a_completion_is_what_generate_gives_for_the_same_seed(client, writer):
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    answer = client.completions.create(model="classics", prompt=PROMPT, max_tokens=20, **sampling)
    assert answer.choices[0].text == text_of(writer, PROMPT, max_new_tokens=20, **sampling)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(writer.tokenizer.encode(PROMPT)), 20)
    assert (answer.object, answer.model) == ("text_completion", "classics")


def test_a_stream_says_the_same_piece_by_piece_and_ends_with_the_usage(client, writer):
    options = {"model": "classics", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(**options, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text_of(
        writer, PROMPT, max_new_tokens=20, temperature=0.0
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_and_answers_have_seeds_and_places_of_their_own(client, writer):
    prompts = [PROMPT, "Once upon a time"]
    answer = client.completions.create(model="classics", prompt=prompts, n=3, max_tokens=6, seed=40)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for index, choice in enumerate(answer.choices):
        assert choice.text == text_of(writer, prompts[index // 3], max_new_tokens=6, seed=40 + index)
    pieces = ["" for _ in range(6)]
    for chunk in client.completions.create(model="classics", prompt=prompts, n=3, max_tokens=6, seed=40, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [choice.text for choice in answer.choices]


def test_token_ids_are_a_prompt_as_text_is(client, writer):
    ids = writer.tokenizer.encode(PROMPT)
    one, two = (
        client.completions.create(model="classics", prompt=prompt, max_tokens=5, temperature=0) for prompt in (ids, [ids, ids])
    )
    expected = text_of(writer, PROMPT, max_new_tokens=5, temperature=0.0)
    assert [choice.text for choice in (*one.choices, *two.choices)] == [expected] * 3


def test_echo_gives_the_prompt_and_the_log_probabilities_of_its_tokens(client, writer):
    answer = client.completions.create(model="classics", prompt=PROMPT, max_tokens=2, temperature=0, echo=True, logprobs=2)
    choice, ids, session = answer.choices[0], writer.tokenizer.encode(PROMPT), writer.session()
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    for place, token in enumerate(ids[:-1]):
        expected = log_softmax(session.step([token])[0])
        assert choice.logprobs.token_logprobs[place + 1] == pytest.approx(expected[ids[place + 1]], abs=1e-4)
        assert sorted(choice.logprobs.top_logprobs[place + 1].values()) == pytest.approx(np.sort(expected)[-2:].tolist(), abs=1e-4)
    assert len(choice.logprobs.tokens) == len(ids) + 2
    for text, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(text)
    streamed = client.completions.create(
        model="classics", prompt=PROMPT, max_tokens=2, temperature=0, echo=True, logprobs=2, stream=True
    )
    chunks = [chunk.choices[0] for chunk in streamed]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [
        value for chunk in chunks if chunk.logprobs for value in chunk.logprobs.token_logprobs
    ] == choice.logprobs.token_logprobs
    nothing_new = client.completions.create(model="classics", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    assert nothing_new.choices[0].text == PROMPT
    assert nothing_new.choices[0].logprobs.token_logprobs == pytest.approx(choice.logprobs.token_logprobs[: len(ids)])


def test_a_chat_is_written_as_the_command_chat_writes_it(client, writer):
    messages = [
        {"role": "system", "content": "A talk."},
        {"role": "user", "content": "Who made the heaven?"},
        {"role": "assistant", "content": "God did."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "the earth?"}]},
    ]
    written = "A talk.\nQ: Who made the heaven?\nA: God did.\nQ: And the earth?\nA: "
    options = {"max_tokens": 12, "seed": 3, "temperature": 0.7}
    expected = text_of(writer, written, max_new_tokens=12, seed=3, temperature=0.7)
    answer = client.chat.completions.create(model="classics", messages=messages, **options)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="classics", messages=messages, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_that_grows_reads_only_what_is_new(client):
    messages, cached = [{"role": "system", "content": "You are a poet. " * 20}], []
    for question in ("What of the sea?", "And the stars?", "And the dead?"):
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model="classics", messages=messages, max_tokens=24, temperature=0)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        cached.append((answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
    for (known, prompt), (_, before) in zip(cached[1:], cached[:-1], strict=True):
        assert before <= known
        assert prompt - known < 40
    other = [messages[0], {"role": "user", "content": "Something else"}]
    answer = client.chat.completions.create(model="classics", messages=other, max_tokens=4)
    assert answer.usage.prompt_tokens_details.cached_tokens > 80


def test_log_probabilities_in_a_chat(client):
    answer = client.chat.completions.create(
        model="classics",
        messages=[{"role": "user", "content": "Speak."}],
        max_completion_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert bytes(entry.bytes).decode() == entry.token


def test_stop_strings_bans_and_least_lengths_act(client, writer):
    text = text_of(writer, PROMPT, max_new_tokens=40, temperature=0.0)
    stop = text[20:24]
    options = {"model": "classics", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    answer = client.completions.create(**options, stop=[stop, "never"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    first = writer.tokenizer.encode(PROMPT + text)[len(writer.tokenizer.encode(PROMPT))]
    banned = client.completions.create(**options, logit_bias={str(first): -100})
    assert banned.choices[0].text != text
    stopped = client.completions.create(**options, extra_body={"stop_token_ids": [first]})
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    kept = client.completions.create(**options, extra_body={"stop_token_ids": [first], "min_tokens": 3})
    assert kept.usage.completion_tokens >= 3
    narrow = client.completions.create(
        model="classics", prompt=PROMPT, max_tokens=10, seed=1, extra_body={"top_k": 1, "min_p": 0.1}
    )
    assert narrow.choices[0].text == text_of(writer, PROMPT, max_new_tokens=10, temperature=0.0)


def test_the_async_client_may_ask_many_things_at_once(address, writer):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=20) as client:

            async def one(seed: int) -> str:
                parts = await client.completions.create(model="classics", prompt=PROMPT, max_tokens=12, seed=seed, stream=True)
                return "".join([chunk.choices[0].text async for chunk in parts])

            return await asyncio.gather(*(one(seed) for seed in range(10)))

    assert asyncio.run(ask()) == [text_of(writer, PROMPT, max_new_tokens=12, seed=seed) for seed in range(10)]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ("completions", {"prompt": PROMPT, "max_tokens": "many"}, 400, "max_tokens: Input should be a valid integer"),
        ("completions", {"prompt": PROMPT, "max_tokens": 10**6}, 400, "max_tokens: 1000000, this server generates at most 4096"),
        ("completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"prompt": []}, 400, "the prompt is empty"),
        ("completions", {"prompt": [[]]}, 400, "the prompt is empty"),
        ("completions", {"prompt": [99999]}, 400, "token 99999 is not in the vocabulary"),
        ("completions", {"prompt": {"a": 1}}, 400, "prompt: Input should be"),
        ("completions", {"prompt": PROMPT, "logit_bias": {"x": 1}}, 400, "logit_bias: 'x' is not a token id"),
        ("completions", {"prompt": PROMPT, "logit_bias": {"4096": 1}}, 400, "logit_bias names token 4096"),
        ("completions", {"prompt": PROMPT, "suffix": "x"}, 400, "suffix: inserting between prompt and suffix is not supported"),
        ("completions", {"prompt": PROMPT, "best_of": 3}, 400, "best_of: choosing the best of several is not supported"),
        ("completions", {"prompt": PROMPT, "model": "gpt-9"}, 404, "the model 'gpt-9' is not served here; expected 'classics'"),
        ("completions", {"prompt": [PROMPT] * 13}, 400, "13 texts in one request, this server takes at most 12"),
        ("completions", {"prompt": PROMPT, "state": "absent"}, 400, "no saved state 'absent'"),
        ("completions", {"prompt": PROMPT, "state": "../x"}, 400, "is not a name for a state"),
        ("chat/completions", {"messages": []}, 400, "messages: List should have at least 1 item"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role: Input should be"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content: expected a text"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "calling tools is not supported"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
            400,
            "tools: calling tools is not supported by this server",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "content of the type 'image_url' is not supported",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
            400,
            "response_format: a format of the answer other than text is not supported",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "it needs logprobs: true"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_openais_form(address, path, body, status, message):
    answer = httpx.post(f"{address}/v1/{path}", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="classics", prompt=PROMPT, temperature=-3)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt=PROMPT)


def test_unknown_fields_are_ignored_and_named(address):
    body = {"prompt": PROMPT, "max_tokens": 1, "user": "me", "mirostat": 2, "smoothing\n": 1}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == r'"mirostat, smoothing\n"'


def test_other_paths_methods_and_bodies(address):
    for method, path, body, status, message in [
        ("GET", "/v1/nothing", b"", 404, "no endpoint '/v1/nothing'"),
        ("GET", "/v1/completions", b"", 405, "'/v1/completions' does not take GET"),
        ("GET", "/v1/models/other", b"", 404, "is not served here"),
        ("POST", "/v1/completions", b"{", 400, "not valid JSON"),
        ("POST", "/v1/completions", b"\xff", 400, "not valid JSON"),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400, "not valid JSON"),
        ("POST", "/v1/completions", b"[" * 100_000, 400, "not valid JSON"),
        ("POST", "/v1/completions", b"x" * 4_000_001, 413, "more than 4000000 bytes"),
        ("POST", "/tokenize", b"{}", 400, "content: expected a text"),
        ("POST", "/detokenize", b'{"tokens": [4096]}', 400, "4096 is not in the vocabulary of 4096"),
        ("POST", "/slots/x?action=juggle", b"", 400, "expected save, restore or erase"),
        ("POST", "/slots/..%2fx?action=erase", b"", 404, "no endpoint"),
        ("POST", "/slots/.x?action=erase", b"", 400, "is not a name for a state"),
    ]:
        answer = httpx.request(method, address + path, content=body)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_models_tokens_and_figures(address, client, writer):
    assert [model.id for model in client.models.list()] == ["classics"]
    assert client.models.retrieve("classics").owned_by == "retnet-export"
    tokens = httpx.post(f"{address}/tokenize", json={"content": PROMPT}).json()
    assert tokens == {"tokens": writer.tokenizer.encode(PROMPT), "count": len(tokens["tokens"])}
    assert httpx.post(f"{address}/detokenize", json={"tokens": tokens["tokens"]}).json()["content"] == PROMPT
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    before = figures(address)
    client.completions.create(model="classics", prompt="Something quite new", max_tokens=5)
    after = figures(address)
    assert after["retnet_generated_tokens_total"] - before["retnet_generated_tokens_total"] == 5
    assert after["retnet_time_to_first_token_seconds_count"] - before["retnet_time_to_first_token_seconds_count"] == 1
    assert after["retnet_time_per_token_seconds_count"] - before["retnet_time_per_token_seconds_count"] == 4
    assert after['retnet_jobs_total{result="done"}'] - before['retnet_jobs_total{result="done"}'] == 1
    assert after['retnet_requests_total{path="/v1/completions",status="200"}'] > 0
    assert after["retnet_cache_bytes"] > 0
    assert (after["retnet_slots"], after["retnet_running"], after["retnet_queue"]) == (4, 0, 0)


def figures(address) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_named_state_is_saved_gone_on_from_and_erased(address, writer):
    body = {"prompt": PROMPT}
    assert httpx.post(f"{address}/slots/genesis?action=save", json=body).json() == {
        "name": "genesis",
        "tokens": len(writer.tokenizer.encode(PROMPT)),
    }
    assert httpx.get(f"{address}/slots").json()["states"] == [{"name": "genesis"}]
    assert httpx.post(f"{address}/slots/genesis?action=restore").status_code == 200
    ask = {"state": "genesis", "prompt": " the heaven", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json=ask).json()
    assert answer["choices"][0]["text"] == text_of(writer, f"{PROMPT} the heaven", max_new_tokens=8, temperature=0.0)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(writer.tokenizer.encode(PROMPT))
    assert httpx.post(f"{address}/slots/genesis?action=erase").status_code == 200
    assert httpx.post(f"{address}/slots/genesis?action=restore").status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_slot(running, stream):
    address, service = running
    for prompt in (PROMPT, "word " * 2000):
        body = {"prompt": prompt, "max_tokens": 4096, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
                assert answer.status_code == 200
        else:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{address}/v1/completions", json=body, timeout=0.2)
    deadline = time.monotonic() + 10
    while (load := service.scheduler.load).generating + load.reading + load.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert load.generating == load.reading == load.waiting == 0


def test_beyond_the_queue_clients_are_told_when_to_come_again(address):
    body = {"prompt": [PROMPT] * 12, "max_tokens": 2000, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as held:
        lines = held.iter_lines()  # held, too: without it the connection would close
        assert "text" in next(lines)
        refused = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "stream": True})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{address}/health").status_code == 200


def test_one_request_that_fails_leaves_the_others_alone(running, writer, monkeypatch):
    address, _ = running
    choose = Continuation.choose

    def broken(continuation, view):
        if continuation.options.seed == 666:
            raise RuntimeError("a bug")
        return choose(continuation, view)

    monkeypatch.setattr(Continuation, "choose", broken)
    bad = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "seed": 666})
    assert (bad.status_code, bad.json()["error"]["type"]) == (500, "server_error")
    with httpx.stream("POST", f"{address}/v1/completions", json={"prompt": PROMPT, "seed": 666, "stream": True}) as answer:
        *_, fault, end = [line for line in answer.iter_lines() if line]
    assert json.loads(fault.removeprefix("data: "))["error"]["code"] == "model_failed"
    assert end == "data: [DONE]"
    good = httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT, "seed": 1, "max_tokens": 5}).json()
    assert good["choices"][0]["text"] == text_of(writer, PROMPT, max_new_tokens=5, seed=1)


def test_token_ids_of_an_answer_come_if_asked_for(address, writer):
    session = writer.session()
    session.feed(PROMPT)
    ids = list(session.generate_tokens(max_new_tokens=6, temperature=0.0))
    completion = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0}
    assert "token_ids" not in httpx.post(f"{address}/v1/completions", json=completion).json()["choices"][0]
    (choice,) = httpx.post(f"{address}/v1/completions", json={**completion, "return_token_ids": True}).json()["choices"]
    assert choice["token_ids"] == ids
    for path, body in (("completions", completion), ("chat/completions", chat)):
        (whole,) = httpx.post(f"{address}/v1/{path}", json={**body, "return_token_ids": True}).json()["choices"]
        streamed = httpx.post(f"{address}/v1/{path}", json={**body, "return_token_ids": True, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        pieces = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]
        assert pieces == whole["token_ids"]
        assert len(pieces) == 6


def test_a_model_without_a_tokenizer_takes_and_gives_ids(model):
    with server(model, limits=Limits(prompt=20, tokens=30)) as (address, _):
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "return_token_ids": True, "stream": True}
        lines = httpx.post(f"{address}/v1/completions", json=body).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [len(chunk["choices"][0].get("token_ids", ())) for chunk in chunks] == [1, 1, 1, 1, 0]
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "logprobs": 1, "echo": True}
        choice = httpx.post(f"{address}/v1/completions", json=body).json()["choices"][0]
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"][:3] == ["token:1", "token:2", "token:3"]
        assert all(math.isfinite(value) for value in choice["logprobs"]["token_logprobs"][1:])
        for path, body, message in [
            ("v1/completions", {"prompt": "text"}, "the bundle has no tokenizer"),
            ("v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "the bundle has no tokenizer"),
            ("tokenize", {"content": "x"}, "the bundle has no tokenizer"),
            ("v1/completions", {"prompt": [1] * 21}, "the prompt has 21 tokens, this server reads at most 20"),
            ("slots/x?action=restore", {}, "has no named states; start it with --states FOLDER"),
        ]:
            answer = httpx.post(f"{address}/{path}", json=body)
            assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text
