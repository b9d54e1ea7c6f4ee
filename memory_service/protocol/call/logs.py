"""Logs of both services: JSON lines on stderr.

No line above debug level names a user: paths appear as templates, queries and bodies not at all.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from memory_service.protocol.call.context import CALL

LogLevel = Literal["debug", "info", "warning", "error"]
PROCESS = "RAMREC_PROCESS"
"""Environment variable in which `ramrec serve` gives a process its name."""
LINES_PER_S = 20
"""Access lines about failures that are written per second; further ones are only counted, to keep a flood cheap."""


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object per line.

    Its fields: time (UTC), level, logger, message, process (where `ramrec serve` runs several of a kind), request_id,
    and whatever the record holds in `fields`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process = os.environ.get(PROCESS)

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line break."""
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
    """Send all logs of this process to stderr: its own from `level` up, those of libraries from warning up."""
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
    """Writes a line for each answered call: failures (at most LINES_PER_S per second) and notable calls at info level,
    all others at debug level.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._second, self._lines, self._left_out = 0, 0, 0

    def note(
        self, method: str, route: str, status: int, begin: float, *, notable: bool, key: str | None = None
    ) -> None:
        """Log an answered call that began at `begin` (of `time.perf_counter`); `key` names the caller's API key."""
        if status < 400 and not notable:
            if self._log.isEnabledFor(logging.DEBUG):
                self._write(logging.DEBUG, method, route, status, begin, key)
        elif notable or self._has_room():
            self._write(logging.INFO, method, route, status, begin, key)
        else:
            self._left_out += 1

    def _has_room(self) -> bool:
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
