"""The server under load, over the loopback: servers in processes of their own, clients in this one, taking turns.

    python benchmarks/serve.py BUNDLE… --parts clients [--clients 1,8,64] [--rounds 3] [--llama-server PROGRAM]

clients   throughput, time to first token and between tokens, of clients that ask again as soon as they have their answer
prompts   time between the tokens of four clients while prompts of 2,000 tokens arrive
chat      time to first token over a chat of 50 messages, with and without the prefix cache
memory    resident memory over 10,000 small requests
gone      a thousand clients that go away at random, and the slots after them

Every part prints a table. A figure is the median over rounds; in a round every candidate has its turn, and every other round goes
backwards. Clients and servers share the processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from clients import NEW_TOKENS, PROMPT_TOKENS, Answer, Figures, Request, Server, ask, get, load, median
from common import describe_machine
from servers import serving, serving_llama_cpp
from turns import clients_table, in_ms, span, table, take_turns

from retnet_export.runtime.bundle.bundle import open_bundle

LONG_PROMPT = 2_000
WRITERS = 4
MESSAGE_TOKENS, REPLY_TOKENS = 8, 12
GONE_AT_ONCE, GONE_WITHIN, GONE_SLOTS = 32, 1.0, 16


@dataclass(frozen=True)
class Setup:
    """How to measure.

    Attributes:
        seconds: of each load.
        rounds: of turns.
        options: of our server.
        llama_server: llama.cpp's program; None: without it.
        threads: of every server; None: their choice, which for llama.cpp is here one per processor.
    """

    seconds: float
    rounds: int
    options: Sequence[str] = ()
    llama_server: Path | None = None
    threads: int | None = None

    @property
    def ours(self) -> list[str]:
        """Options of our server."""
        return [*self.options, *([] if self.threads is None else ["--threads", str(self.threads)])]

    @property
    def llama_threads(self) -> int:
        """Threads of llama.cpp's."""
        return self.threads or os.cpu_count() or 1


