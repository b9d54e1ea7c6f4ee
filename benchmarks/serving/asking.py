"""Who asks, and what: request bodies, closed loops by wrk, open loops by `openloop`, a look at the answers beside."""

from __future__ import annotations

import http.client
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from model.data.dataset import Dataset

LUA = Path(__file__).with_name("wrk.lua")
TOP_N, SEQUENCE, BATCH = 10, 50, 64
BODIES = 4096
LOOK_S = 0.1
STRIDE = 7919
"""Between the bodies looked at: prime, so that all have their turn."""
PATIENCE_S = 10.0
Beside = Callable[[], None]


class LoadError(RuntimeError):
    """A measurement that does not count: the load was not answered as it should be."""


# ---------------------------------------------------------------------------------------------------- bodies


def write_bodies(folder: Path, dataset: Dataset) -> None:
    """`users`, `sequences` and `batches`: files of a JSON body a line."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    users = [{"user_id": user} for user in dataset.user_ids]
    _write(folder / "users", users)
    batches = rng.integers(0, len(users), (BODIES // 4, BATCH))
    _write(folder / "batches", ({"requests": [users[n] for n in row]} for row in batches.tolist()))
    _write(folder / "sequences", ({"sequence": _sequence(dataset, rng)} for _ in range(BODIES)))


def _sequence(dataset: Dataset, rng: np.random.Generator) -> list[str]:
    """SEQUENCE items in a row of somebody's history."""
    lengths = dataset.lengths()
    user = int(rng.choice(np.flatnonzero(lengths >= SEQUENCE)))
    begin = int(dataset.offsets[user] + rng.integers(0, lengths[user] - SEQUENCE + 1))
    return [dataset.item_ids[item - 1] for item in dataset.items[begin : begin + SEQUENCE].tolist()]


def _write(file: Path, bodies: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(body) + "\n" for body in bodies), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- loads


@dataclass(frozen=True)
class Closed:
    """A closed loop: requests a second, times in milliseconds, CPU seconds of the load generator."""

    rate: float
    p50_ms: float
    p99_ms: float
    requests: int
    cpu_s: float


def closed_loop(url: str, bodies: Path, connections: int, seconds: float, beside: Beside | None = None) -> Closed:
    """wrk with so many connections, each waiting for its answer.

    Raises LoadError where an answer was no success, or wrk is missing.
    """
    command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds:.0f}s"]
    output, cpu_s = _run([*command, "--timeout", "10s", "--script", str(LUA), url], bodies, beside)
    return parsed(output, cpu_s)


def parsed(output: str, cpu_s: float) -> Closed:
    """What `wrk.lua` reported. Raises LoadError."""
    report = json.loads(output.strip().splitlines()[-1])
    if report["failed"] or not report["requests"]:
        raise LoadError(f"{report['failed']} of {report['requests']} requests failed")
    rate = report["requests"] / report["seconds"]
    return Closed(rate, report["p50_ms"], report["p99_ms"], report["requests"], cpu_s)


def open_loop(url: str, bodies: Path, rate: float, seconds: float, beside: Beside | None = None) -> dict[str, Any]:
    """The report of `benchmarks.serving.openloop`."""
    command = [sys.executable, "-m", "benchmarks.serving.openloop", "--url", url, "--bodies", str(bodies)]
    output, _ = _run([*command, "--rate", f"{rate:.3f}", "--seconds", str(seconds)], bodies, beside)
    report: dict[str, Any] = json.loads(output)
    return report


def _run(command: list[str], bodies: Path, beside: Beside | None) -> tuple[str, float]:
    """A load generator's output and the CPU seconds it took; `beside` is called all the while."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"BODIES": str(bodies)})
    except FileNotFoundError as error:
        raise LoadError(f"{command[0]} is not installed (Debian: apt install {command[0]})") from error
    try:
        while process.poll() is None:
            if beside is not None:
                beside()
            time.sleep(LOOK_S)
        output, _ = process.communicate()
    finally:
        process.kill()
    if process.returncode:
        raise LoadError(f"{' '.join(command)} ended with exit code {process.returncode}: {output}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return output, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --------------------------------------------------------------------------------------------------- looking


def _answer(netloc: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and content, over a connection of its own. Raises OSError."""
    with closing(http.client.HTTPConnection(netloc, timeout=PATIENCE_S)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.read()


class Look:
    """Sends one of the bodies now and then and checks that the answer is whole: TOP_N items, from memory."""

    def __init__(self, url: str, bodies: Path) -> None:
        self._url, self._bodies, self.answers = urlsplit(url), bodies.read_bytes().splitlines(), 0

    def __call__(self) -> None:
        """Raises LoadError."""
        body = self._bodies[self.answers * STRIDE % len(self._bodies)]
        status, content = _answer(self._url.netloc, "POST", self._url.path, body)
        if status != 200:
            raise LoadError(f"{self._url.path} answered {status}: {content[:300]!r}")
        answer = json.loads(content)
        for one in answer.get("results", [answer]):
            if len(one["items"]) != TOP_N or one["source"] != "memory" or one["memory"]["degraded"]:
                raise LoadError(f"an answer was not whole: {one}")
        self.answers += 1


class Probes:
    """Asks the health probes now and then, as an orchestrator does; `times` in seconds by path."""

    PATHS = ("/health/live", "/health/ready")

    def __init__(self, base: str) -> None:
        self._netloc, self.failed = urlsplit(base).netloc, 0
        self.times: dict[str, list[float]] = {path: [] for path in self.PATHS}

    def __call__(self) -> None:
        """A probe without an answer counts as failed."""
        for path, times in self.times.items():
            begin = time.perf_counter()
            try:
                self.failed += _answer(self._netloc, "GET", path)[0] != 200
            except OSError:
                self.failed += 1
            times.append(time.perf_counter() - begin)
