"""Errors on the wire: HTTP statuses, and the two shapes a body may have.

OpenAI's routes answer in OpenAI's shape, all others with ``{"error": {"code", "message",
"retryable"}}``. Beside the worker's typed errors HTTP has refusals of its own: no key, no
such job, a method that a route does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from whisper_worker.errors import InternalError, WhisperWorkerError

OPENAI_PREFIX = "/v1/"

STATUSES: Mapping[str, int] = {
    "INVALID_INPUT": 422,
    "FORBIDDEN": 403,
    "DOWNLOAD": 424,
    "TOO_LARGE": 413,
    "DECODE": 415,
    "TIMEOUT": 504,
    "MODEL": 503,
    "OUT_OF_MEMORY": 503,
    "ENGINE": 500,
    "BUSY": 429,
    "CANCELLED": 409,
    "INTERNAL": 500,
}
"""HTTP status of each typed error."""

_OPENAI_STATUSES = {"INVALID_INPUT": 400, "DECODE": 400}
"""Where OpenAI's API differs: its clients know a bad request by 400."""

RETRY_AFTER = 5
"""Seconds after which a caller who was turned away may come again: a batch or two."""


class Refused(Exception):
    """A request that gets no result: its status, and what the body says."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retryable = retryable
        self.param = param
        self.headers = dict(headers or {})


def refusal(error: Exception, path: str) -> Refused:
    """What a caller of ``path`` hears of an error; of one that is not typed, that there was one."""
    if isinstance(error, Refused):
        return error
    typed = error if isinstance(error, WhisperWorkerError) else InternalError("The service failed on this request.")
    status = STATUSES[typed.code]
    if path.startswith(OPENAI_PREFIX):
        status = _OPENAI_STATUSES.get(typed.code, status)
    named = re.match(r"The (?:field )?(language\b|(?<=field )\w+)", typed.message)
    return Refused(
        status,
        typed.code,
        typed.message,
        retryable=typed.retryable,
        param=named[1] if named else None,
        headers={"Retry-After": str(RETRY_AFTER)} if status in (429, 503) and typed.retryable else {},
    )


def error_body(refused: Refused, path: str) -> dict[str, Any]:
    """The JSON body that callers of ``path`` expect."""
    if not path.startswith(OPENAI_PREFIX):
        return {"error": {"code": refused.code, "message": refused.message, "retryable": refused.retryable}}
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    if refused.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


def error_response(error: Exception, path: str) -> JSONResponse:
    refused = refusal(error, path)
    return JSONResponse(error_body(refused, path), refused.status, refused.headers)
