"""What both services say about themselves: the call that is being answered, and logs as JSON lines.

No line above debug level names a user: paths are logged as templates, queries and bodies not at all.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any, Literal

LogLevel = Literal["debug", "info", "warning", "error"]
REQUEST_ID = "X-Request-Id"
NO_NATIVE_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}
"""For `FastAPI(telemetry=…)`: what newer versions would export by themselves holds paths, and so user ids."""
LINES_PER_S = 20
"""Access lines about failures; the rest is counted: a flood of refusals must not cost the goodput in logging."""
_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_PREFIX, _COUNT = os.urandom(8).hex(), count(1)


@dataclass(slots=True)
class Call:
    """The call that a task works for."""

    request_id: str


CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def request_id(sent: bytes | None) -> str:
    """The caller's own id where it is sane (1 to 64 letters, digits, `._:-`), else a new one."""
    if sent is not None and _SANE.fullmatch(sent):
        return sent.decode()
    return f"{_PREFIX}{next(_COUNT):06x}"


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the request's id, and `fields` of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
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
