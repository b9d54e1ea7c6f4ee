"""Calls that come thousands of times a second, answered ahead of FastAPI's routing.

FastAPI describes these routes (OpenAPI, errors) like any other. When one is called, the body goes straight to
pydantic's JSON parser and the answer straight to the connection: half of what the whole way through FastAPI costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True)
class Call:
    """A POST route whose endpoint takes (body, request) and answers with plain data or a pydantic model."""

    route: APIRoute
    parse: Callable[[bytes], Any]

    @classmethod
    def of(cls, route: APIRoute) -> Call:
        """What FastAPI knows of the route."""
        assert route.body_field is not None
        kind: Any = route.body_field.field_info.annotation
        return cls(route, TypeAdapter(kind).validator.validate_json)


class DirectCalls:
    """ASGI middleware, the innermost: answers the routes of one router, and passes everything else on."""

    def __init__(self, app: ASGIApp, router: APIRouter) -> None:
        self.app = app
        self._calls = {route.path: Call.of(route) for route in router.routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        call = self._calls.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if call is None:
            return await self.app(scope, receive, send)
        scope["route"] = call.route
        request = Request(scope, receive, send)
        try:
            body = _parsed(call, await _content(receive), scope)
            answer = _encoded(await call.route.endpoint(body, request))
        except Exception as error:
            handle = _handler(scope, error)
            if handle is None:
                raise
            response = await handle(request, error)
            await response(scope, receive, send)
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})


async def _content(receive: Receive) -> bytes:
    message = await receive()
    content: bytes = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        content += message.get("body", b"")
    return content


def _parsed(call: Call, content: bytes, scope: Scope) -> Any:
    if not content:
        raise _invalid("missing", "a body is required")
    if not _is_json(scope["headers"]):
        raise _invalid("content_type", "the body is sent as application/json")
    try:
        return call.parse(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in found]) from error
    except UnicodeDecodeError as error:
        raise _invalid("json_invalid", "not valid UTF-8") from error


def _is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name == b"content-type":
            return value == b"application/json" or _names_json(value.decode("latin-1"))
    return False


def _names_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _invalid(kind: str, why: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": why, "ctx": {"error": why}}])


def _encoded(answer: Any) -> bytes:
    return answer.model_dump_json().encode() if isinstance(answer, BaseModel) else msgspec.json.encode(answer)


def _handler(scope: Scope, error: Exception) -> Any:
    """The application's handler for an expected error; what is unexpected is the server's to answer."""
    handlers = scope["app"].exception_handlers
    kinds = (kind for kind in type(error).__mro__ if kind is not Exception and kind in handlers)
    return next((handlers[kind] for kind in kinds), None)
