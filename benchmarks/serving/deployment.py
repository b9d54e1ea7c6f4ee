"""What is measured: `ramrec serve` as users start it, its processes, and their CPU time and memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from api.commands.supervisor import DIRECT, end, wait_until_ready
from benchmarks.ports import free_port

TICKS = os.sysconf("SC_CLK_TCK")
GRACE_S = 60.0
PARENT, SESSION, USER_TIME, SYSTEM_TIME = 4, 6, 14, 15
"""Fields of /proc/PID/stat."""
REDIS_URL = "RAMREC_MEMORY_REDIS_URL="


# ------------------------------------------------------------------------------------------------- processes


@contextmanager
def serving(run: Path, data_dir: Path) -> Iterator[str]:
    """Run `ramrec serve`; yields its URL. The log is written to a file beside the data folder."""
    port = free_port()
    words = ["--run", str(run), "--data-dir", str(data_dir), "--port", str(port), "--memory-port", str(free_port())]
    with running(["-m", "api.cli", "serve", *words], port, log=data_dir.with_suffix(".log")) as served:
        yield served.url


@dataclass(frozen=True)
class Running:
    """A running server and the session of its processes."""

    url: str
    session: int

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(_cpu_s(pid) for pid in _processes() if _field(pid, SESSION) == self.session)


@contextmanager
def running(
    command: Sequence[str], port: int, python: Path = Path(sys.executable), log: Path = Path(os.devnull)
) -> Iterator[Running]:
    """Run a Python program that serves on a port until `/health/ready` answers; its output goes to `log`."""
    url = f"http://127.0.0.1:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), *command],
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready([process], url)
        yield Running(url, process.pid)
    finally:
        end(process, GRACE_S)
        with suppress(ProcessLookupError):  # LitServe leaves its workers behind
            os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Deployment:
    """The processes of a running `ramrec serve` on this machine."""

    url: str
    api: int
    memory: int
    valkey: int

    @classmethod
    def at(cls, url: str) -> Deployment:
        """Find the processes behind a URL. Raises RuntimeError if some are not on this machine."""
        commands = {int(path.name): _words(path) for path in _processes()}
        port, found = str(urlsplit(url).port), {}
        for module in ("api", "memory_service"):
            pids = [pid for pid, words in commands.items() if ["-m", module] == words[1:3] and port in words]
            if len(pids) != 1:
                raise RuntimeError(f"no `python -m {module}` of a `ramrec serve` with port {port} on this machine")
            found[module] = pids[0]
            port = str(urlsplit(_option(commands[pids[0]], "--memory-url")).port)
        supervisor = _field(Path(f"/proc/{found['api']}"), PARENT)
        children = {pid for pid in commands if _field(Path(f"/proc/{pid}"), PARENT) == supervisor}
        others = children - set(found.values())
        if len(others) != 1:
            raise RuntimeError("this `ramrec serve` has no embedded Valkey")
        return cls(url, found["api"], found["memory_service"], others.pop())

    @property
    def redis_url(self) -> str:
        """The Redis that holds the memories."""
        told = Path(f"/proc/{self.memory}/environ").read_bytes().decode().split("\0")
        return next(one for one in told if one.startswith(REDIS_URL)).removeprefix(REDIS_URL)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far; the api's event loop apart from its other threads, which are the model's."""
        threads = {int(path.name): _cpu_s(path) for path in Path(f"/proc/{self.api}/task").iterdir()}
        return {
            "api, event loop": threads.pop(self.api),
            "api, model": sum(threads.values()),
            "memory service": _cpu_s(Path(f"/proc/{self.memory}")),
            "Valkey": _cpu_s(Path(f"/proc/{self.valkey}")),
        }

    def stages(self) -> dict[str, tuple[float, float]]:
        """The api's own histograms: seconds and count of each stage so far."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for sample in self._samples("ramrec_api_seconds"):
            if sample.name.endswith(("_sum", "_count")):
                found[sample.labels["stage"]][sample.name.rpartition("_")[2]] = sample.value
        return {stage: (values["sum"], values["count"]) for stage, values in found.items()}

    def accepted(self) -> float:
        """Interactions written so far."""
        return sum(
            sample.value
            for sample in self._samples("ramrec_api_interactions")
            if sample.labels.get("outcome") == "accepted" and sample.name.endswith("_total")
        )

    def _samples(self, name: str) -> list[Any]:
        with DIRECT.open(f"{self.url}/metrics") as response:
            families = text_string_to_metric_families(response.read().decode())
            return [sample for family in families if family.name == name for sample in family.samples]


def _processes() -> list[Path]:
    return list(Path("/proc").glob("[0-9]*"))


def _words(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_text().rstrip("\0").split("\0")
    except OSError:  # the process has ended
        return []


def _option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words else ""


def _field(process: Path, number: int) -> int:
    """A number in the `stat` of a process or thread, counted from 1; 0 if it has ended."""
    try:
        after_name = (process / "stat").read_text().rpartition(")")[2]  # the name may hold anything
    except OSError:
        return 0
    return int(after_name.split()[number - 3])


def _cpu_s(process: Path) -> float:
    return (_field(process, USER_TIME) + _field(process, SYSTEM_TIME)) / TICKS


# -------------------------------------------------------------------------------------------------- memories


def is_empty(url: str) -> bool:
    """Whether no user is known yet."""
    with DIRECT.open(urllib.request.Request(f"{url}/users?limit=1")) as response:
        return not json.load(response)["users"]


def ingest(deployment: Deployment, dataset: Path) -> float:
    """Run `ramrec ingest` on a file; returns interactions per second, including the start of the client."""
    before, begin = deployment.accepted(), time.perf_counter()
    command = ["-m", "api.cli", "ingest", "--again", "--file", str(dataset), "--url", deployment.url]
    subprocess.run([sys.executable, *command], check=True)
    return (deployment.accepted() - before) / (time.perf_counter() - begin)