def measure_clients(bundles: Sequence[Path], counts: Sequence[int], setup: Setup) -> None:
    """Every client asks again as soon as it has its answer."""
    slots = max(counts)
    with contextlib.ExitStack() as stack:
        servers = {}
        for bundle in bundles:
            arguments = ["--max-batch", slots, "--cache-mb", 0, *setup.ours]
            servers[bundle.stem] = stack.enter_context(serving(bundle, *arguments))
            if setup.llama_server is not None:
                context = 2 * (PROMPT_TOKENS + NEW_TOKENS * 3 // 2)
                llama = serving_llama_cpp(setup.llama_server, bundle, threads=setup.llama_threads, slots=slots, context=context)
                servers[f"llama.cpp beside {bundle.stem}"] = stack.enter_context(llama)
        print(f"prompts of {PROMPT_TOKENS} tokens, answers of {NEW_TOKENS // 2} to {NEW_TOKENS * 3 // 2}, {setup.rounds} rounds")
        clients_table(take_turns(servers, counts, setup.rounds, setup.seconds), counts)


def measure_prompts(bundle: Path, setup: Setup) -> None:
    """Time between the tokens of four clients, alone and while long prompts arrive one after the other."""

    async def arrive(server: Server, firsts: list[float]) -> None:
        dice = random.Random(99)
        while True:
            firsts.append((await ask(server, Request(1, server.prompt(LONG_PROMPT, dice)))).first)

    found: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    firsts: dict[tuple[str, str], list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        servers = {}
        for read_tokens in (16, 32, 128):
            arguments = ["--max-batch", WRITERS + 1, "--cache-mb", 0, *setup.ours, "--read-tokens", read_tokens]
            servers[f"--read-tokens {read_tokens}"] = stack.enter_context(serving(bundle, *arguments))
        if setup.llama_server is not None:
            sizes = {"threads": setup.llama_threads, "slots": WRITERS + 1, "context": LONG_PROMPT + 2 * NEW_TOKENS}
            servers["llama.cpp"] = stack.enter_context(serving_llama_cpp(setup.llama_server, bundle, **sizes))
        for number in range(setup.rounds):
            for name in list(servers)[:: 1 if number % 2 == 0 else -1]:
                server = servers[name]
                for what in ("alone", "prompts arrive"):
                    if what == "alone" and name not in ("--read-tokens 32", "llama.cpp"):
                        continue
                    seen = firsts[name, what]
                    disturb = None if what == "alone" else lambda server=server, seen=seen: arrive(server, seen)
                    found[name, what].append(asyncio.run(load(server, WRITERS, setup.seconds, disturb)))
    print(f"{WRITERS} clients that write; prompts of {LONG_PROMPT} tokens, one after the other")
    rows = []
    for (name, what), rounds in found.items():
        seen = firsts[name, what]
        rows.append(
            [name, what, span(rounds), in_ms(median(rounds).between), f"{np.median(seen):.1f} s ({len(seen)})" if seen else ""]
        )
    head = ["server", "", "tokens/s of the four", "between tokens, ms, p50 / p95 / p99", "first token of a long prompt (how many)"]
    table(head, rows)


def measure_chat(bundle: Path, messages: int, setup: Setup) -> None:
    """Time to first token of each reply of a chat that grows.

    Each message goes to both servers, and the chat goes on with the first one's reply.
    """
    firsts: dict[str, list[list[float]]] = defaultdict(list)
    tokens = cached = 0
    with serving(bundle, "--cache-mb", 512, *setup.ours) as first, serving(bundle, "--cache-mb", 0, *setup.ours) as second:
        servers = {"with the cache": first, "without": second}
        for number in range(setup.rounds):
            dice, said = random.Random(number), list[int]()
            for place in range(messages):
                said += first.prompt(MESSAGE_TOKENS, dice)
                answers: dict[str, Answer] = {}
                for name in list(servers)[:: 1 if (number + place) % 2 == 0 else -1]:
                    answers[name] = asyncio.run(ask(servers[name], Request(REPLY_TOKENS, said, seed=place)))
                    if place == 0:
                        firsts[name].append([])
                    firsts[name][-1].append(answers[name].first)
                tokens, cached = len(said), answers["with the cache"].cached
                said += answers["with the cache"].ids
    places = sorted({*range(0, messages, 7), messages - 1})
    middle = {name: 1e3 * np.median(np.array(rounds), axis=0) for name, rounds in firsts.items()}
    rows = [[name, *(f"{values[place]:,.0f}" for place in places)] for name, values in middle.items()]
    ratios = middle["without"] / middle["with the cache"]
    rows.append(["ratio", *(f"{ratios[place]:.1f}" for place in places)])
    print(f"messages of {MESSAGE_TOKENS} tokens, replies of {REPLY_TOKENS}; {setup.rounds} chats; time to first token, ms")
    table(["message", *(str(place + 1) for place in places)], rows)
    print(f"of the last prompt's {tokens} tokens, {cached} came from the cache")


def measure_memory(bundle: Path, requests: int, setup: Setup) -> None:
    """Resident memory after every tenth of the requests, 16 at a time."""

    async def some(server: Server, count: int, seed: int) -> None:
        dice = random.Random(seed)

        async def client() -> None:
            for _ in range(count // 16):
                await ask(server, Request(2, server.prompt(dice.randrange(1, 40), dice)))

        await asyncio.gather(*(client() for _ in range(16)))

    with serving(bundle, "--cache-mb", 64, *setup.ours) as server:
        resident = [server.resident_mb]
        for tenth in range(10):
            asyncio.run(some(server, requests // 10, tenth))
            resident.append(server.resident_mb)
    print(f"{requests:,} requests of up to 40 tokens, 16 at a time, a cache of 64 MB; resident MB")
    table(["requests", *(f"{tenth * requests // 10:,}" for tenth in range(11))], [["MB", *(f"{value:.1f}" for value in resident)]])


def measure_gone(bundle: Path, clients: int, setup: Setup) -> None:
    """Clients that go away after up to a second; then the slots."""

    async def leave(server: Server) -> tuple[int, dict[str, Any]]:
        dice, gate, written = random.Random(7), asyncio.Semaphore(GONE_AT_ONCE), 0

        async def client() -> None:
            nonlocal written
            async with gate:
                answer = Answer()
                request = Request(1_000, server.prompt(dice.randrange(1, 200), dice))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ask(server, request, answer), dice.uniform(0.0, GONE_WITHIN))
                written += bool(answer.times)

        await asyncio.gather(*(client() for _ in range(clients)))
        await asyncio.sleep(1.0)
        return written, json.loads(await get(server, "/slots"))

    with serving(bundle, "--max-batch", GONE_SLOTS, *setup.ours) as server:
        before = server.resident_mb
        written, slots = asyncio.run(leave(server))
        after = server.resident_mb
        answer = asyncio.run(ask(server, Request(8, [5] * 8)))
    print(f"{clients:,} clients, {GONE_AT_ONCE} at a time, that go away within {GONE_WITHIN} s; a second later:")
    table(
        ["had a token", "slots", "generating", "reading", "waiting", "the next client's tokens", "resident MB before, after"],
        [
            [
                written,
                *(slots[name] for name in ("slots", "generating", "reading", "waiting")),
                len(answer.ids),
                f"{before:.0f}, {after:.0f}",
            ]
        ],
    )


def main(
    bundles: Annotated[list[Path], typer.Argument(help="what is served; several take turns in the part clients")],
    parts: Annotated[str, typer.Option(help="separated by commas")] = "clients,prompts,chat,memory,gone",
    clients: Annotated[str, typer.Option(help="separated by commas")] = "1,8,64",
    seconds: Annotated[float, typer.Option(help="for which each load is watched, once the clients are out of step")] = 10.0,
    rounds: Annotated[int, typer.Option(help="of turns")] = 3,
    messages: Annotated[int, typer.Option(help="of the chat")] = 50,
    requests: Annotated[int, typer.Option(help="for the memory")] = 10_000,
    threads: Annotated[int | None, typer.Option(help="of every server")] = None,
    options: Annotated[str, typer.Option(help="further options of our server, as in a shell")] = "",
    llama_server: Annotated[
        Path | None, typer.Option(help="llama.cpp's server, measured beside ours in clients and prompts")
    ] = None,
) -> None:
    """Measure the server."""
    setup = Setup(seconds, rounds, shlex.split(options), llama_server, threads)
    print(describe_machine(), f"load {os.getloadavg()[0]:.1f}", sep="; ", flush=True)
    for part in parts.split(","):
        if part == "clients":
            print("\nclients: " + ", ".join(bundle.name for bundle in bundles))
            measure_clients(bundles, [int(count) for count in clients.split(",")], setup)
            continue
        for bundle in bundles:
            print(f"\n{part}: {open_bundle(bundle, check_hashes=False).path.name}")
            {
                "prompts": lambda: measure_prompts(bundle, setup),  # noqa: B023 (called at once)
                "chat": lambda: measure_chat(bundle, messages, setup),  # noqa: B023
                "memory": lambda: measure_memory(bundle, requests, setup),  # noqa: B023
                "gone": lambda: measure_gone(bundle, 1_000, setup),  # noqa: B023
            }[part]()


if __name__ == "__main__":
    typer.run(main)
