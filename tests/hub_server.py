"""A small server that speaks the Hugging Face Hub's protocol on the loopback, over folders: what huggingface_hub asks of it.

    GET  /api/models/NAME[/revision/REV]         the repository: its commit and its files
    GET  /api/models/NAME/tree/REV               the same files with sizes
    HEAD /NAME/resolve/REV/FILE                  commit, ETag, size
    GET  /NAME/resolve/REV/FILE                  the content, or from a place on (Range)

Refusals are told by the header X-Error-Code, as there: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


@dataclass
class Hub:
    """Repositories, and what was asked of them.

    Attributes:
        repositories: folders by name.
        gated: names that need `TOKEN`.
        cut: bytes after which the next download of a file breaks off, by file name; used once.
        stall: bytes after which the next download of a file stands still until the server closes; used once.
        downloads: (file, first byte) of every download, in order.
    """

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    downloads: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""
    stalled: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more requests: the network is down."""
        self.gone.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            name, kind, revision = match[1], match[2], match[3] or "main"
            if (folder := self._allowed(name, revision)) is not None:
                self._send_json(self._tree(folder) if kind == "tree" else self._info(name, folder))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (folder := self._allowed(match[1], match[2])) is not None:
                self._send_file(folder, match[3], body)
        else:
            self._refuse(404, "NotFound", f"no such page: {path}")

    def _allowed(self, name: str, revision: str) -> Path | None:
        """The folder of a repository, or None after a refusal."""
        if name not in self.hub.repositories:
            # As the Hub does without a token: it does not tell the absent from the private.
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "GatedRepo", f"Access to model {name} is restricted")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return self.hub.repositories[name]
        return None

    def _info(self, name: str, folder: Path) -> dict[str, object]:
        files = [{"rfilename": str(path.relative_to(folder))} for path in _files(folder)]
        return {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "siblings": files}

    def _tree(self, folder: Path) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _hash(path)}
            for path in _files(folder)
        ]

    def _send_json(self, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_file(self, folder: Path, name: str, body: bool) -> None:
        path = folder / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(found[1]) if found else 0
        self.send_response(206 if found else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_hash(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if found:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        self.hub.downloads.append((name, first))
        cut, stall = self.hub.cut.pop(name, None), self.hub.stall.pop(name, None)
        until = min(first + (cut or stall or len(content)), len(content))
        self.wfile.write(content[first:until])
        if stall is not None:
            self.hub.stalled.set()
            self.hub.gone.wait()
        if cut is not None or stall is not None:
            self.close_connection = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
