"""Who may ask: keys, hosts and origins are checked before anything else is looked at.

Rule: by default a server answers programs on its own machine, and no web page but its own. A page on another
site can reach a loopback port through the browser, under a name of its own that leads here (DNS rebinding), or by sending a
form: the names in Host and Origin tell.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from retnet_export.serve.errors import ApiError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN = frozenset({"/", "/health"})
"""Paths that need no key: the page, which asks for one, and what a load balancer asks."""
CORS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "authorization, content-type",
    "Vary": "Origin",
}

Scope = MutableMapping[str, Any]


@dataclass(frozen=True)
class Guards:
    """What a request must show.

    Attributes:
        keys: one of which it must name; none: no key is needed.
        hosts: names in Host, without the port; None: any.
        origins: other sites whose pages may ask; "*" is all.
    """

    keys: Sequence[str] = ()
    hosts: Collection[str] | None = LOOPBACK
    origins: Collection[str] = ()

    def refuses(self, method: str, path: str, headers: dict[str, str]) -> ApiError | None:
        """Why a request is refused; None if it is not."""
        host = headers.get("host", "")
        if self.hosts is not None and _without_port(host) not in self.hosts:
            return ApiError(
                403, f"the host {host[:100]!r} is not a name of this server; add it with --allow-host", code="unknown_host"
            )
        origin = headers.get("origin")
        if origin is not None and not self.allows(origin, host):
            return ApiError(403, f"pages of {origin[:100]!r} may not send requests; allow them with --cors", code="unknown_origin")
        if method != "OPTIONS" and path not in OPEN and self.keys and not self._knows(headers.get("authorization", "")):
            return ApiError(
                401,
                "missing or unknown key; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def allows(self, origin: str, host: str) -> bool:
        """Whether pages of an origin may ask."""
        return "*" in self.origins or origin in self.origins or origin in (f"http://{host}", f"https://{host}")

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        # Hashes have one length, and all are compared: the time says nothing of the keys.
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()  # the bytes as they came
        found = [hmac.compare_digest(given, hashlib.sha256(each.encode()).digest()) for each in self.keys]
        return scheme.lower() == "bearer" and any(found)

    def middleware(self, app: Any, counted: Callable[[str, int], None]) -> Any:
        """An ASGI application around another that lets only such requests through."""

        async def guarded(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            origin, cors = headers.get("origin"), {}
            refusal = self.refuses(scope["method"], scope["path"], headers)
            if refusal is None and origin is not None:
                cors = {"Access-Control-Allow-Origin": origin, **CORS}

            async def send_and_count(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    route = scope.get("route")
                    counted(getattr(route, "path", "other"), message["status"])
                    message["headers"] = [
                        *message.get("headers", ()),
                        *((name.lower().encode(), value.encode("latin-1")) for name, value in cors.items()),
                    ]
                await send(message)

            answer: Response | None = None
            if refusal is not None:
                answer = JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
            elif scope["method"] == "OPTIONS" and origin is not None:
                answer = Response(status_code=204)
            await (answer or app)(scope, receive, send_and_count)

        return guarded


def _without_port(host: str) -> str:
    """The name in a Host header: "[::1]:8000" is "[::1]"."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0].lower()
