"""What every request passes through before a route sees it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access.keys import Key, KeyRing
from api.access.scopes import admit, needed
from api.http.metrics import Metrics
from api.http.problems import ApiProblem, BodyTooLarge, InvalidRequest, refusal
from memory_service.protocol.telemetry import CALL, REQUEST_ID, AccessLog, Call, begin_request, end_request

BODY_LIMIT_BYTES = 4 * 2**20
LIMIT = f"a body has at most {BODY_LIMIT_BYTES} bytes"
QUIET = frozenset({"/metrics"})
"""Admin calls that come all the time."""
UNHURRIED = frozenset({"/model/reload"})
"""Calls that take what they take, unless their caller says otherwise."""
PROBES = frozenset({"/health/live", "/health/ready"})
LEAVING = ((b"connection", b"close"),)
"""What answers say once the service is about to stop."""


class Gate:
    """The outermost: gives each request its id and deadline, lets in whose key may do this, counts and logs the
    answers, those that fail unforeseen included. Without `ring` everybody is let in.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, ring: KeyRing | None, timeout_s: float, tracer: Any) -> None:
        self.app, self._metrics, self._ring = app, metrics, ring
        self._timeout_s, self._tracer = timeout_s, tracer
        self._log = AccessLog(logging.getLogger("api.access"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.perf_counter(), 500
        key: Key | None = None
        headers = dict(scope["headers"])
        template, wanted = needed(scope["method"], scope["path"])
        call = Call.arriving(headers, self._deadline(template))
        CALL.set(call)
        if self._tracer is not None:
            begin_request(call, self._tracer, scope["method"])

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (REQUEST_ID.lower().encode(), call.request_id.encode())
                leaving = LEAVING if scope["app"].state.leaving else ()
                message = {**message, "headers": [*message.get("headers", ()), own, *leaving]}
            await send(message)

        try:
            _hear_timeout(call, headers)
            if self._ring is not None and wanted is not None:
                key = admit(self._ring, wanted, headers)
                if key.per_second is not None and not scope["app"].state.limits.take(key):
                    await scope["app"].state.limits.more(key)
            await self.app(scope, receive, noting)
        except ApiProblem as error:  # of deadline and key: the application answers its own
            await refusal(error)(scope, receive, noting)
        finally:
            if template == "unknown":
                template = getattr(scope.get("route"), "path", template)
            self._metrics.requests.labels(template, status).inc()
            self._metrics.request_seconds.labels(template).observe(time.perf_counter() - begin)
            if call.span is not None:
                end_request(call, scope["method"], template, status)
            if template not in PROBES:
                notable = wanted == "admin" and template not in QUIET
                self._log.note(scope["method"], template, status, begin, notable=notable, key=key.name if key else None)

    def _deadline(self, template: str) -> float:
        return math.inf if template in UNHURRIED else time.monotonic() + self._timeout_s


def _hear_timeout(call: Call, headers: Mapping[bytes, bytes]) -> None:
    try:
        call.hear_timeout(headers)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


class BodyLimit:
    """Refuses bodies beyond the limit while they arrive, whatever their Content-Length says."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and _declared_bytes(scope) > BODY_LIMIT_BYTES:
            await _too_large()(scope, receive, send)
            return
        received, refused = 0, False

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY_LIMIT_BYTES:
                raise BodyTooLarge(LIMIT)
            return message

        async def answered(message: Message) -> None:
            nonlocal refused
            if received <= BODY_LIMIT_BYTES:
                await send(message)
            elif not refused:  # whatever was made of the broken-off body, this is the reason
                refused = True
                await _too_large()(scope, receive, send)

        await self.app(scope, limited, answered)


def _declared_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


def _too_large() -> Response:
    return refusal(BodyTooLarge(LIMIT))
