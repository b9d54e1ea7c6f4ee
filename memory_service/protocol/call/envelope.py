"""What both services do for every HTTP request: its context, a count, its duration, a span and an access line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from prometheus_client import Counter, Histogram
from starlette.types import Message, Scope, Send

from memory_service.protocol.call.context import CALL, Call
from memory_service.protocol.call.logs import AccessLog
from memory_service.protocol.call.tracing import begin_request, end_request

Headers = Iterable[tuple[bytes, bytes]]
UNKNOWN = "unknown"
"""The route of a request that no route matches, in metrics, spans and logs."""


@dataclass(frozen=True)
class Envelope:
    """Where a service records its requests.

    requests: counter with the labels route and status. seconds: histogram with the label route. log: the access log.
    tracer: makes the spans; None: there are none.
    """

    requests: Counter
    seconds: Histogram
    log: AccessLog
    tracer: Any = None

    def open(self, scope: Scope, deadline: float = math.inf) -> Exchange:
        """A request to this service, to be answered until `deadline` (of `time.monotonic`)."""
        return Exchange(self, scope, deadline)


class Exchange:
    """A request and its response, in a `with` statement: entering it makes its call the current one, leaving it records
    what became of it.

    Attributes:
        headers: of the request, by lower-case name.
        call: the context of the request.
        route: template of its path; set it once it is known.
        status: of the response; 500 as long as none was sent.
        is_logged, is_notable: whether it may appear in the access log, and whether it always does, at info level.
        key: name of the caller's API key.
    """

    def __init__(self, envelope: Envelope, scope: Scope, deadline: float) -> None:
        self._envelope, self._begin = envelope, time.perf_counter()
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.call = Call.arriving(self.headers, deadline)
        self.route, self.status = UNKNOWN, 500
        self.is_logged, self.is_notable = True, False
        self.key: str | None = None

    def __enter__(self) -> Self:
        CALL.set(self.call)
        if self._envelope.tracer is not None:
            begin_request(self.call, self._envelope.tracer, self.method)
        return self

    def __exit__(self, *_: object) -> None:
        envelope = self._envelope
        envelope.requests.labels(self.route, self.status).inc()
        envelope.seconds.labels(self.route).observe(time.perf_counter() - self._begin)
        if self.call.span is not None:
            end_request(self.call, self.method, self.route, self.status)
        if self.is_logged:
            envelope.log.note(self.method, self.route, self.status, self._begin, notable=self.is_notable, key=self.key)

    def recorded(self, send: Send, headers: Callable[[], Headers] = lambda: ()) -> Send:
        """A `send` for the response that notes its status, and adds headers that are made when the response starts."""

        async def recording(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *headers()]}
            await send(message)

        return recording
