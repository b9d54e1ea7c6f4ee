"""The compose project under test, and who puts load on it."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.memory.crash import call
from benchmarks.ports import free_port

ROOT = Path(__file__).parents[2]
SECURE = ("docker-compose.yml", "docker/compose.secure.yml")
PATIENCE_S = 120.0
ITEMS = 1682


class Project:
    """`docker compose` for one project of its own, on ports of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.port, self.cluster_port = name, free_port(), free_port()
        self.files: tuple[str, ...] = ("docker-compose.yml",)
        more = {
            "COMPOSE_PROJECT_NAME": name,
            "RAMREC_PORT": str(self.port),
            "RAMREC_CLUSTER_PORT": str(self.cluster_port),
            "RAMREC_SECRETS": str(folder / "secrets"),
            "RAMREC_LOG_LEVEL": "debug",
        }
        self.env = {k: v for k, v in os.environ.items() if k not in ("RAMREC_RUN", "ML_100K")} | more

    @property
    def url(self) -> str:
        """Where the api is published."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cluster_url(self) -> str:
        """Where the api of the profile `cluster` is published."""
        return f"http://127.0.0.1:{self.cluster_port}"

    def compose(self, *words: str, fails: bool | None = False) -> str:
        """What `docker compose …` printed; it must succeed, unless it `fails` (None: either)."""
        files = [*self.files, *filter(None, [os.environ.get("RAMREC_COMPOSE_OVERRIDE")])]
        options = [word for file in files for word in ("-f", file)]
        return self.run("docker", "compose", *options, *words, fails=fails)

    def run(self, *words: str, fails: bool | None = False) -> str:
        """What a command printed, both streams."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(words, cwd=ROOT, env=self.env, text=True, check=False, timeout=1800, **streams)
        assert fails is None or (done.returncode != 0) == fails, (
            f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}"
        )
        return str(done.stdout)

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine says of a service's first container."""
        found: list[dict[str, Any]] = json.loads(self.run("docker", "inspect", f"{self.name}-{service}-1"))
        return found[0]

    def execute(self, service: str, script: str, fails: bool | None = False, number: int = 1) -> str:
        """A shell script in one of a service's containers."""
        return self.run("docker", "exec", f"{self.name}-{service}-{number}", "sh", "-c", script, fails=fails)

    def metric(self, name: str, number: int) -> float:
        """What a replica of the profile `cluster`'s memory service shows."""
        ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8001/metrics').read().decode())"
        shown = self.execute("memory-cluster", f'python -c "{ask}"', number=number)
        return sum(float(line.split()[-1]) for line in shown.splitlines() if line.startswith(f"{name} "))

    def kill(self, service: str) -> None:
        """kill -9 of what the container's init has started; to the engine it is a crash."""
        self.execute(service, "for one in $(cat /proc/1/task/1/children); do kill -9 $one; done", fails=None)

    def recover(self, service: str, restarts: int, url: str) -> float:
        """Seconds until the service was started again and everything is ready; those of this call count."""
        begin = time.monotonic()
        while time.monotonic() < begin + PATIENCE_S:
            if self.inspect(service)["RestartCount"] > restarts and is_ready(url):
                return time.monotonic() - begin
            time.sleep(0.1)
        raise TimeoutError(f"{service} did not come back within {PATIENCE_S:.0f} s:\n{self.compose('ps', '-a')}")


def is_ready(url: str) -> bool:
    """Whether the api says so."""
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False


@dataclass
class Writer:
    """Writes events of its users one after another, each until it is acknowledged; asks for each user now and then."""

    number: int
    url: str
    sent: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    acknowledged: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    refused: int = 0
    asked: int = 0

    def work_until(self, over: threading.Event) -> None:
        """Until told to stop."""
        rng = random.Random(self.number)
        for n in range(500):
            for user in (f"writer {self.number} user {u}" for u in range(12)):
                event = (str(rng.randint(1, ITEMS)), 1.6e9 + n)
                self.sent.setdefault(user, []).append(event)
                while not self._write(user, event):
                    if over.wait(0.05):
                        return
                self.acknowledged.setdefault(user, []).append(event)
                self._ask(user)
                if over.is_set():
                    return

    def _write(self, user: str, event: tuple[str, float]) -> bool:
        body = {"interactions": [{"user_id": user, "item_id": event[0], "timestamp": event[1]}]}
        try:
            answer = call(f"{self.url}/memories", body)
        except OSError:
            self.refused += 1
            return False
        return bool(answer["accepted"] + answer["duplicates"] == 1)

    def _ask(self, user: str) -> None:
        try:
            call(f"{self.url}/recommend", {"user_id": user})
            self.asked += 1
        except OSError:
            self.refused += 1


@dataclass
class Caller:
    """Keeps one connection and asks over it, one request after another, until nobody listens any more."""

    number: int
    port: int
    outcomes: Counter[str] = field(default_factory=Counter)
    answered: set[str] = field(default_factory=set)

    def ask_until_refused(self) -> None:
        """Each outcome is counted: `answered`, `refused` (no connection), or `broken` (sent, and no answer came)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        n = 0
        while not self.outcomes["refused"]:
            n += 1
            name = f"caller-{self.number}-{n}"
            kept = connection.sock is not None
            try:
                if not kept:
                    connection.connect()
                body = json.dumps({"sequence": [str(1 + n % ITEMS)]})
                headers = {"Content-Type": "application/json", "X-Request-Id": name}
                connection.request("POST", "/recommend", body, headers)
                answer = connection.getresponse()
                answer.read()
                self.outcomes[f"answered {answer.status}"] += 1
                self.answered.add(name)
            except (OSError, http.client.HTTPException):
                connection.close()
                # An engine's proxy accepts connections for a container that is gone, and closes them without a word.
                self.outcomes["broken" if kept else "refused"] += 1
