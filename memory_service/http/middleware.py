"""What every request passes through before it reaches a route."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from memory_service.http.problems import problem
from memory_service.protocol.call.envelope import UNKNOWN, Envelope
from memory_service.settings import MemorySettings

OPEN = frozenset({"/health/live", "/health/ready", "/openapi.json"})
"""Paths that need no token: probes of orchestration, and the document. They, too, refuse a wrong token."""
PROBES = OPEN | {"/metrics"}
"""Paths whose requests do not appear in the access log."""
INGEST = ("/v1/plan", "/v1/write", "/v1/rekey")
RETRIEVE = "/v1/retrieve"


class AuthMiddleware:
    """ASGI middleware: checks the token, limits the number of calls in progress, and records every request."""

    def __init__(self, app: ASGIApp, envelope: Envelope, settings: MemorySettings) -> None:
        self.app, self._envelope = app, envelope
        token = settings.token
        self._secret = None if token is None else b"Bearer " + token.get_secret_value().encode()
        ingest = CallLimit(settings.queue_ingest)
        self._limits = dict.fromkeys(INGEST, ingest) | {RETRIEVE: CallLimit(settings.queue_retrieve)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with self._envelope.open(scope) as exchange:
            with suppress(ValueError):  # an invalid timeout counts as none
                exchange.call.hear_timeout(exchange.headers)
            path = scope["path"]
            exchange.is_logged, exchange.is_notable = path not in PROBES, scope["method"] == "DELETE"
            send = exchange.recorded(send)
            try:
                if self._is_trusted(path, exchange.headers.get(b"authorization")):
                    await self._limited(scope, receive, send)
                else:
                    await _unauthorized()(scope, receive, send)
            finally:
                exchange.route = self._route(scope)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, unless too many of its kind are in progress."""
        limit = self._limits.get(scope["path"])
        if limit is None:
            await self.app(scope, receive, send)
        elif limit.is_reached:
            await problem(429, "queue_full", f"{limit.calls} calls are under way")(scope, receive, send)
        else:
            with limit.counting():
                await self.app(scope, receive, send)

    def _is_trusted(self, path: str, sent: bytes | None) -> bool:
        if self._secret is None or (sent is None and path in OPEN):
            return True
        return sent is not None and hmac.compare_digest(sent, self._secret)

    def _route(self, scope: Scope) -> str:
        """The template of the request's path."""
        path: str = scope["path"]
        return str(getattr(scope.get("route"), "path", path if path in self._limits else UNKNOWN))


class CallLimit:
    """Counts the calls in progress; at most `calls` may be."""

    def __init__(self, calls: int) -> None:
        self.calls, self._in_progress = calls, 0

    @property
    def is_reached(self) -> bool:
        """Whether no further call may begin."""
        return self._in_progress >= self.calls

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Goes around a call."""
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1


def _unauthorized() -> Response:
    answer = problem(401, "unauthorized", "this memory service wants its token: Authorization: Bearer …")
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer
