"""What every call of the memory service passes through: who may ask, how many at once, counted, timed and logged."""

from __future__ import annotations

import hmac
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memory_service.http.metrics import Metrics
from memory_service.protocol.structs import CONTENT_TYPE, Problem
from memory_service.protocol.telemetry import CALL, AccessLog, Call, begin_request, end_request
from memory_service.settings import MemorySettings

RETRY_AFTER_S = 1
OPEN = frozenset({"/health/live", "/health/ready", "/openapi.json"})
"""Paths that need no token: what orchestration asks, and the document. They refuse a wrong one all the same."""
PROBES = OPEN | {"/metrics"}
"""Paths whose answers are not worth a line in the log."""


class Doorkeeper:
    """ASGI middleware: lets in who brings the token, and turns calls away where too many are under way."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: MemorySettings, tracer: Any) -> None:
        self.app, self.metrics, self._tracer = app, metrics, tracer
        self._log = AccessLog(logging.getLogger("memory_service.access"))
        token = settings.token
        self._secret = None if token is None else b"Bearer " + token.get_secret_value().encode()
        ingest = Queue(settings.queue_ingest)
        self._queues = {f"/v1/{name}": ingest for name in ("plan", "write", "rekey")}
        self._queues["/v1/retrieve"] = Queue(settings.queue_retrieve)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, or answer 401 or 429."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500
        headers = dict(scope["headers"])
        call = Call.arriving(headers)
        with suppress(ValueError):  # a deadline that makes no sense is none
            call.hear_timeout(headers)
        CALL.set(call)
        if self._tracer is not None:
            begin_request(call, self._tracer, scope["method"])

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._pass(scope, headers.get(b"authorization"), receive, noted)
        finally:
            path = self._label(scope)
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)
            self.metrics.requests.labels(path, status).inc()
            if call.span is not None:
                end_request(call, scope["method"], path, status)
            if path not in PROBES:
                self._log.note(scope["method"], path, status, begin, notable=scope["method"] == "DELETE")

    async def _pass(self, scope: Scope, sent: bytes | None, receive: Receive, send: Send) -> None:
        if not self._trusted(scope["path"], sent):
            answer = problem(401, "unauthorized", "this memory service wants its token: Authorization: Bearer …")
            answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, send)
            return
        queue = self._queues.get(scope["path"], EVERYBODY)
        if queue.under_way >= queue.limit:
            await problem(429, "queue_full", f"{queue.limit} calls are under way")(scope, receive, send)
            return
        queue.under_way += 1
        try:
            await self.app(scope, receive, send)
        finally:
            queue.under_way -= 1

    def _label(self, scope: Scope) -> str:
        path: str = scope["path"]
        return str(getattr(scope.get("route"), "path", path if path in self._queues else "unknown"))

    def _trusted(self, path: str, sent: bytes | None) -> bool:
        if self._secret is None or (sent is None and path in OPEN):
            return True
        return sent is not None and hmac.compare_digest(sent, self._secret)


@dataclass
class Queue:
    """Calls of a kind that are under way, and how many may be."""

    limit: float
    under_way: int = 0


EVERYBODY = Queue(math.inf)


def problem(status: int, code: str, detail: str) -> Response:
    """An error as an answer."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    content = msgspec.msgpack.encode(Problem(code, detail))
    return Response(content, status, headers, media_type=CONTENT_TYPE)
