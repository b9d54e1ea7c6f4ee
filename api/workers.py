"""Api workers: the processes that `ramrec serve` runs behind one port, and what they share, the port and their metrics.

Each worker listens with SO_REUSEPORT, so that the kernel spreads connections evenly. (With one inherited socket, the
worker that wakes first takes all waiting connections: 63 of 64 that were opened at once.) If a worker dies, the kernel
drops its listener, so no client waits for it. Each worker also listens on a Unix socket, where it can be asked alone.

For `/metrics`, each worker writes its metrics to a file every KEEP_S seconds and before it answers. The worker that is
asked adds up all files. So counters never go back, whichever worker answers, even after kill -9: a worker that replaces
a dead one continues from its file.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Metric

from model.errors import RamrecError

KEEP_S = 1.0
"""Seconds between two writes of a worker's metrics: how old the figures of other workers may be."""
FIGURES = ".figures"
COUNTED = ("counter", "histogram")
"""Types of metrics that a new worker continues."""
RATES = {
    "ramrec_api_click_through": ("ramrec_api_clicks", "ramrec_api_recommendations"),
    "ramrec_api_hit_rate": ("ramrec_api_hits", "ramrec_api_recommendations"),
}
"""Gauges that are the quotient of two counters."""
Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""(name of a sample, its labels) → value."""
ELSEWHERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of binding to an address that this machine does not have."""
log = logging.getLogger(__name__)


class ListenError(RamrecError):
    """A worker cannot listen; the message says where and why."""


class MetricFamily(msgspec.Struct):
    """A metric: its name, help text, type, and samples (name, labels, value)."""

    name: str
    about: str
    type: str
    samples: list[tuple[str, dict[str, str], float]]


class Worker:
    """One api process among others. Its files are `place`.*, in the folder that all workers share."""

    def __init__(self, place: Path) -> None:
        self._folder, self._parent = place.parent, os.getppid()
        self._socket, self._figures = socket_of(place), place.with_name(place.name + FIGURES)
        self._unwritten = False
        self._before = [one for one in _read_figures(self._figures) if one.type in COUNTED]

    def listen(self, host: str, port: int) -> list[socket.socket]:
        """Sockets to serve on: those of the shared port, then the worker's own. Raises ListenError."""
        with ExitStack() as stack:
            own = stack.enter_context(socket.socket(socket.AF_UNIX))
            try:
                self._socket.unlink(missing_ok=True)
                own.bind(str(self._socket))
                shared = bound(host, port)
            except OSError as error:
                raise ListenError(f"cannot listen on {host}:{port} and {self._socket}: {error}") from error
            stack.pop_all()
        return [*shared, own]

    def keep(self, registry: CollectorRegistry) -> list[MetricFamily]:
        """Write the metrics of this worker, which include those of the workers that it replaced; returns them."""
        figures = added_up([families(registry.collect()), self._before])
        draft = self._figures.with_suffix(".draft")
        try:
            draft.write_bytes(msgspec.msgpack.encode(figures))
            draft.replace(self._figures)
        except OSError as error:
            if not self._unwritten:
                log.error("cannot write metrics for the other workers: %s", error)
            self._unwritten = True
        else:
            self._unwritten = False
        return figures

    def collect(self, registry: CollectorRegistry) -> Iterator[Metric]:
        """The metrics of all workers together."""
        others = [path for path in self._folder.glob("*" + FIGURES) if path != self._figures]
        for one in added_up([self.keep(registry), *map(_read_figures, others)]):
            metric = Metric(one.name, one.about, one.type)
            for name, labels, value in one.samples:
                metric.add_sample(name, labels, value)
            yield metric

    def end(self, registry: CollectorRegistry) -> None:
        """Write the last metrics. If `ramrec serve` was killed, nobody reads them: remove all files instead."""
        if os.getppid() == self._parent:
            self.keep(registry)
            return
        for path in (self._socket, self._figures):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another worker still has files there
            self._folder.rmdir()


def socket_of(place: Path) -> Path:
    """The Unix socket on which only the worker at this place answers."""
    return place.with_name(place.name + ".socket")


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of a host; other processes of this user may bind, too. Raises OSError."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found: list[socket.socket] = []
    missing: OSError | None = None
    with ExitStack() as stack:
        for family, _, _, _, address in dict.fromkeys(infos):
            try:
                found.append(stack.enter_context(_bound(family, address)))
            except OSError as error:
                if error.errno not in ELSEWHERE:
                    raise
                missing = error
        if missing is not None and not found:
            raise missing
        stack.pop_all()
    return found


def _bound(family: int, address: Any) -> socket.socket:
    one = socket.socket(family)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


def families(metrics: Iterable[Metric]) -> list[MetricFamily]:
    """Metrics in a form that can be written to a file."""
    return [
        MetricFamily(one.name, one.documentation, one.type, [(s.name, s.labels, s.value) for s in one.samples])
        for one in metrics
    ]


def added_up(parts: Iterable[Iterable[MetricFamily]]) -> list[MetricFamily]:
    """The metrics of several processes as those of one.

    Counters, histograms and resource use are summed, start times take the earliest, rates are computed from the sums,
    and other gauges take the largest value.
    """
    found: dict[str, MetricFamily] = {}
    values: dict[str, Values] = {}
    for one in (family for part in parts for family in part):
        found.setdefault(one.name, one)
        so_far = values.setdefault(one.name, {})
        for name, labels, value in one.samples:
            key = name, tuple(sorted(labels.items()))
            so_far[key] = _together(one.type, name, so_far[key], value) if key in so_far else value
    for rate, (part, whole) in RATES.items():
        if rate in values:
            values[rate] = _quotients(rate, values[part], f"{part}_total", values[whole], f"{whole}_total")
    return [
        MetricFamily(
            name, one.about, one.type, [(of, dict(labels), value) for (of, labels), value in values[name].items()]
        )
        for name, one in found.items()
    ]


def _together(type_: str, name: str, one: float, other: float) -> float:
    if name.endswith("_created") or name == "process_start_time_seconds":
        return min(one, other)
    if type_ in COUNTED or name.startswith("process_"):
        return one + other
    return max(one, other)


def _quotients(rate: str, part: Values, part_name: str, whole: Values, whole_name: str) -> Values:
    """The quotient for all labels with a nonzero whole."""
    counted = {labels: value for (name, labels), value in whole.items() if name == whole_name and value}
    return {(rate, labels): part.get((part_name, labels), 0.0) / value for labels, value in counted.items()}


def _read_figures(path: Path) -> list[MetricFamily]:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=list[MetricFamily])
    except FileNotFoundError:
        return []
