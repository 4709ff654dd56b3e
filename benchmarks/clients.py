"""Clients of a server on the loopback: they stream answers and note when each token came.

Rule: one client for all servers. A token counts when its event has been read, and sampling is the same everywhere: the 40 most
probable tokens at a temperature of 0.8. Lengths of answers vary and begin out of step, so that requests do not end together.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, NEW_TOKENS = 32, 64
TEMPERATURE, TOP_K = 0.8, 40
PERCENTS = (50, 95, 99)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        dialect: "openai", "llama.cpp" or "triton".
        port: of HTTP.
        vocabulary: how many tokens there are.
        process: its id.
        model: its name, for Triton.
    """

    dialect: str
    port: int
    vocabulary: int
    process: int
    model: str = ""

    @property
    def resident_mb(self) -> float:
        """Memory of the process."""
        status = Path(f"/proc/{self.process}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def prompt(self, count: int, dice: random.Random) -> list[int]:
        """Random tokens."""
        return [dice.randrange(3, self.vocabulary) for _ in range(count)]


@dataclass(frozen=True)
class Request:
    """What a client asks: tokens or a chat's messages to go on from, and how many new tokens."""

    new_tokens: int
    tokens: Sequence[int] = ()
    messages: Sequence[Mapping[str, str]] = ()
    seed: int = 0


@dataclass
class Answer:
    """What a client saw: when it asked and when each token came, by the clock of `time.perf_counter`."""

    began: float = 0.0
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    cached: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.began


def _openai(server: Server, request: Request) -> tuple[str, dict[str, Any]]:
    asked = {"messages": request.messages} if request.messages else {"prompt": request.tokens}
    path = "/v1/chat/completions" if request.messages else "/v1/completions"
    sampling = {"temperature": TEMPERATURE, "top_k": TOP_K, "seed": request.seed, "ignore_eos": True}
    wanted = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    return path, {**asked, **sampling, **wanted, "max_tokens": request.new_tokens}


def _llama_cpp(server: Server, request: Request) -> tuple[str, dict[str, Any]]:
    sampling = {"temperature": TEMPERATURE, "top_k": TOP_K, "samplers": ["top_k", "temperature"], "seed": request.seed}
    wanted = {"stream": True, "return_tokens": True, "ignore_eos": True, "cache_prompt": False}
    return "/completion", {"prompt": request.tokens, "n_predict": request.new_tokens, **sampling, **wanted}


def _triton(server: Server, request: Request) -> tuple[str, dict[str, Any]]:
    sampling = {"temperature": str(TEMPERATURE), "top_k": TOP_K, "seed": request.seed, "ignore_eos": True}
    body = {"tokens": request.tokens, "parameters": {**sampling, "max_tokens": request.new_tokens}}
    return f"/v2/models/{server.model}/generate_stream", body


def _openai_event(event: dict[str, Any], answer: Answer) -> Sequence[int]:
    if usage := event.get("usage"):
        answer.cached = usage["prompt_tokens_details"]["cached_tokens"]
    if not event["choices"]:
        return ()
    (choice,) = event["choices"]
    answer.text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    ids: Sequence[int] = choice.get("token_ids", ())
    return ids


def _llama_cpp_event(event: dict[str, Any], answer: Answer) -> Sequence[int]:
    return () if event["stop"] else event["tokens"]


def _triton_event(event: dict[str, Any], answer: Answer) -> Sequence[int]:
    return () if event["token"] < 0 else (event["token"],)


DIALECTS: Mapping[str, tuple[Callable[[Server, Request], tuple[str, dict[str, Any]]], Callable[[Any, Answer], Sequence[int]]]] = {
    "openai": (_openai, _openai_event),
    "llama.cpp": (_llama_cpp, _llama_cpp_event),
    "triton": (_triton, _triton_event),
}


async def ask(server: Server, request: Request, answer: Answer | None = None) -> Answer:
    """One request over a connection of its own; its answer, filled as tokens come. Cancel it, and the client is gone.

    Raises:
        RuntimeError: the server refused.
    """
    answer = Answer() if answer is None else answer
    write, read = DIALECTS[server.dialect]
    path, body = write(server, request)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    answer.began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{path}: the server answered {status!r} {(await reader.read())[-500:]!r}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                tokens = read(json.loads(line[6:]), answer)
                answer.ids += tokens
                answer.times += [time.perf_counter()] * len(tokens)
    finally:
        writer.close()
    return answer


async def get(server: Server, path: str) -> str:
    """The body of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    content = await reader.read()
    writer.close()
    return content.split(b"\r\n\r\n", 1)[1].decode()


@dataclass(frozen=True)
class Figures:
    """What happened within a window: tokens per second, and milliseconds at `PERCENTS` to the first token and between tokens."""

    speed: float
    first: tuple[float, ...]
    between: tuple[float, ...]

    @staticmethod
    def of(answers: Sequence[Answer], opens: float, ends: float) -> Figures:
        """Of the tokens that came between two times."""
        gaps, firsts, tokens = [], [], 0
        for answer in answers:
            inside = [opens <= moment < ends for moment in answer.times]
            tokens += sum(inside)
            if inside and inside[0]:
                firsts.append(answer.first)
            gaps += [gap for gap, counts in zip(np.diff(answer.times), inside[1:], strict=True) if counts]
        return Figures(tokens / (ends - opens), percentiles(firsts), percentiles(gaps))


def percentiles(seconds: Sequence[float]) -> tuple[float, ...]:
    """Milliseconds at `PERCENTS`; NaN if nothing was seen."""
    return tuple(1e3 * float(np.percentile(seconds, percent)) if seconds else float("nan") for percent in PERCENTS)


def median(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure."""

    def middle(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(float(value) for value in np.nanmedian(np.array(rows), axis=0))

    return Figures(
        float(np.median([each.speed for each in rounds])),
        middle([each.first for each in rounds]),
        middle([each.between for each in rounds]),
    )


async def load(server: Server, clients: int, seconds: float, disturb: Callable[[], Any] | None = None) -> Figures:
    """Clients that ask again as soon as they have their answer, watched for some seconds once they are out of step.

    Args:
        server: whom they ask.
        clients: how many. They are out of step when so many answers have ended, of which the first ones are short.
        seconds: how long they are watched.
        disturb: makes a coroutine that runs beside them.
    """
    answers: list[Answer] = []
    ended = 0
    out_of_step = asyncio.Event()

    async def client(number: int) -> None:
        nonlocal ended
        dice = random.Random(number)
        new_tokens = dice.randint(1, NEW_TOKENS)
        while True:
            answers.append(Answer())
            await ask(server, Request(new_tokens, server.prompt(PROMPT_TOKENS, dice), seed=number), answers[-1])
            new_tokens = dice.randint(NEW_TOKENS // 2, NEW_TOKENS * 3 // 2)
            ended += 1
            if ended >= clients:
                out_of_step.set()

    async def watch() -> tuple[float, float]:
        await out_of_step.wait()
        opens = time.perf_counter()
        await asyncio.sleep(seconds)
        return opens, time.perf_counter()

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    if disturb is not None:
        tasks.append(asyncio.create_task(disturb()))
    watching = asyncio.create_task(watch())
    done, _ = await asyncio.wait([watching, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in (watching, *tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done - {watching}:
        task.result()  # clients never end: what ended has failed
    await asyncio.sleep(0.5)  # the server notices that they are gone
    return Figures.of(answers, *watching.result())
