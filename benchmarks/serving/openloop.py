"""Open-loop load: requests leave when they are due, whatever the answers take, as those of many independent callers do.

    python -m benchmarks.serving.openloop --url http://127.0.0.1:8000/recommend --bodies FILE --rate 1000 --seconds 10

Times count from when a request was due, so that a server that stalls cannot hide it (no coordinated omission). A
request takes an idle connection or, where all are busy, a new one. FILE has a JSON body a line, of which random ones
are sent. Prints a report as JSON. wrk only knows closed loops, and timers of an event loop are a millisecond coarse,
which is a third of what is to be measured: hence sockets, epoll and a timer of the kernel. A request costs it 40 to 100
µs of CPU (`cpu_s` in the report), two to five times what it costs wrk.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import re
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

CONNECTIONS = 4096
"""Open at once; beyond that requests wait here, and their time counts."""
PATIENCE_S = 10.0
"""How long answers are waited for after the last request."""
CLOCK_MONOTONIC, TFD_NONBLOCK = 1, os.O_NONBLOCK
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass
class Connection:
    """A socket, the request on it (due: when it should have left; None: idle) and the bytes of its answer so far."""

    socket: socket.socket
    due: float | None = None
    unsent: bytes = b""
    answer: bytes = b""


@dataclass
class Load:
    """What came of a load; times in seconds since the request was due."""

    seconds: float
    sent: int = 0
    times: dict[int, list[float]] = field(default_factory=dict)
    in_window: dict[int, int] = field(default_factory=dict)
    retry_after: dict[int, int] = field(default_factory=dict)
    late: list[float] = field(default_factory=list)
    broken: int = 0
    unanswered: int = 0
    connections: int = 0
    cpu_s: float = 0.0

    def report(self) -> dict[str, Any]:
        """As JSON: by status how many (in all, and while requests were still being sent) and how fast."""
        late = np.percentile(self.late, 99) * 1e3 if self.late else 0.0
        plain = ("seconds", "sent", "broken", "unanswered", "connections", "cpu_s")
        return {
            **{name: getattr(self, name) for name in plain},
            "sent_late_p99_ms": float(late),
            "answers": {str(status): self._about(status) for status in sorted(self.times)},
        }

    def _about(self, status: int) -> dict[str, float]:
        p50, p99, most = (float(one) * 1e3 for one in np.percentile(self.times[status], (50, 99, 100)))
        return {
            "count": len(self.times[status]),
            "a_second": self.in_window.get(status, 0) / self.seconds,
            "with_retry_after": self.retry_after.get(status, 0),
            "p50_ms": p50,
            "p99_ms": p99,
            "max_ms": most,
        }


class OpenLoop:
    """One load, from one thread. `requests` are whole HTTP requests, sent in turn."""

    def __init__(self, address: tuple[str, int], requests: list[bytes], rate: float, seconds: float) -> None:
        self._address, self._requests = address, requests
        self._rate, self._total = rate, int(rate * seconds)
        self._load = Load(seconds)
        self._epoll = select.epoll()
        self._open: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._waiting: deque[float] = deque()
        self._begin = self._end = 0.0

    def run(self) -> Load:
        """Send everything, wait for the answers."""
        timer = kernel_timer(1 / self._rate)
        self._epoll.register(timer, select.EPOLLIN)
        cpu, self._begin = time.process_time(), time.perf_counter()
        self._end = self._begin + self._load.seconds
        while self._load.sent < self._total or self._busy():
            now = time.perf_counter()
            if now > self._end + PATIENCE_S:
                break
            for number, event in self._epoll.poll(1.0):
                if number == timer:
                    os.read(timer, 8)
                    self._send_due()
                else:
                    self._serve(self._open[number], event)
        self._load.unanswered, self._load.cpu_s = self._busy(), time.process_time() - cpu
        os.close(timer)
        for one in list(self._open.values()):
            self._close(one)
        self._epoll.close()
        return self._load

    def _busy(self) -> int:
        return len(self._open) - len(self._idle) + len(self._waiting)

    def _send_due(self) -> None:
        due = min(self._total, int((time.perf_counter() - self._begin) * self._rate) + 1)
        while self._load.sent < due:
            self._send(self._begin + self._load.sent / self._rate)
            self._load.sent += 1

    def _send(self, due: float) -> None:
        if not self._idle and len(self._open) >= CONNECTIONS:
            self._waiting.append(due)
            return
        one = self._idle.pop() if self._idle else self._connect()
        one.due, one.unsent = due, self._requests[self._load.sent % len(self._requests)]
        self._load.late.append(time.perf_counter() - due)
        self._flush(one)

    def _connect(self) -> Connection:
        one = Connection(socket.socket())
        one.socket.setblocking(False)
        one.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.socket.connect_ex(self._address)
        self._open[one.socket.fileno()] = one
        self._epoll.register(one.socket, select.EPOLLIN)
        self._load.connections = max(self._load.connections, len(self._open))
        return one

    def _flush(self, one: Connection) -> None:
        """Send what can be sent; the rest when the socket takes it."""
        try:
            one.unsent = one.unsent[one.socket.send(one.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._break(one)
            return
        if one.unsent:
            self._epoll.modify(one.socket, select.EPOLLIN | select.EPOLLOUT)

    def _serve(self, one: Connection, event: int) -> None:
        if event & select.EPOLLOUT and one.unsent:
            self._epoll.modify(one.socket, select.EPOLLIN)
            self._flush(one)
        elif event & ~select.EPOLLOUT:
            self._receive(one)

    def _receive(self, one: Connection) -> None:
        try:
            data = one.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._break(one)
            return
        one.answer += data
        head = one.answer.find(b"\r\n\r\n")
        length = LENGTH.search(one.answer, 0, head) if head > 0 else None
        if length and len(one.answer) >= head + 4 + int(length[1]):
            self._finish(one, one.answer[:head].lower())

    def _finish(self, one: Connection, head: bytes) -> None:
        assert one.due is not None
        now, status, load = time.perf_counter(), int(head[9:12]), self._load
        load.times.setdefault(status, []).append(now - one.due)
        if now <= self._end:
            load.in_window[status] = load.in_window.get(status, 0) + 1
        if b"\nretry-after:" in head:
            load.retry_after[status] = load.retry_after.get(status, 0) + 1
        one.due, one.answer = None, b""
        if b"\nconnection: close" in head:
            self._close(one)
        else:
            self._idle.append(one)
        if self._waiting:
            self._send(self._waiting.popleft())

    def _break(self, one: Connection) -> None:
        """The server hung up: fine between two requests."""
        if one.due is None:
            self._idle.remove(one)
        else:
            self._load.broken += 1
        self._close(one)

    def _close(self, one: Connection) -> None:
        del self._open[one.socket.fileno()]
        self._epoll.unregister(one.socket)
        one.socket.close()


def kernel_timer(interval_s: float) -> int:
    """A file that becomes readable every `interval_s`, to the microsecond (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
    seconds, rest = divmod(interval_s, 1)
    times = (ctypes.c_long * 4)(int(seconds), int(rest * 1e9), 0, 1)  # interval, then the first time: at once
    if number < 0 or libc.timerfd_settime(number, 0, times, None):
        raise OSError(ctypes.get_errno(), "no timer")
    return int(number)


def http_requests(host: str, path: str, bodies: list[bytes]) -> list[bytes]:
    """POST requests of JSON bodies."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: ".encode()
    return [head + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--bodies", type=Path, required=True)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, required=True)
    asked = parser.parse_args()
    where = urlsplit(asked.url)
    requests = http_requests(where.netloc, where.path, asked.bodies.read_bytes().splitlines())
    random.Random(0).shuffle(requests)
    gc.disable()
    load = OpenLoop((where.hostname or "", where.port or 80), requests, asked.rate, asked.seconds).run()
    print(json.dumps(load.report()))


if __name__ == "__main__":
    main()
