"""Errors as callers get them: RFC 9457 `application/problem+json` with a stable `code`.

    ApiProblem                 status, code, title
    ├─ InvalidJson             400 invalid_json
    ├─ Unauthorized            401 unauthorized, WWW-Authenticate
    ├─ Forbidden               403 forbidden
    ├─ InvalidRequest          422 invalid_request (fields named), scope_unavailable
    ├─ CheckpointRefused       422 checkpoint_refused
    ├─ NotFound                404 user_not_found, item_not_found
    ├─ BodyTooLarge            413 body_too_large
    ├─ Overloaded              503 overloaded, Retry-After
    ├─ RateLimited             429 rate_limited, Retry-After
    ├─ IngestionFull           429 ingestion_full, Retry-After
    ├─ WriteConflict           503 write_conflict, Retry-After
    ├─ MemoryUnavailable       503 memory_unavailable, Retry-After
    │  ├─ DeadlineExceeded     503 deadline_exceeded, Retry-After
    │  └─ ModelGone            the same: the memory service does not work with the model of the call any more
    └─ CallerGone              499 caller_gone (nobody reads it; it appears in the metrics)

Unknown paths and methods are 404 `not_found` and 405 `method_not_allowed`; an unexpected error is 500 `internal`,
without details. `request_id` is that of the log.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from memory_service.protocol.call.context import CALL, REQUEST_ID

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
HTTP_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
"""400: FastAPI raises it for a body that is not JSON at all (not UTF-8, or nested too deeply)."""


class ApiProblem(Exception):  # noqa: N818 - the term of RFC 9457
    """An error with a status and a stable code; `extra` holds further members of the problem document."""

    status, code, title = 500, "internal", "Internal error"

    def __init__(self, detail: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail, self.code, self.extra = detail, code or self.code, extra
        self.headers: dict[str, str] = {}


class Unauthorized(ApiProblem):
    """The request carries no API key, or an unknown one."""

    status, code, title = 401, "unauthorized", "API key wanted"

    def __init__(self, detail: str, *, known: bool = True) -> None:
        super().__init__(detail)
        self.headers = {"WWW-Authenticate": "Bearer" if known else 'Bearer error="invalid_token"'}


class Forbidden(ApiProblem):
    """The API key does not allow the scope of the route."""

    status, code, title = 403, "forbidden", "Scope missing"


class InvalidJson(ApiProblem):
    """The body is not JSON."""

    status, code, title = 400, "invalid_json", "Invalid JSON"


class InvalidRequest(ApiProblem):
    """The request can be read, but something in it is invalid."""

    status, code, title = 422, "invalid_request", "Invalid request"


class CheckpointRefused(ApiProblem):
    """The folder holds no checkpoint that could serve; the present model goes on serving."""

    status, code, title = 422, "checkpoint_refused", "Checkpoint refused"


class NotFound(ApiProblem):
    """The user, item or file is not known."""

    status, code, title = 404, "not_found", "Not found"


class BodyTooLarge(ApiProblem):
    """The body is larger than the limit."""

    status, code, title = 413, "body_too_large", "Body too large"


class Overloaded(ApiProblem):
    """The queue of requests is full."""

    status, code, title = 503, "overloaded", "Overloaded"


class RateLimited(ApiProblem):
    """The API key has used its requests of this second."""

    status, code, title = 429, "rate_limited", "Too many requests"


class IngestionFull(ApiProblem):
    """Too many interactions are being written."""

    status, code, title = 429, "ingestion_full", "Too many interactions at once"


class WriteConflict(ApiProblem):
    """Other writers changed the same users, several times in a row."""

    status, code, title = 503, "write_conflict", "Write conflict"


class MemoryUnavailable(ApiProblem):
    """The memory service or its Redis cannot be reached."""

    status, code, title = 503, "memory_unavailable", "Memory unavailable"


class MemoryUnreachable(MemoryUnavailable):
    """A memory replica cannot be reached or does not answer in time; another replica may."""


class ModelGone(MemoryUnavailable):
    """The memory service works with another model; taking that model over and asking again helps."""


class DeadlineExceeded(MemoryUnavailable):
    """The deadline of the caller or of the settings has passed."""

    status, code, title = 503, "deadline_exceeded", "Deadline exceeded"


class CallerGone(ApiProblem):
    """The caller closed the connection while its request waited."""

    status, code, title = 499, "caller_gone", "Caller gone"


def members(status: int, code: str, title: str, detail: str, **extra: Any) -> dict[str, Any]:
    """A problem document."""
    kind = f"urn:ramrec:problem:{code}"
    return {"type": kind, "title": title, "status": status, "detail": detail, "code": code} | extra


def problem(status: int, code: str, title: str, detail: str, **extra: Any) -> JSONResponse:
    """A problem document as a response."""
    call = CALL.get()
    if call is not None:
        extra["request_id"] = call.request_id
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(members(status, code, title, detail, **extra), status, headers, media_type=MEDIA_TYPE)


def refusal(error: ApiProblem) -> JSONResponse:
    """An `ApiProblem` as a response."""
    answer = problem(error.status, error.code, error.title, error.detail, **error.extra)
    answer.headers.update(error.headers)
    return answer


def install(app: FastAPI) -> None:
    """Answer every error of the application as a problem document."""

    @app.exception_handler(ApiProblem)
    async def api_problem(request: Request, error: ApiProblem) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        if any(found["type"] == "json_invalid" for found in errors):
            detail = str(errors[0].get("ctx", {}).get("error", "no JSON"))
            return problem(400, InvalidJson.code, InvalidJson.title, detail)
        fields = [{"field": _field(found["loc"]), "message": found["msg"]} for found in errors]
        detail = "; ".join(f"{field['field']}: {field['message']}" for field in fields[:5])
        return problem(422, "invalid_request", "Invalid request", detail, errors=fields)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTP_CODES.get(error.status_code, f"http_{error.status_code}")
        answer = problem(error.status_code, code, str(error.detail), f"{request.method} {request.url.path}")
        answer.headers.update(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            answer.headers["Allow"] = ", ".join(_methods(request))
        return answer

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> JSONResponse:
        answer = problem(500, ApiProblem.code, ApiProblem.title, "see the log of the api")
        call = CALL.get()
        if call is not None:  # this response is made outside of the middleware that adds the header
            answer.headers[REQUEST_ID] = call.request_id
        return answer


def _methods(request: Request) -> list[str]:
    """The methods that the path of a request allows."""
    routes = request.app.routes
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


def _field(place: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in place if part != "body") or "body"
