"""The processes of `ramrec serve`: they come up, stop and end together."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from api.commands.supervisor import ServeError, data_dir_of, serve
from benchmarks.ports import free_port
from model.checkpoint import CheckpointError


class Served:
    """`ramrec serve` as a process of its own; waits until it says that it serves."""

    def __init__(self, run: Path, data_dir: Path, **environment: str) -> None:
        self.port, memory_port = free_port(), free_port()
        words = ["serve", "--run", str(run), "--port", str(self.port), "--memory-port", str(memory_port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", *words, "--data-dir", str(data_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        self.url = f"http://127.0.0.1:{self.port}"

    def children(self) -> dict[str, int]:
        """Process ids of api, memory service and Valkey."""
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in found}
        return {words[2] if "-m" in words else "valkey": child for child, words in commands.items()}

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code and stderr after a signal."""
        self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=60)
        return self.process.returncode, complaints


@pytest.fixture
def serving(run, tmp_path, stack):
    def start(**environment: str) -> Served:
        started = Served(run, tmp_path / "data", **environment)
        stack.callback(started.process.communicate)
        stack.callback(started.process.kill)
        assert started.url in started.greeting
        return started

    return start


def test_serve_comes_up_behind_a_proxy_setting_and_stops_cleanly(serving):
    both = serving(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    with httpx2.Client(base_url=both.url, trust_env=False) as client:
        assert client.get("/health/ready").status_code == 200
    children = both.children()
    assert set(children) == {"api", "memory_service", "valkey"}
    assert both.end(signal.SIGTERM) == (0, "")
    assert not any(Path(f"/proc/{child}").exists() for child in children.values())


def test_when_the_api_dies_serve_stops_the_memory_service_and_says_so(serving):
    both = serving()
    children = both.children()
    os.kill(children["api"], signal.SIGKILL)
    _, complaints = both.process.communicate(timeout=60)
    assert both.process.returncode == 2
    assert complaints.splitlines()[-1].startswith("ramrec: the api ended")
    assert not any(Path(f"/proc/{child}").exists() for child in children.values())


def test_when_serve_is_killed_its_processes_end_and_nothing_is_lost(serving):
    both = serving()
    event = {"user_id": "u", "item_id": "i1"}
    with httpx2.Client(base_url=both.url) as client:
        assert client.post("/memories", json={"interactions": [event]}).json()["accepted"] == 1
    watches = [os.pidfd_open(child) for child in both.children().values()]
    both.process.kill()
    for watch in watches:
        _wait_for_end(watch)
    again = serving(RAMREC_API_LOG_LEVEL="warning")  # same data folder; what is answered is not written
    with httpx2.Client(base_url=again.url) as client:
        assert client.get("/users/u/memory").json()["bank_size"] == 1
    assert again.end(signal.SIGTERM) == (0, "")


def _wait_for_end(watch: int) -> None:
    ended, _, _ = select.select([watch], [], [], 60)
    os.close(watch)
    assert ended


def test_one_port_for_two_services_is_refused(run):
    port = free_port()
    with pytest.raises(ServeError, match=f"cannot both listen on port {port}"):
        serve(run, "127.0.0.1", port, port, None, None, None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--run", "nowhere"], "no checkpoint at nowhere"), (["--port", "99999"], "port"), ([], "run")],
)
def test_the_api_alone_fails_with_one_line(words, complaint):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAMREC_")}
    ended = subprocess.run(
        [sys.executable, "-m", "api", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert complaint in ended.stderr


def test_serving_fails_clearly_without_a_checkpoint_or_a_port(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        serve(tmp_path, "127.0.0.1", free_port(), free_port(), None, None, None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}"):
            serve(run, "127.0.0.1", port, free_port(), None, None, None)
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}"):
            serve(run, "127.0.0.1", free_port(), port, None, None, None)


def test_each_run_has_a_data_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_dir_of(Path("runs/a")) != data_dir_of(Path("other/a"))
    assert data_dir_of(Path("runs/a")).is_relative_to(tmp_path)
