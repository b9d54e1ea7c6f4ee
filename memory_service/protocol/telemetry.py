"""What both services say about themselves: the call that is being answered, logs as JSON lines, and traces.

No line above debug level and no span names a user: paths appear as templates, queries and bodies not at all.
"""

from __future__ import annotations

import json
import logging
import logging.config
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from typing import Any, Literal

from model.errors import RamrecError

LogLevel = Literal["debug", "info", "warning", "error"]
REQUEST_ID = "X-Request-Id"
PROCESS = "RAMREC_PROCESS"
"""Environment variable by which `ramrec serve` tells a process what it is called."""
TIMEOUT = "X-Request-Timeout-Ms"
TIMEOUT_LIMIT_MS = 60_000
NO_NATIVE_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}
"""For `FastAPI(telemetry=…)`: what newer versions would export by themselves holds paths, and so user ids."""
LINES_PER_S = 20
"""Access lines about failures; the rest is counted: a flood of refusals must not cost the goodput in logging."""
_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_PREFIX, _COUNT = os.urandom(8).hex(), count(1)


@dataclass(slots=True)
class Call:
    """The call that a task works for, or the first of several that it works for together.

    deadline: of `time.monotonic`; timed: the caller set it. traceparent: as the caller sent it. span: of
    OpenTelemetry, made by `tracer`, where traces are kept; linked: those of the other calls.
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
        """A call as its headers tell of it, but for how long the caller waits: see `hear_timeout`."""
        parent = traceparent(headers.get(b"traceparent"))
        return cls(request_id(headers.get(b"x-request-id")), deadline, traceparent=parent)

    def hear_timeout(self, headers: Mapping[bytes, bytes]) -> None:
        """Set the deadline that the caller names, if any. Raises ValueError where it makes no sense."""
        wanted_s = timeout_s(headers.get(b"x-request-timeout-ms"))
        if wanted_s is not None:
            self.deadline, self.timed = time.monotonic() + wanted_s, True

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; not positive where it has passed."""
        return self.deadline - time.monotonic()

    def onward(self) -> dict[str, str]:
        """Headers that carry the call to another service."""
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


def together(calls: Sequence[Call | None]) -> Call | None:
    """What several calls are worked on as: under the first one's id and trace, until the last one's deadline."""
    first = calls[0]
    rest = [call for call in calls[1:] if call is not None]
    if first is None or not rest:
        return first
    linked = [call.span for call in rest if call.span is not None]
    return replace(first, deadline=max(first.deadline, *(call.deadline for call in rest)), linked=linked)


CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def request_id(sent: bytes | None) -> str:
    """The caller's own id where it is sane (1 to 64 letters, digits, `._:-`), else a new one."""
    if sent is not None and _SANE.fullmatch(sent):
        return sent.decode()
    return f"{_PREFIX}{next(_COUNT):06x}"


def timeout_s(sent: bytes | None) -> float | None:
    """What a caller says it waits, in seconds; None where it does not say. Raises ValueError beyond 1 to 60,000 ms."""
    if sent is None:
        return None
    if not (sent.isdigit() and len(sent) <= 5 and 1 <= int(sent) <= TIMEOUT_LIMIT_MS):
        raise ValueError(f"{TIMEOUT} takes whole milliseconds from 1 to {TIMEOUT_LIMIT_MS}")
    return int(sent) / 1000


def traceparent(sent: bytes | None) -> str | None:
    """A W3C traceparent as it was sent, if it is one."""
    return sent.decode() if sent is not None and _TRACEPARENT.fullmatch(sent) else None


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the process where `ramrec serve` runs several of its
    kind, the request's id, and `fields` of the record.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process = os.environ.get(PROCESS)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._process:
            line["process"] = self._process
        call = CALL.get()
        if call is not None:
            line["request_id"] = call.request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logs(level: LogLevel) -> None:
    """Send all logs of this process to stderr as JSON lines: our own from `level` up, libraries' from warning up."""
    ours, theirs = level.upper(), "ERROR" if level == "error" else "WARNING"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonLines}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": theirs, "handlers": ["stderr"]},
            "loggers": {name: {"level": ours} for name in ("api", "memory_service", "model")},
        }
    )
    logging.captureWarnings(True)


class AccessLog:
    """A line for each answered call: failures and what is `notable` at info, at most LINES_PER_S failures a second; the
    rest at debug.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._second, self._lines, self._left_out = 0, 0, 0

    def note(
        self, method: str, route: str, status: int, begin: float, *, notable: bool, key: str | None = None
    ) -> None:
        """A call that began at `begin` (of `time.perf_counter`) was answered; `key`: name of the caller's API key."""
        if status < 400 and not notable:
            if self._log.isEnabledFor(logging.DEBUG):
                self._write(logging.DEBUG, method, route, status, begin, key)
        elif notable or self._room():
            self._write(logging.INFO, method, route, status, begin, key)
        else:
            self._left_out += 1

    def _room(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= LINES_PER_S

    def _write(self, level: int, method: str, route: str, status: int, begin: float, key: str | None) -> None:
        fields: dict[str, Any] = {"method": method, "route": route, "status": status}
        fields["ms"] = round((time.perf_counter() - begin) * 1000, 3)
        if key is not None:
            fields["key"] = key
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        self._log.log(level, "answered", extra={"fields": fields})


class TracingError(RamrecError):
    """Traces are asked for and cannot be made."""


def tracer_of(service: str) -> Any:
    """What makes the spans of a service, sent to OTEL_EXPORTER_OTLP_ENDPOINT; None, and nothing imported, without it.

    Raises:
        TracingError: the extra `otel` is not installed.
    """
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError("OTEL_EXPORTER_OTLP_ENDPOINT is set: pip install 'ramrec[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("ramrec")


def begin_request(call: Call, tracer: Any, method: str) -> None:
    """Open the span of a request, in the caller's trace where it sent one."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract({"traceparent": call.traceparent} if call.traceparent else {})
    call.tracer = tracer
    call.span = tracer.start_span(method, context=parent, kind=SpanKind.SERVER)


def end_request(call: Call, method: str, route: str, status: int) -> None:
    """Close it."""
    from opentelemetry.trace import StatusCode

    call.span.update_name(f"{method} {route}")
    call.span.set_attributes(
        {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "ramrec.request_id": call.request_id,
        }
    )
    if status >= 500:
        call.span.set_status(StatusCode.ERROR)
    call.span.end()


@contextmanager
def span(name: str, *, remote: bool = False) -> Iterator[None]:
    """A part of the present call as a span of its own, where traces are kept; `remote`: another service does it."""
    call = CALL.get()
    if call is None or call.span is None:
        yield
        return
    from opentelemetry.trace import Link, SpanKind, StatusCode, set_span_in_context

    part = call.tracer.start_span(
        name,
        context=set_span_in_context(call.span),
        kind=SpanKind.CLIENT if remote else SpanKind.INTERNAL,
        links=[Link(other.get_span_context()) for other in call.linked],
    )
    token = CALL.set(replace(call, span=part, linked=()))
    try:
        yield
    except Exception as error:  # its text may name a user, its type does not
        part.set_status(StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        CALL.reset(token)
        part.end()
