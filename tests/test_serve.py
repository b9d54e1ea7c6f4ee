"""`ramrec …` as a user runs it: real processes, ended by the ids that the test started."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest
import redis

from benchmarks.ports import free_port
from memory_service.embedded import EmbeddedError, embedded_valkey
from model.checkpoint import load_checkpoint, save_checkpoint
from tests.synthetic import random_checkpoint

ROOT = Path(__file__).parent.parent
SERVING = re.compile(r"RAMRec serves on (\S+)")


def ramrec(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False, **more)


@pytest.fixture
def start(run, tmp_path) -> Iterator[Callable[..., tuple[subprocess.Popen, httpx2.Client]]]:
    """Start `ramrec serve` on one data folder; gives the process and a client once it says that it serves."""
    started: list[tuple[subprocess.Popen, httpx2.Client]] = []

    def serve(folder: Path = run) -> tuple[subprocess.Popen, httpx2.Client]:
        ports = ["--port", str(free_port()), "--memory-port", str(free_port())]
        command = [
            sys.executable,
            "-m",
            "api.cli",
            "serve",
            "--run",
            str(folder),
            "--data-dir",
            str(tmp_path / "d"),
            *ports,
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line = process.stdout.readline()
        found = SERVING.match(line)
        assert found, line
        started.append((process, httpx2.Client(base_url=found[1], timeout=30)))
        return started[-1]

    yield serve
    for process, client in started:
        client.close()
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def remember(client: httpx2.Client, item: str) -> int:
    response = client.post("/memories", json={"interactions": [{"user_id": "u", "item_id": item}]})
    assert response.json()["accepted"] == 1
    return response.json()["versions"]["u"]


def children(process: subprocess.Popen) -> dict[str, int]:
    """Module name → process id of what a supervisor started."""
    found = {}
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        found[words[words.index(b"-m") + 1].decode()] = int(number)
    return found


def words(number: int) -> dict[str, str]:
    """The options that a process was started with."""
    found = Path(f"/proc/{number}/cmdline").read_text().split("\0")
    return dict(pairwise(found))


def test_serving_stops_cleanly_and_starts_again_with_every_memory(start):
    process, client = start()
    assert remember(client, "i1") == 1
    parts = children(process)
    assert set(parts) == {"memory_service", "api"}
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not any(Path(f"/proc/{number}").exists() for number in parts.values())
    _, client = start()
    assert remember(client, "i2") == 2


def test_a_killed_memory_service_is_named_loses_nothing_and_can_be_started_again(start):
    process, client = start()
    remember(client, "i1")
    os.kill(children(process)["memory_service"], signal.SIGKILL)  # leaves its Valkey behind, holding the folder
    assert process.wait(60) == 2
    assert "the memory service ended with exit code -9" in process.stdout.read()
    _, client = start()
    assert remember(client, "i2") == 2


def test_a_hangup_reads_the_checkpoint_anew_and_reembed_moves_everybody_to_it(start, run, tmp_path, monkeypatch):
    """The folder that is served gets a new content; requests wait for nothing."""
    monkeypatch.setenv("RAMREC_MEMORY_TOKEN", "of-this-test-alone")
    old, new = load_checkpoint(run), random_checkpoint(seed=7)
    folder = tmp_path / "served"
    save_checkpoint(folder, old)
    process, client = start(folder)
    remember(client, "i1")
    wanted = save_checkpoint(folder, new)
    memory_url = f"http://127.0.0.1:{words(children(process)['memory_service'])['--port']}"
    early = ramrec("reembed", "--run", folder, "--memory-url", memory_url)
    assert (early.returncode, f"wants model {old.version}" in early.stderr) == (2, True)
    process.send_signal(signal.SIGHUP)
    while client.get("/model").json()["wanted"] != wanted:
        assert process.poll() is None
        assert client.post("/recommend", json={"user_id": "u"}).json()["model_version"] == old.version
    monkeypatch.delenv("RAMREC_MEMORY_TOKEN")
    stranger = ramrec("reembed", "--run", folder, "--memory-url", memory_url)
    assert (stranger.returncode, "401" in stranger.stderr) == (2, True)
    monkeypatch.setenv("RAMREC_MEMORY_TOKEN", "of-this-test-alone")
    moved = ramrec("reembed", "--run", folder, "--memory-url", memory_url)
    assert (moved.returncode, "1 users moved" in moved.stdout) == (0, True), moved.stderr
    assert client.get("/health/ready").json()["model_version"] == wanted
    assert client.post("/recommend", json={"user_id": "u"}).json()["model_version"] == wanted


def test_an_embedded_valkey_is_not_shared(tmp_path):
    with embedded_valkey(tmp_path, "everysec") as url:
        with redis.Redis.from_url(url) as client:
            client.set("x", 1)
        with pytest.raises(EmbeddedError, match="in use"), embedded_valkey(tmp_path, "everysec"):
            pass
    with embedded_valkey(tmp_path, "everysec") as url, redis.Redis.from_url(url) as client:
        assert client.get("x") == b"1"


def test_a_data_folder_too_deep_for_a_socket_works(tmp_path):
    deep = tmp_path / ("x" * 120)
    with embedded_valkey(deep, "everysec") as url, redis.Redis.from_url(url) as client:
        assert client.ping()


def test_expected_errors_are_one_line(tmp_path, run):
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    for words, message in (
        (("train", "--dataset", tmp_path / "none.csv", "--out", tmp_path / "r"), "none.csv"),
        (("train", "--dataset", empty, "--out", tmp_path / "r"), "empty.csv"),
        (("train", "--dataset", empty, "--config", "nothing", "--out", tmp_path / "r"), "ml-100k"),
        (("evaluate", "--run", tmp_path, "--dataset", empty), "no checkpoint"),
        (("serve", "--run", tmp_path), "no checkpoint"),
        (("ingest", "--file", empty), "empty.csv"),
    ):
        outcome = ramrec(*words)
        assert outcome.returncode == 2
        assert outcome.stdout == ""
        assert re.fullmatch(rf"ramrec: .*{re.escape(message)}.*\n", outcome.stderr), outcome.stderr


def test_train_evaluate_and_ingest_from_the_command_line(start, tmp_path):
    log = tmp_path / "log.csv"
    rows = [f"u{u},i{1 + (u + n) % 12},{1_600_000_000 + n}" for u in range(30) for n in range(10)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    config = tmp_path / "c.toml"
    config.write_text(
        "[encoder]\ndim = 16\nwindow = 8\n[rules]\nclusters = 4\n[training]\nmax_epochs = 2\nfusion_max_epochs = 1\n"
    )
    trained = ramrec("train", "--dataset", log, "--config", config, "--out", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    assert "30 users, 12 items, 300 interactions" in trained.stdout
    report = tmp_path / "reports" / "r.json"
    evaluated = ramrec("evaluate", "--run", tmp_path / "run", "--dataset", log, "--json", report)
    assert evaluated.returncode == 0, evaluated.stderr
    assert report.exists()
    assert "shuffled" in evaluated.stdout
    _, client = start()
    words = ("ingest", "--file", log, "--url", client.base_url)
    home = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    sent = ramrec(*words, env=home)
    assert "accepted 300" in sent.stdout, sent.stderr
    assert "300 were acknowledged before and not sent" in ramrec(*words, env=home).stdout
    assert "duplicates 300" in ramrec(*words, "--again", env=home).stdout
