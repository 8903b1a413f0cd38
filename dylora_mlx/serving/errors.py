"""Errors of the HTTP API in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(BaseException):
    """Ends a request with a JSON error.

    A BaseException, because mlx-lm's handler turns every Exception into a 404 of its own.

    Args:
        status: HTTP status.
        message: One line: what is wrong, and what to do.
        code: OpenAI's short name of the error.
        param: The field of the request that is wrong.
        headers: Further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
