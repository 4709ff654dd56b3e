"""The chat page: one file, sent with a policy that lets it run its own script and speak to its own server, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

HTML = (files(__package__) / "page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """Of each inline script or style, as a policy names them."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in contents)


POLICY = {
    "default-src": "'none'",
    "script-src": _hashes("script"),
    "style-src": _hashes("style"),
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
