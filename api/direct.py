"""A route for calls that come thousands of times a second."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError


class DirectRoute(APIRoute):
    """A route whose endpoint takes (body, request) and answers with plain data. FastAPI describes it; the body goes
    straight to pydantic's JSON parser and the answer straight to msgspec, without FastAPI's dependencies and copies.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What Starlette calls with each request."""
        assert self.body_field is not None
        kind: Any = self.body_field.field_info.annotation
        parse = TypeAdapter(kind).validator.validate_json
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            content = await request.body()
            if not content:
                raise _invalid("missing", "a body is required")
            if not _is_json(request.headers.get("content-type", "")):
                raise _invalid("content_type", "the body is sent as application/json")
            try:
                body = parse(content)
            except ValidationError as error:
                raise RequestValidationError(
                    [one | {"loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
                ) from error
            except UnicodeDecodeError as error:
                raise _invalid("json_invalid", "not valid UTF-8") from error
            return Response(msgspec.json.encode(await endpoint(body, request)), media_type="application/json")

        return handle


def _is_json(content_type: str) -> bool:
    if content_type == "application/json":
        return True
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _invalid(kind: str, why: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": why, "ctx": {"error": why}}])
