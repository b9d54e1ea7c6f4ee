"""What every request passes through before it reaches a route."""

from __future__ import annotations

import math
import time

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access.keys import Key, KeyRing
from api.access.scopes import admit
from api.http.policy import Policy, RouteTable, policy_of
from api.http.problems import ApiProblem, BodyTooLarge, InvalidRequest, refusal
from api.http.services import Services
from memory_service.protocol.call.context import REQUEST_ID
from memory_service.protocol.call.envelope import UNKNOWN, Envelope, Exchange

BODY_LIMIT_BYTES = 4 * 2**20
BODY_LIMIT = f"a body must have at most {BODY_LIMIT_BYTES} bytes"
REQUEST_ID_HEADER = REQUEST_ID.lower().encode()
CLOSE = (b"connection", b"close")


class RequestMiddleware:
    """ASGI middleware, the outermost: gives a request its id and deadline, checks its API key, records its response.

    `ring`: the API keys; None: nobody needs one. `timeout_s`: deadline of requests whose caller names none.
    """

    def __init__(
        self, app: ASGIApp, envelope: Envelope, routes: RouteTable, ring: KeyRing | None, timeout_s: float
    ) -> None:
        self.app, self._envelope, self._routes = app, envelope, routes
        self._ring, self._timeout_s = ring, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        services: Services = scope["state"]["services"]
        route, policy = self._routes.find(scope["method"], scope["path"])
        deadline = time.monotonic() + self._timeout_s if policy.has_deadline else math.inf
        with self._envelope.open(scope, deadline) as exchange:
            request_id = (REQUEST_ID_HEADER, exchange.call.request_id.encode())
            send = exchange.recorded(send, lambda: [request_id, CLOSE] if services.stopping.is_set() else [request_id])
            try:
                _set_deadline(exchange)
                await self._admit(exchange, policy, services)
                await self.app(scope, receive, send)
            except ApiProblem as error:  # of deadline or key: errors of the application are answered within it
                await refusal(error)(scope, receive, send)
            finally:
                _describe(exchange, scope, route, policy)

    async def _admit(self, exchange: Exchange, policy: Policy, services: Services) -> None:
        """Check the caller's API key, and take a request from its rate limit."""
        if self._ring is None or policy.scope is None:
            return
        key: Key = admit(self._ring, policy.scope, exchange.headers)
        exchange.key = key.name
        if key.per_second is not None and not services.limits.take(key):
            await services.limits.more(key)


def _set_deadline(exchange: Exchange) -> None:
    try:
        exchange.call.hear_timeout(exchange.headers)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _describe(exchange: Exchange, scope: Scope, route: str, policy: Policy) -> None:
    """Say which route a request was for, and how it is logged; a route that is not in the table is that which ran."""
    ran = scope.get("route") if route == UNKNOWN else None
    about = policy if ran is None else policy_of(getattr(ran, "endpoint", None))
    exchange.route = getattr(ran, "path", route)
    exchange.is_notable = policy.scope == "admin" and not about.is_polled
    exchange.is_logged = not (about.is_polled and about.scope is None)


class BodyLimitMiddleware:
    """ASGI middleware: refuses a body that is too large while it arrives, whatever its Content-Length says."""

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
                raise BodyTooLarge(BODY_LIMIT)
            return message

        async def answered(message: Message) -> None:
            nonlocal refused
            if received <= BODY_LIMIT_BYTES:
                await send(message)
            elif not refused:  # whatever error the cut-off body led to, the caller is told of its size
                refused = True
                await _too_large()(scope, receive, send)

        await self.app(scope, limited, answered)


def _declared_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


def _too_large() -> Response:
    return refusal(BodyTooLarge(BODY_LIMIT))
