"""Errors as responses: `Problem` in msgpack, with a status and a stable code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from memory_service.protocol.columns import BadRequest
from memory_service.protocol.structs import CONTENT_TYPE, Problem
from memory_service.service.merging import TooLate
from memory_service.service.models import ModelMismatch
from memory_service.store.record import RecordError
from memory_service.store.redis.errors import StoreUnavailable
from model.checkpoint import CheckpointError

RETRY_AFTER_S = 1
"""What 429 and 503 tell the caller to wait."""


class TooLarge(ValueError):  # noqa: N818 - answered with 413
    """The body exceeds the limit."""


STATUS: dict[type[Exception], tuple[int, str]] = {
    msgspec.MsgspecError: (400, "invalid_body"),
    UnicodeDecodeError: (400, "invalid_body"),  # what msgspec raises for text that is not UTF-8
    RequestValidationError: (422, "invalid_query"),
    CheckpointError: (422, "checkpoint_refused"),
    ModelMismatch: (409, "model_mismatch"),
    BadRequest: (422, "invalid_columns"),
    TooLarge: (413, "body_too_large"),
    RecordError: (500, "damaged_record"),
    TooLate: (503, "deadline_exceeded"),
    StoreUnavailable: (503, "store_unavailable"),
}


def problem(status: int, code: str, detail: str) -> Response:
    """The response for an error."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    content = msgspec.msgpack.encode(Problem(code, detail))
    return Response(content, status, headers, media_type=CONTENT_TYPE)


def handle_errors(app: FastAPI) -> None:
    """Have the application answer errors with problems."""
    for error, (status, code) in STATUS.items():
        app.add_exception_handler(error, _handler(status, code))
    app.add_exception_handler(HTTPException, _unrouted)


def _handler(status: int, code: str) -> Callable[[Request, Any], Awaitable[Response]]:
    async def handle(request: Request, error: Any) -> Response:
        return problem(status, code, str(error))

    return handle


async def _unrouted(request: Request, error: Any) -> Response:
    """The response for an unknown path, or a method that a path does not have."""
    answer = problem(error.status_code, f"http_{error.status_code}", f"{request.method} {request.url.path}")
    if error.status_code == 405:  # the framework names the methods of one route, not of all routes of the path
        scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "DELETE")}
        routes = request.app.routes
        allowed = [name for name, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in routes)]
        answer.headers["Allow"] = ", ".join(allowed)
    return answer
