"""The context of a call: request id, deadline and trace, as they travel from the api to the memory service."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

REQUEST_ID = "X-Request-Id"
TIMEOUT = "X-Request-Timeout-Ms"
TIMEOUT_LIMIT_MS = 60_000
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(slots=True)
class Call:
    """The call that a task works for, or the first of several calls that it answers together.

    Attributes:
        request_id: names the call in logs and error messages.
        deadline: `time.monotonic()` at which the caller stops waiting; infinite where it set none.
        timed: whether the caller itself set the deadline.
        traceparent: the W3C header as the caller sent it.
        tracer: the OpenTelemetry tracer that made `span`; None where traces are off.
        span: the OpenTelemetry span that is open.
        linked: spans of the other calls that are answered together with this one.
    """

    request_id: str
    deadline: float = math.inf
    timed: bool = False
    traceparent: str | None = None
    tracer: Any = None
    span: Any = None
    linked: Sequence[Any] = ()

    @classmethod
    def arriving(cls, headers: Mapping[bytes, bytes], deadline: float = math.inf) -> Call:
        """The call that these headers (lower case) describe; `hear_timeout` reads the caller's own deadline."""
        parent = traceparent(headers.get(b"traceparent"))
        return cls(request_id(headers.get(b"x-request-id")), deadline, traceparent=parent)

    def hear_timeout(self, headers: Mapping[bytes, bytes]) -> None:
        """Set the deadline that the headers name, if any. Raises ValueError for a value out of range."""
        wanted_s = timeout_s(headers.get(b"x-request-timeout-ms"))
        if wanted_s is not None:
            self.deadline, self.timed = time.monotonic() + wanted_s, True

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; zero or less once it has passed."""
        return self.deadline - time.monotonic()

    def onward(self) -> dict[str, str]:
        """Headers that pass the context on to another service."""
        headers = {REQUEST_ID: self.request_id}
        if self.deadline < math.inf:
            headers[TIMEOUT] = str(max(1, int(self.left_s * 1000)))
        parent = self.traceparent
        if self.span is not None:
            about = self.span.get_span_context()
            parent = f"00-{about.trace_id:032x}-{about.span_id:016x}-{about.trace_flags:02x}"
        if parent is not None:
            headers["traceparent"] = parent
        return headers


CALL: ContextVar[Call | None] = ContextVar("call", default=None)
"""The call that the current task works for."""


def together(calls: Sequence[Call | None]) -> Call | None:
    """One context for calls that are answered together: the first call's id and trace, the latest deadline."""
    first = calls[0]
    rest = [call for call in calls[1:] if call is not None]
    if first is None or not rest:
        return first
    linked = [call.span for call in rest if call.span is not None]
    return replace(first, deadline=max(first.deadline, *(call.deadline for call in rest)), linked=linked)


def request_id(sent: bytes | None) -> str:
    """The caller's request id if it is valid (1 to 64 letters, digits or `._:-`), otherwise a new random one."""
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent.decode()
    return os.urandom(11).hex()


def timeout_s(sent: bytes | None) -> float | None:
    """The caller's timeout in seconds; None if it sent none. Raises ValueError outside of 1 to 60,000 ms."""
    if sent is None:
        return None
    if not (sent.isdigit() and len(sent) <= 5 and 1 <= int(sent) <= TIMEOUT_LIMIT_MS):
        raise ValueError(f"{TIMEOUT} takes whole milliseconds from 1 to {TIMEOUT_LIMIT_MS}")
    return int(sent) / 1000


def traceparent(sent: bytes | None) -> str | None:
    """The W3C traceparent header as it was sent; None if it is missing or malformed."""
    return sent.decode() if sent is not None and _TRACEPARENT.fullmatch(sent) else None
