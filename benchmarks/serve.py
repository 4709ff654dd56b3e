"""The server under load, over the loopback: `retnet-export serve` in a separate process, clients in this one.

    python benchmarks/serve.py BUNDLE [--parts clients,prompts,chat,memory,gone] [--clients 1,4,16,64] [--seconds 20] [-o FILE.json]

clients   throughput, time to first token and between tokens, 1 to 64 clients that each ask again at once
prompts   time between tokens of four clients while prompts of 2,000 tokens arrive
chat      time to first token over a chat of 50 messages, with and without the prefix cache
memory    resident memory over many small requests
gone      a thousand clients that go away at random, and the slots after them
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import describe_machine

from retnet_export.runtime.bundle.bundle import open_bundle

PROMPT_TOKENS, NEW_TOKENS = 32, 64
LONG = 2000


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str] | None
    port: int
    vocabulary: int
    triton: str | None = None  # the model, if it is Triton

    @property
    def resident_mb(self) -> float:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


@contextlib.contextmanager
def serving(bundle: Path, *arguments: object) -> Iterator[Server]:
    """Start the command, and end it."""
    command = [sys.executable, "-m", "retnet_export", "serve", str(bundle), "--port", "0", "--max-queue", "2000", "--patience", "1"]
    process = subprocess.Popen([*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("ready"):
                port = int(re.search(r"http://127.0.0.1:(\d+)", line)[1])  # type: ignore[index]
                yield Server(process, port, open_bundle(bundle, check_hashes=False).manifest.model.vocab_size)
                return
        raise SystemExit(f"the server ended with {process.wait()}")
    finally:
        process.terminate()
        process.wait()


@dataclass
class Answer:
    """What a client saw: seconds to the first token, between tokens, and how many of the prompt's tokens were known."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    cached: int = 0
    text: str = ""
    ids: list[int] = field(default_factory=list)


