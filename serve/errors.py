"""Faults of requests, as OpenAI's clients know them: a status and a body with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the field at fault, if it is one.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """As JSON."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, _type(self.status)),
                "param": self.param,
                "code": self.code,
            }
        }


TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""Names of errors by status; others are of the request below 500, of the server from there on."""


def _type(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def not_supported(field: str, what: str) -> ApiError:
    """A field that OpenAI has and we have not."""
    return ApiError(400, f"{field}: {what} is not supported by this server", param=field, code="unsupported_parameter")
