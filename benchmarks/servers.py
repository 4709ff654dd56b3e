"""Servers that are measured, each a process of its own: ours, llama.cpp's with a Transformer of the bundle's size, and Triton."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from clients import Server
from common import CACHE

from retnet_export.compare.baseline import baseline_for
from retnet_export.compare.peers.llama_cpp import gguf_format, write_gguf
from retnet_export.runtime.bundle.bundle import open_bundle

CAPACITY = 4_096
"""The longest sequence of the Transformer's file."""


def vocabulary_of(bundle: Path) -> int:
    """How many tokens a bundle has."""
    return open_bundle(bundle, check_hashes=False).manifest.model.vocab_size


@contextlib.contextmanager
def serving(
    bundle: Path, *arguments: object, python: str = sys.executable, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`retnet-export serve`, until the block ends."""
    command = [python, "-m", "retnet_export", "serve", str(bundle), "--port", "0", "--max-queue", "2000", "--patience", "1"]
    with _process([*command, *map(str, arguments)], environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("ready"):
                port = int(re.search(r"http://127.0.0.1:(\d+)", line)[1])  # type: ignore[index]
                yield Server("openai", port, vocabulary_of(bundle), process.pid)
                return
        raise SystemExit(f"the server of {bundle} ended with {process.wait()}")


@contextlib.contextmanager
def serving_llama_cpp(program: Path, bundle: Path, *, threads: int, slots: int, context: int) -> Iterator[Server]:
    """llama.cpp's `llama-server` with the Transformer that `compare` sets beside the bundle, in llama.cpp's nearest format.

    Args:
        program: its path.
        bundle: gives the size and the format.
        threads: for all products.
        slots: sequences that generate together.
        context: tokens of one of them.
    """
    baseline = baseline_for(open_bundle(bundle, check_hashes=False), CACHE, capacity=CAPACITY)
    formats = "-".join((baseline.weights, *(gguf_format(baseline, name) for name in ("embedding", "head"))))
    path = CACHE / f"transformer-{baseline.config.parameters // 1_000_000}M-{formats}.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        write_gguf(baseline, path)
    port = free_port()
    sizes = ["-t", threads, "-tb", threads, "-np", slots, "-c", slots * context]
    command = [program, "-m", path, "--host", "127.0.0.1", "--port", port, *sizes, "--no-webui", "--log-disable"]
    with _process([*map(str, command)], None, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield Server("llama.cpp", port, baseline.config.vocab_size, process.pid)


@contextlib.contextmanager
def _process(command: list[str], environment: Mapping[str, str] | None, **options: int) -> Iterator[subprocess.Popen[str]]:
    process: subprocess.Popen[str] = subprocess.Popen(command, text=True, env=environment, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def wait_for(address: str, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Until an address answers 200.

    Raises:
        SystemExit: the process ended, or took too long.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(address) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"{address} did not answer; the process ended with {process.poll()}")
