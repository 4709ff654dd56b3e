"""Who may ask, what a body may be, and how a server ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import server

from retnet_export.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, StateBody, TokenizeBody
from retnet_export.serve.endpoints import Endpoints
from retnet_export.serve.server import guards
from retnet_export.serve.service import Limits
from retnet_export.serve.settings import Settings, build

KEYS = ("first-key", "zweiter-Schlüssel")


@pytest.fixture(scope="module")
def guarded(model):
    with server(model, keys=KEYS, hosts=("box.local",), origins=("https://app.example",)) as (address, _):
        yield address


def key(value: str) -> dict[str, str]:
    return {"Authorization": b"Bearer " + value.encode()}


def test_a_client_that_goes_away_before_its_stream_begins_leaves_no_job(model):
    chosen = Settings(bundle=Path("."), limits=Limits(tokens=10**9))
    endpoints = Endpoints(chosen.limits.body)
    endpoints.service = service = build(chosen, model)
    body = json.dumps({"prompt": [1, 2, 3], "stream": True, "max_tokens": 10**9, "ignore_eos": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    path = "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": [(b"host", b"localhost")]}

    async def receive():
        return messages.pop(0)

    async def send(message):  # the network is stuck
        await asyncio.Event().wait()

    asyncio.run(endpoints.app(guards(chosen))(scope, receive, send))
    assert not messages
    assert service.scheduler.close()


def test_without_a_key_nothing_but_the_page_and_the_health_is_given(guarded):
    for path in ("/v1/models", "/metrics", "/slots", "/v1/nothing"):
        answer = httpx.get(guarded + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for wrong in (b"Bearer", b"Bearer first", b"Bearer first-key2", b"Bearer FIRST-KEY", b"Bearer \xff", b"Basic first-key"):
        assert httpx.get(f"{guarded}/v1/models", headers={"Authorization": wrong}).status_code == 401
    for right in KEYS:
        assert httpx.get(f"{guarded}/v1/models", headers=key(right)).status_code == 200
    for path in ("/", "/health"):
        assert httpx.get(guarded + path).status_code == 200


def test_a_page_of_another_site_may_not_ask(guarded):
    port = guarded.rsplit(":", 1)[1]
    for headers, status in [
        ({"Host": "evil.example"}, 403),
        ({"Host": f"evil.example:{port}"}, 403),
        ({"Host": f"box.local:{port}"}, 200),
        ({"Host": f"LOCALHOST:{port}"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": guarded}, 200),
        ({"Origin": "https://app.example"}, 200),
    ]:
        assert httpx.get(f"{guarded}/v1/models", headers={**key(KEYS[0]), **headers}).status_code == status, headers


def test_cors_is_off_unless_asked_for(guarded):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    answer = httpx.options(f"{guarded}/v1/completions", headers={"Origin": "https://app.example", **asked})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    other = httpx.options(f"{guarded}/v1/completions", headers={"Origin": "https://evil.example", **asked})
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx.get(f"{guarded}/health").headers


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([1, 2, 3]) | st.integers(-2, 60),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LIKELY = st.sampled_from(
    [0, 1, -1, 2**63, 1e308, -1e-9, 0.5, True, [1], [[1, 2]], ["a"], "", "x", "text", {"1": 3}, {"49": -100}, [49]]
)
PATHS = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/slots/name?action=save": StateBody,
}


@pytest.fixture(scope="module")
def open_servers(model, writer, tmp_path_factory):
    """One that reads text and one that does not, each with a pool of connections."""
    with (
        server(model, states=tmp_path_factory.mktemp("a")) as (first, _),
        server(writer, states=tmp_path_factory.mktemp("b")) as (second, _),
        httpx.Client(timeout=60) as client,
    ):
        yield client, (first, second)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_the_body_the_server_does_not_fail(open_servers, data):
    client, addresses = open_servers
    path = data.draw(st.sampled_from(list(PATHS)))
    fields = st.sampled_from([*PATHS[path].model_fields, "tools", "unknown"])
    body = data.draw(st.dictionaries(fields, JSON | LIKELY, max_size=6))
    if "messages" in PATHS[path].model_fields and data.draw(st.booleans()):
        message = {
            "role": data.draw(st.sampled_from(["system", "user", "assistant", "tool"])),
            "content": data.draw(JSON | st.text()),
        }
        body["messages"] = [message, *data.draw(st.lists(st.just({"role": "user", "content": "Hello"}), max_size=2))]
    if data.draw(st.booleans()):
        body = {"prompt": [1, 2], "max_tokens": 2, **body}
    content = json.dumps(body) if data.draw(st.booleans()) else data.draw(st.binary(max_size=30))
    answer = client.post(data.draw(st.sampled_from(addresses)) + path, content=content)
    assert answer.status_code in (200, 400, 404), (content, answer.text)
    if body.get("stream") is not True:
        assert isinstance(answer.json(), dict)


def test_headers_and_paths_that_nobody_sends(open_servers):
    _, (address, _) = open_servers
    host, port = address.removeprefix("http://").split(":")
    for request in (
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00\x01\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request)
            assert b" 500 " not in connection.recv(1000)


def start(bundle, *arguments) -> tuple[subprocess.Popen, str]:
    """The command, and its address once the model is loaded."""
    process = subprocess.Popen(
        [sys.executable, "-m", "retnet_export", "serve", str(bundle), "--port", "0", "--threads", "1", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if found := re.match(r"ready: .*? (http://\S+) \(page\)", line):
            return process, found[1]
    raise AssertionError(f"it ended with {process.wait()}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_asks_and_sigterm_lets_the_answer_end(example_bundle, tmp_path):
    process, address = start(example_bundle.path, "--cache-dir", tmp_path / "cache")
    body = {"prompt": "In the beginning", "max_tokens": 400, "temperature": 0}
    asking = subprocess.Popen(
        ["curl", "-sS", f"{address}/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)],
        stdout=subprocess.PIPE,
    )
    while httpx.get(f"{address}/slots").json()["generating"] == 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    answer = json.loads(asking.communicate(timeout=60)[0])
    assert answer["usage"]["completion_tokens"] == 400
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == ""
    # What was read before is not read again after a restart.
    process, address = start(example_bundle.path, "--cache-dir", tmp_path / "cache")
    again = httpx.post(f"{address}/v1/completions", json={**body, "max_tokens": 20}).json()
    assert again["choices"][0]["text"] == answer["choices"][0]["text"][: len(again["choices"][0]["text"])]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def test_what_takes_too_long_is_cut_off_and_the_end_is_still_good(example_bundle):
    process, address = start(example_bundle.path, "--patience", 0.3)
    body = {"prompt": "In the beginning", "max_tokens": 4096, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        *_, fault, end = [line for line in lines if line]
    assert "shutting down" in fault
    assert end == "data: [DONE]"
    assert process.wait(timeout=20) == 0
    assert "were cancelled" in process.stderr.read()


def test_what_cannot_be_served_ends_with_a_message(example_bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in [
            ((str(tmp_path / "absent"), "--port", "0"), "absent"),
            ((str(example_bundle.path), "--port", str(port)), f"cannot listen on 127.0.0.1:{port}"),
            ((str(example_bundle.path), "--api-key-file", str(tmp_path / "none")), "cannot be read"),
        ]:
            command = [sys.executable, "-m", "retnet_export", "serve", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert result.returncode == 1
            assert message in result.stderr
            assert "Traceback" not in result.stderr
