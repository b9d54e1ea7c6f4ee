"""What every request passes through before a route sees it."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import BodyTooLarge, problem

BODY_LIMIT_BYTES = 4 * 2**20
LIMIT = f"a body has at most {BODY_LIMIT_BYTES} bytes"


class CountRequests:
    """Counts answers by route and status, those that fail unforeseen included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            path = getattr(scope.get("route"), "path", "unknown")
            scope["app"].state.metrics.requests.labels(path, status).inc()


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
    return problem(413, BodyTooLarge.code, BodyTooLarge.title, LIMIT)