async def ask(server: Server, body: dict[str, object], leave_after: float | None = None) -> Answer:
    """One request, streamed, over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    answer, began = Answer(), time.perf_counter()
    last = began
    try:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        sent: dict[str, object] = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, **body}
        if server.triton is not None:
            path = f"/v2/models/{server.triton}/generate_stream"
            parameters = {name: body[name] for name in ("max_tokens", "seed") if name in body}
            sent = {"tokens": body["prompt"], "parameters": parameters | {"ignore_eos": True}}
        content = json.dumps(sent).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + content)
        ends = float("inf") if leave_after is None else began + leave_after
        while line := await asyncio.wait_for(reader.readline(), min(600.0, max(0.001, ends - time.perf_counter()))):
            if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                raise SystemExit(f"the server answered {line!r} {await reader.read()!r}")
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if server.triton is not None:
                event = {"choices": [{**event, "finish_reason": None}] if event["token"] >= 0 else []}
            if usage := event.get("usage"):
                answer.cached = usage["prompt_tokens_details"]["cached_tokens"]
            elif event["choices"] and event["choices"][0]["finish_reason"] is None:
                choice = event["choices"][0]
                if "delta" in choice and not choice["delta"].get("content"):
                    continue
                if choice.get("logprobs") and "tokens" in choice["logprobs"]:
                    answer.ids += [int(name[6:]) for name in choice["logprobs"]["tokens"] if name.startswith("token:")]
                answer.text += choice.get("text") or choice.get("delta", {}).get("content", "")
                now = time.perf_counter()
                if answer.tokens:
                    answer.gaps.append(now - last)
                else:
                    answer.first = now - began
                answer.tokens, last = answer.tokens + 1, now
    except asyncio.TimeoutError:
        pass
    finally:
        writer.close()
    return answer


def prompt(server: Server, count: int, dice: random.Random) -> list[int]:
    return [dice.randrange(3, server.vocabulary) for _ in range(count)]


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {f"p{percent}": round(1e3 * float(np.percentile(seconds, percent)), 2) for percent in (50, 95, 99)}


def measure_clients(
    bundle: Path, counts: list[int], seconds: float, extra: list[str], triton: contextlib.nullcontext[Server] | None = None
) -> list[dict[str, object]]:
    """Every client asks again as soon as it has its answer."""
    rows: list[dict[str, object]] = []

    async def load(server: Server, count: int) -> list[Answer]:
        ends, answers = time.perf_counter() + seconds, list[Answer]()

        async def client(number: int) -> None:
            dice = random.Random(number)
            while time.perf_counter() < ends:
                body = {"prompt": prompt(server, PROMPT_TOKENS, dice), "max_tokens": NEW_TOKENS, "seed": number, "logprobs": 0}
                answers.append(await ask(server, body))

        await asyncio.gather(*(client(number) for number in range(count)))
        return answers

    for count in counts:
        with triton or serving(bundle, "--max-batch", max(counts), "--cache-mb", 0, *extra) as server:
            asyncio.run(load_once(server))
            began = time.perf_counter()
            answers = asyncio.run(load(server, count))
            took = time.perf_counter() - began
        rows.append(
            {
                "clients": count,
                "requests": len(answers),
                "tokens_per_second": round(sum(answer.tokens for answer in answers) / took, 1),
                "first_ms": percentiles([answer.first for answer in answers]),
                "between_ms": percentiles([gap for answer in answers for gap in answer.gaps]),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


async def load_once(server: Server) -> None:
    """Until everything is warm."""
    await ask(server, {"prompt": [5] * PROMPT_TOKENS, "max_tokens": 8, "logprobs": 0})


def measure_prompts(bundle: Path, seconds: float, extra: list[str]) -> list[dict[str, object]]:
    """Time between the tokens of four clients, alone and while long prompts arrive one after the other."""
    rows: list[dict[str, object]] = []

    async def load(server: Server, arriving: bool) -> tuple[list[float], list[float]]:
        ends, gaps, firsts = time.perf_counter() + seconds, list[float](), list[float]()

        async def writes(number: int) -> None:
            dice = random.Random(number)
            while time.perf_counter() < ends:
                answer = await ask(server, {"prompt": prompt(server, 16, dice), "max_tokens": 200, "logprobs": 0})
                gaps.extend(answer.gaps)

        async def reads() -> None:
            dice = random.Random(99)
            while arriving and time.perf_counter() < ends:
                answer = await ask(server, {"prompt": prompt(server, LONG, dice), "max_tokens": 1, "logprobs": 0})
                firsts.append(answer.first)

        await asyncio.gather(*(writes(number) for number in range(4)), reads())
        return gaps, firsts

    for arriving, read_tokens in ((False, 128), (True, 128), (True, 32), (True, 16)):
        with serving(bundle, "--max-batch", 8, "--cache-mb", 0, "--read-tokens", read_tokens, *extra) as server:
            asyncio.run(load_once(server))
            gaps, firsts = asyncio.run(load(server, arriving))
        row: dict[str, object] = {"long_prompts": arriving, "read_tokens": read_tokens, "between_ms": percentiles(gaps)}
        if firsts:
            row |= {"prompts_read": len(firsts), "first_of_long_ms": percentiles(firsts)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def measure_chat(bundle: Path, messages: int, extra: list[str]) -> list[dict[str, object]]:
    """Time to first token of each reply of a chat that grows."""
    rows: list[dict[str, object]] = []

    async def talk(server: Server) -> list[Answer]:
        said: list[dict[str, str]] = []
        answers = []
        for number in range(messages):
            said.append({"role": "user", "content": f"And what of the matter number {number}, which we spoke of?"})
            answers.append(await ask(server, {"messages": said, "max_tokens": 48, "seed": number}))
            said.append({"role": "assistant", "content": answers[-1].text})
        return answers

    async def talk_in_ids(server: Server) -> list[Answer]:
        """The same for a model without a tokenizer: messages of 20 tokens."""
        said, answers, dice = list[int](), list[Answer](), random.Random(3)
        for number in range(messages):
            said += prompt(server, 20, dice)
            answers.append(await ask(server, {"prompt": said, "max_tokens": 48, "seed": number, "logprobs": 0}))
            said += answers[-1].ids
        return answers

    with_text = open_bundle(bundle, check_hashes=False).manifest.tokenizer is not None
    for cache_mb in (512, 0):
        with serving(bundle, "--cache-mb", cache_mb, *extra) as server:
            answers = asyncio.run((talk if with_text else talk_in_ids)(server))
        first = [round(1e3 * answer.first, 1) for answer in answers]
        rows.append({"cache_mb": cache_mb, "first_ms": first, "cached_tokens": [answer.cached for answer in answers]})
        print(
            json.dumps(
                {"cache_mb": cache_mb, "first_ms_at": {place: first[place] for place in range(0, messages, 7)}, "last": first[-1]}
            )
        )
    return rows


def measure_memory(bundle: Path, requests: int, extra: list[str]) -> dict[str, object]:
    """Resident memory after every tenth of the requests, 16 at a time."""

    async def load(server: Server, count: int, seed: int) -> None:
        dice = random.Random(seed)

        async def client() -> None:
            for _ in range(count // 16):
                await ask(server, {"prompt": prompt(server, dice.randrange(1, 40), dice), "max_tokens": 2, "logprobs": 0})

        await asyncio.gather(*(client() for _ in range(16)))

    with serving(bundle, "--cache-mb", 64, *extra) as server:
        resident = []
        for tenth in range(10):
            asyncio.run(load(server, requests // 10, tenth))
            resident.append(round(server.resident_mb, 1))
    row: dict[str, object] = {"requests": requests, "resident_mb": resident}
    print(json.dumps(row), flush=True)
    return row


def measure_gone(bundle: Path, clients: int, extra: list[str]) -> dict[str, object]:
    """Clients that go away after up to half a second; then the slots."""

    async def load(server: Server) -> dict[str, int]:
        dice, gate = random.Random(7), asyncio.Semaphore(64)

        async def client() -> None:
            async with gate:
                body = {"prompt": prompt(server, dice.randrange(1, 200), dice), "max_tokens": 1000, "logprobs": 0}
                await ask(server, body, leave_after=dice.uniform(0.0, 0.5))

        await asyncio.gather(*(client() for _ in range(clients)))
        await asyncio.sleep(1.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /slots HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        content = (await reader.read()).split(b"\r\n\r\n", 1)[1]
        writer.close()
        return {name: value for name, value in json.loads(content).items() if isinstance(value, int)}

    with serving(bundle, "--max-batch", 8, *extra) as server:
        slots = asyncio.run(load(server))
        row: dict[str, object] = {"clients": clients, "slots_after": slots, "resident_mb": round(server.resident_mb, 1)}
    print(json.dumps(row), flush=True)
    return row


def main(
    bundle: Annotated[Path, typer.Argument(help="what is served")],
    parts: Annotated[str, typer.Option(help="separated by commas")] = "clients,prompts,chat,memory,gone",
    clients: Annotated[str, typer.Option(help="separated by commas")] = "1,4,16,64",
    seconds: Annotated[float, typer.Option(help="of each load")] = 20.0,
    messages: Annotated[int, typer.Option(help="of the chat")] = 50,
    requests: Annotated[int, typer.Option(help="for the memory")] = 10_000,
    threads: Annotated[int | None, typer.Option(help="of the server")] = None,
    triton: Annotated[str | None, typer.Option(help="PORT/MODEL of a running Triton: its clients are measured instead")] = None,
    output: Annotated[Path | None, typer.Option("-o", help="a JSON file")] = None,
) -> None:
    """Measure the server."""
    print(describe_machine(), "·", bundle.name, flush=True)
    extra = [] if threads is None else ["--threads", str(threads)]
    chosen, results = parts.split(","), dict[str, object](machine=describe_machine(), bundle=bundle.name)
    counts = [int(count) for count in clients.split(",")]
    if triton is not None:
        port, _, name = triton.partition("/")
        vocabulary = open_bundle(bundle, check_hashes=False).manifest.model.vocab_size
        running = contextlib.nullcontext(Server(None, int(port), vocabulary, name))
        results["triton"] = measure_clients(bundle, counts, seconds, extra, running)
        chosen = []
    if "clients" in chosen:
        results["clients"] = measure_clients(bundle, counts, seconds, extra)
    if "prompts" in chosen:
        results["prompts"] = measure_prompts(bundle, seconds, extra)
    if "chat" in chosen:
        results["chat"] = measure_chat(bundle, messages, extra)
    if "memory" in chosen:
        results["memory"] = measure_memory(bundle, requests, extra)
    if "gone" in chosen:
        results["gone"] = measure_gone(bundle, 1000, extra)
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
