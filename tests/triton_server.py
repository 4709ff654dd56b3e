"""The real Triton Inference Server, from the wheel `nvidia-pytriton`, on the loopback.

The wheel is large and wants packages of its own, so it need not be installed: RETNET_PYTRITON may name a folder it was unpacked in.
Its Python backend was built before NumPy 2 and reads arrays wrongly with it. RETNET_TRITON_PYTHON may name a virtual environment of
this Python's version that has NumPy 1 and what `retnet-export[cpu,serve]` needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy


def found() -> Path | None:
    """The folder that holds `pytriton` and `nvidia_pytriton.libs`."""
    if named := os.environ.get("RETNET_PYTRITON"):
        return Path(named)
    spec = importlib.util.find_spec("pytriton")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent.parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def missing() -> str | None:
    """What is missing here to run it; None if nothing is."""
    if found() is None:
        return "the wheel nvidia-pytriton, which has Triton's server, is not installed"
    if numpy.__version__.startswith("1.") or os.environ.get("RETNET_TRITON_PYTHON"):
        return None
    return "Triton's Python backend needs NumPy 1: RETNET_TRITON_PYTHON names an environment that has it"


class Triton:
    """A running server: its ports and its log."""

    def __init__(self, log: Path) -> None:
        self.http, self.grpc, self._log = free_port(), free_port(), log
        self.url = f"http://127.0.0.1:{self.http}/v2"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def triton(repository: Path, scratch: Path, *models: str) -> Iterator[Triton]:
    """Start it with some of a repository's models."""
    wheel = found()
    assert wheel is not None
    home = wheel / "pytriton" / "tritonserver"
    backend = scratch / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    stub = home / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
    for source in (*(home / "backends" / "python").iterdir(), stub):
        if not (backend / source.name).exists():
            (backend / source.name).symlink_to(source)
    (home / "bin" / "tritonserver").chmod(0o755)
    stub.chmod(0o755)
    server = Triton(scratch / "triton.log")
    command = [
        home / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={scratch / 'backends'}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        "--http-address=127.0.0.1",
        f"--http-port={server.http}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={server.grpc}",
        "--allow-metrics=false",
        "--strict-readiness=true",
        "--exit-on-error=false",
        "--disable-auto-complete-config",
    ]
    paths = [str(wheel / "nvidia_pytriton.libs"), str(Path(sys.base_prefix) / "lib")]
    python = Path(os.environ.get("RETNET_TRITON_PYTHON", sys.prefix))
    # The stub is a Python of its own: it takes the environment whose `python` comes first.
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(paths), "PATH": f"{python / 'bin'}:{os.environ['PATH']}"}
    environment |= {"VIRTUAL_ENV": str(python), "OMP_NUM_THREADS": "1"}
    with (scratch / "triton.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{server.url}/health/live").status_code == 200:
                        break
                time.sleep(0.1)
            else:
                raise AssertionError(server.log[-3000:])
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
