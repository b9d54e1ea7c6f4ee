"""Hooks that let schemathesis speak msgpack with the memory service (`SCHEMATHESIS_HOOKS=tests.msgpack_cases`)."""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from typing import Any

import msgspec
import schemathesis
from schemathesis.transport.serialization import Binary

from memory_service.http.operations import OPERATIONS
from memory_service.protocol.structs import CONTENT_TYPE, RetrieveRequest

BODIES = {call.path: type(call.body) for call in OPERATIONS if call.body is not None}
COLUMNS = set(RetrieveRequest.__struct_fields__) - {"model_version", "users"}
NEVER_USED = b"\xc1"
"""A byte that never occurs in msgpack."""


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Puts the serving model into requests, since others are refused at once. Leaves out the columns for odd numbers of
    users, since random columns hardly ever fit.
    """
    body = case.body
    for named in (body, case.query):
        if isinstance(named, dict) and isinstance(named.get("version"), str):
            named["version"] = os.environ["RAMREC_TEST_MODEL"]
    if not isinstance(body, dict) or not isinstance(body.get("model_version"), str):
        return
    body["model_version"] = os.environ["RAMREC_TEST_MODEL"]
    if case.path == "/v1/retrieve" and isinstance(body.get("users"), list) and len(body["users"]) % 2:
        for name in COLUMNS.intersection(body):
            del body[name]


@schemathesis.serializer(CONTENT_TYPE)
def packed(context: schemathesis.SerializationContext, value: Any) -> bytes:
    """Encodes a body of the right shape as its struct, and any other as it is."""
    plain = _as_sent(value)
    with suppress(msgspec.ValidationError):
        plain = msgspec.convert(plain, BODIES.get(context.case.path, Any), str_keys=True)
    try:
        return msgspec.msgpack.encode(plain)
    except (OverflowError, UnicodeEncodeError):
        return NEVER_USED


@schemathesis.deserializer(CONTENT_TYPE)
def unpacked(context: schemathesis.DeserializationContext, response: schemathesis.Response) -> Any:
    """Decodes a response into the JSON that the OpenAPI document describes."""
    return _as_json(msgspec.msgpack.decode(response.content))


def _as_sent(value: Any) -> Any:
    if isinstance(value, Binary):
        return value.data
    if isinstance(value, dict):
        return {key: _as_sent(inner) for key, inner in value.items()}
    return [_as_sent(inner) for inner in value] if isinstance(value, list) else value


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list) else value
