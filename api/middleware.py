"""What every request passes through before a route sees it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import BodyTooLarge, problem

BODY_LIMIT_BYTES = 4 * 2**20


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
        refusal = problem(413, BodyTooLarge.code, BodyTooLarge.title, f"a body has at most {BODY_LIMIT_BYTES} bytes")
        declared = dict(scope.get("headers") or []).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > BODY_LIMIT_BYTES:
            await refusal(scope, receive, send)
            return
        received, refused = 0, False

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY_LIMIT_BYTES:
                raise BodyTooLarge(f"a body has at most {BODY_LIMIT_BYTES} bytes")
            return message

        async def answered(message: Message) -> None:
            nonlocal refused
            if received <= BODY_LIMIT_BYTES:
                await send(message)
            elif not refused:  # whatever was made of the broken-off body, this is the reason
                refused = True
                await refusal(scope, receive, send)

        await self.app(scope, limited, answered)
