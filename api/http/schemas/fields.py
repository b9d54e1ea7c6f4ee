"""Types of fields that several bodies share: ids, metadata, timestamps; and the base class of request bodies."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema

from memory_service.protocol.bounds import ID_LIMIT_BYTES, TIME_LIMIT_S

METADATA_LIMIT_BYTES = 65536
METADATA_DEPTH = 16
FUTURE_S = 86400.0
"""How far a timestamp may be ahead of this machine's clock."""


def _identifier(value: str) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError("an id must be valid Unicode") from error
    if not 1 <= size <= ID_LIMIT_BYTES:
        raise ValueError(f"an id must have 1 to {ID_LIMIT_BYTES} bytes, this one has {size}")
    if "\0" in value:
        raise ValueError("an id must not contain NUL")
    return value


def checked_metadata(value: dict[str, Any]) -> dict[str, Any]:
    """Return metadata that msgpack and Redis can carry; raise ValueError for any other."""
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        msgspec.msgpack.encode(value)
    except (OverflowError, RecursionError, ValueError) as error:
        raise ValueError("metadata must be valid Unicode, with finite numbers of at most 64 bits") from error
    if size > METADATA_LIMIT_BYTES or _depth(value) > METADATA_DEPTH:
        raise ValueError(f"metadata must have at most {METADATA_LIMIT_BYTES} bytes and {METADATA_DEPTH} levels")
    return value


def _depth(value: Any) -> int:
    """Levels of nested objects and lists."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def refused_time(seconds: float, now: float) -> tuple[str, str] | None:
    """A stable code and a message for a timestamp that is refused at the time `now`; None for a valid one."""
    if seconds < 0:
        return "timestamp_negative", f"{seconds} is before 1970"
    if seconds >= TIME_LIMIT_S:
        return "timestamp_in_milliseconds", f"{seconds} is not a time in seconds"
    if seconds > now + FUTURE_S:
        return "timestamp_in_future", f"{seconds} is more than a day ahead"
    return None


def _timestamp(value: float) -> float:
    refusal = refused_time(value, time.time())
    if refusal is not None:
        raise ValueError(refusal[1])
    return value


ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": ID_LIMIT_BYTES, "pattern": r"^[^\x00]*$"}
Identifier = Annotated[str, AfterValidator(_identifier), WithJsonSchema(ID_SCHEMA)]
Metadata = Annotated[dict[str, Any], AfterValidator(checked_metadata)]
Timestamp = Annotated[
    float,
    AfterValidator(_timestamp),
    WithJsonSchema({"type": "number", "minimum": 0, "exclusiveMaximum": TIME_LIMIT_S}),
]
"""Seconds since 1970, UTC."""
Scope = Literal["own", "collective"]
"""Whose memories: the user's own, or those of all other users."""


class RequestBody(BaseModel):
    """Base of request bodies: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
