"""An engine in a separate process, so that its memory is its own and a crash ends only its cell.

Rule: a fresh process for every engine and cell, pinned to the same cores; while one runs, the others sleep in a read. Not
multiprocessing: its children run the caller's main module again, which not every program guards against.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from retnet_export.compare.engines import Runnable
from retnet_export.compare.results import Cell
from retnet_export.runtime.errors import UserError

MakeEngine = Callable[[], Runnable]
"""Makes the engine inside the new process; it is pickled on its way there."""

PROGRAM = "import sys; sys.path[:] = {path!r}; from retnet_export.compare.worker import serve; serve()"


class Worker:
    """A running process with one engine that is open for one cell.

    Args:
        make: makes the engine.
        runs: the most runs it will be asked for, so that a cache has room for them.
        cores: the processor cores it may use.

    Raises:
        UserError: the engine cannot do it, or its process died: a message for the user.
    """

    def __init__(self, make: MakeEngine, cell: Cell, runs: int, cores: Sequence[int]) -> None:
        command = [sys.executable, "-c", PROGRAM.format(path=sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._ask((make, cell, runs, tuple(cores)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(self, count: int) -> list[float]:
        """Do the cell's work `count` times; milliseconds of each."""
        times = self._ask(count)
        assert isinstance(times, list)
        return times

    def memory(self) -> tuple[int | None, int | None]:
        """Resident bytes of the process: now, and at most since it began."""
        return resident_bytes(self._process.pid, "VmRSS"), resident_bytes(self._process.pid, "VmHWM")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _ask(self, question: object) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, question)
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise UserError(f"its process {_ending(self._process.wait())}") from error
        if isinstance(answer, str):
            raise UserError(answer)
        return answer


def resident_bytes(pid: int, field: str) -> int | None:
    """A field of /proc/PID/status in bytes; None where there is no such file (outside Linux)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def serve() -> None:
    """The child's side: an engine is described on stdin, then counts of runs; times, or a message, go to stdout."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        make, cell, runs, cores = pickle.load(requests)
        with contextlib.suppress(AttributeError, OSError):  # no pinning outside Linux
            os.sched_setaffinity(0, cores)
        try:
            engine = make()
            engine.open(cell.batch, cell.context, cell.tokens if cell.kind == "prefill" else runs)
            _send(answers, None)
            while True:
                _send(answers, timed(engine, cell, pickle.load(requests)))
        except UserError as error:
            _send(answers, str(error))
        except MemoryError:
            _send(answers, "there is not enough memory for it")


def timed(engine: Runnable, cell: Cell, count: int) -> list[float]:
    """Milliseconds of each of `count` runs of a cell."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        if cell.kind == "decode":
            engine.step()
        else:
            engine.prefill(cell.tokens)
        times.append(1e3 * (time.perf_counter() - began))
    return times


def _send(pipe: IO[bytes], message: object) -> None:
    pickle.dump(message, pipe)
    pipe.flush()


def _ending(code: int) -> str:
    return "was killed, probably because memory ran out" if code == -9 else f"ended with code {code}"
