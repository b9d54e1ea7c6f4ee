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

from api.commands.supervisor import Child, ServeError, held, serve, tend, wait_until_ready
from benchmarks.ports import free_port
from memory_service.store.embedded import EmbeddedError, embedded_valkey, running_valkey
from model.checkpoint import load_checkpoint, save_checkpoint
from tests.redis_cluster import until
from tests.synthetic import random_checkpoint

ROOT = Path(__file__).parents[3]
SERVING = re.compile(r"RAMRec serves on (\S+)")
ACCEPTED = '{outcome="accepted"}'


def ramrec(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False, **more)


def two_ports() -> int:
    """The first of two free ports that follow each other."""
    first, second = free_port(), free_port()
    while second != first + 1:
        first, second = second, free_port()
    return first


@pytest.fixture
def start(run, tmp_path) -> Iterator[Callable[..., tuple[subprocess.Popen, httpx2.Client]]]:
    """Start `ramrec serve` on one data folder; gives the process and a client once it says that it serves."""
    started: list[subprocess.Popen] = []
    clients: list[httpx2.Client] = []

    def serve(folder: Path = run, *more: object, **environment: str) -> tuple[subprocess.Popen, httpx2.Client]:
        words = ["--run", folder, "--data-dir", tmp_path / "d", "--port", free_port(), "--memory-port", two_ports()]
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "serve", *map(str, [*words, *more])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )
        started.append(process)
        line = process.stdout.readline()
        found = SERVING.match(line)
        assert found, line
        clients.append(httpx2.Client(base_url=found[1], timeout=30))
        return process, clients[-1]

    yield serve
    for client in clients:
        client.close()
    for process in started:
        if process.poll() is None:
            process.terminate()
        print(process.communicate(timeout=60)[0])  # pytest shows it where the test failed


def remember(client: httpx2.Client, item: str) -> int:
    response = client.post("/memories", json={"interactions": [{"user_id": "u", "item_id": item}]})
    assert response.json()["accepted"] == 1
    return response.json()["versions"]["u"]


def children(process: subprocess.Popen) -> dict[str, list[int]]:
    """Module name → process ids of what a supervisor started."""
    found: dict[str, list[int]] = {}
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        module = words(int(number)).get("-m", "valkey")
        found.setdefault(module, []).append(int(number))
    return found


def words(number: int) -> dict[str, str]:
    """The options that a process was started with."""
    found = Path(f"/proc/{number}/cmdline").read_text().split("\0")
    return dict(pairwise(found))


def all_gone(parts: dict[str, list[int]]) -> bool:
    return not any(Path(f"/proc/{number}").exists() for numbers in parts.values() for number in numbers)


def test_serving_stops_cleanly_and_starts_again_with_every_memory(start):
    process, client = start()
    assert remember(client, "i1") == 1
    parts = children(process)
    assert {module: len(numbers) for module, numbers in parts.items()} == {"valkey": 1, "memory_service": 1, "api": 1}
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert all_gone(parts)
    _, client = start()
    assert remember(client, "i2") == 2


def test_a_killed_memory_service_is_named_loses_nothing_and_can_be_started_again(start):
    process, client = start()
    remember(client, "i1")
    os.kill(children(process)["memory_service"][0], signal.SIGKILL)
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
    memory_url = f"http://127.0.0.1:{words(children(process)['memory_service'][0])['--port']}"
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


# ---------------------------------------------------------------------------------------- several of a kind


def worker(number: int) -> httpx2.Client:
    """Calls that only this api worker answers."""
    socket = f"{words(number)['--worker']}.socket"
    return httpx2.Client(transport=httpx2.HTTPTransport(uds=socket), base_url="http://worker", timeout=30)


def counted(client: httpx2.Client, sample: str) -> float:
    """A value that `/metrics` shows."""
    found = re.search(rf"^{re.escape(sample)} (\S+)$", client.get("/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def test_two_workers_and_two_replicas_are_one_service(start):
    process, client = start(RAMREC_API_WORKERS="2", RAMREC_MEMORY_REPLICAS="2")
    parts = children(process)
    assert {module: len(numbers) for module, numbers in parts.items()} == {"valkey": 1, "memory_service": 2, "api": 2}
    one, two = map(worker, parts["api"])
    with one, two:
        for version in range(1, 10):
            writer, reader = (one, two) if version % 2 else (two, one)
            assert remember(writer, f"i{version}") == version
            for other in (reader, client):
                assert other.get("/users/u/memory").json()["version"] == version
        answer = one.post("/recommend", json={"user_id": "u"}).json()
        taken = {"user_id": "u", "item_id": answer["items"][0]["item_id"]}
        taken["recommendation_id"] = answer["recommendation_id"]
        assert two.post("/memories", json={"interactions": [taken]}).json()["accepted"] == 1
        for asked in (one, two, client):
            until(lambda asked=asked: counted(asked, "ramrec_api_interactions_total" + ACCEPTED) == 10)
            until(lambda asked=asked: counted(asked, 'ramrec_api_feedback_total{outcome="hit"}') == 1)
            assert counted(asked, 'ramrec_api_hit_rate{k="any",scope="any"}') == 1
    process.send_signal(signal.SIGHUP)
    heard: set[str] = set()
    while len(heard) < 2:
        line = process.stdout.readline()
        assert line
        heard.update(re.findall(r"reload: model .*(api worker [12])", line))
    process.terminate()
    assert process.wait(60) == 0
    assert all_gone(parts)


def persistently(client: httpx2.Client, path: str, body: dict) -> dict:
    """An answer, after another try where a connection had been to a process that died."""
    for left in range(3, -1, -1):
        try:
            return client.post(path, json=body).raise_for_status().json()
        except httpx2.TransportError:
            if not left:
                raise
    raise AssertionError


def test_a_killed_worker_and_a_killed_replica_come_back_and_requests_go_on(start, run):
    process, client = start(run, "--workers", 2, "--memory-replicas", 2)
    before = children(process)
    doomed = [before["api"][0], before["memory_service"][0]]
    with worker(doomed[0]) as to_be_killed:
        for number in range(10):
            persistently(to_be_killed, "/memories", {"interactions": [{"user_id": f"u{number}", "item_id": "i1"}]})
        assert counted(client, "ramrec_api_interactions_total" + ACCEPTED) <= 10
        until(lambda: counted(client, "ramrec_api_interactions_total" + ACCEPTED) == 10)
    for number in doomed:
        os.kill(number, signal.SIGKILL)
    for number in range(10):
        event = {"user_id": f"u{number}", "item_id": "i2"}
        assert persistently(client, "/memories", {"interactions": [event]})["versions"] == {f"u{number}": 2}
        answer = persistently(client, "/recommend", {"user_id": f"u{number}"})
        assert (answer["source"], answer["memory"]["bank_size"]) == ("memory", 2)
    after = until(lambda: (now := children(process)) and len(now["api"]) == len(now["memory_service"]) == 2 and now)
    assert not set(doomed) & {*after["api"], *after["memory_service"]}
    (new,) = set(after["api"]) - set(before["api"])
    memory = [f"http://127.0.0.1:{words(number)['--port']}" for number in after["memory_service"]]
    wait_until_ready([process], f"unix:{words(new)['--worker']}.socket", *memory)
    with worker(new) as back:
        for number in range(10):
            assert back.get(f"/users/u{number}/memory").json()["version"] == 2
        until(lambda: counted(back, "ramrec_api_interactions_total" + ACCEPTED) == 20)
    for number in after["api"]:
        os.kill(number, signal.SIGKILL)
    assert process.wait(60) == 2
    said = process.stdout.read()
    assert "api worker 1 ended with exit code -9; it is restarted in 0.5 s" in said
    assert "memory replica 1 ended with exit code -9; it is restarted in 0.5 s" in said
    assert re.search(r"^ramrec: api worker [12] ended with exit code -9; the rest was stopped$", said, re.M)
    assert all_gone(after)


def test_a_process_that_keeps_ending_is_started_less_and_less_often(caplog):
    def child(name: str, code: str) -> Child:
        return Child(name, [sys.executable, "-c", code], {}, "")

    steady, ending = child("steady", "import signal; signal.pause()"), child("ending", "exit(3)")
    steady.start()
    ending.start()
    try:
        until(lambda: tend([steady, ending]) or len(caplog.messages) == 2)
    finally:
        steady.process.kill()
    assert caplog.messages == [f"ending ended with exit code 3; it is restarted in {s} s" for s in ("0.5", "1")]
    steady.process.wait()
    with pytest.raises(ServeError, match="steady ended with exit code -9; the rest was stopped"):
        tend([steady, ending])


@pytest.mark.parametrize(
    ("port", "memory_port", "memory_url", "complaint"),
    [
        (8001, 8000, None, "cannot both listen on port 8001"),
        (8000, 65535, None, "need the ports 65535 to 65536"),
        (8000, 8001, "http://127.0.0.1:8001", "does not start the memory service"),
    ],
)
def test_replicas_that_cannot_be_are_refused(run, port, memory_port, memory_url, complaint):
    with pytest.raises(ServeError, match=complaint):
        serve(run, "127.0.0.1", port, memory_port, None, memory_url, None, memory_replicas=2)


def test_two_supervisors_do_not_share_a_port():
    port = free_port()
    with (
        held("127.0.0.1", port),
        pytest.raises(ServeError, match=f"{port}: Address already in use"),
        held("127.0.0.1", port),
    ):
        pass
    with held("127.0.0.1", port):
        pass


# --------------------------------------------------------------------------------------- the embedded Valkey


def test_an_embedded_valkey_is_not_shared(tmp_path):
    with embedded_valkey(tmp_path, "everysec") as url:
        with redis.Redis.from_url(url) as client:
            client.set("x", 1)
        with pytest.raises(EmbeddedError, match="in use"), embedded_valkey(tmp_path, "everysec"):
            pass
    with embedded_valkey(tmp_path, "everysec") as url, redis.Redis.from_url(url) as client:
        assert client.get("x") == b"1"


def test_an_embedded_valkey_ends_with_its_owner_and_has_written_everything(tmp_path):
    code = (
        "import pathlib, signal, sys; from memory_service.store.embedded import embedded_valkey\n"
        "with embedded_valkey(pathlib.Path(sys.argv[1]), 'everysec') as url: print(url, flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        with redis.Redis.from_url(owner.stdout.readline().strip()) as client:
            client.set("x", 1)
        owner.kill()
    until(lambda: running_valkey(tmp_path) is None)
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
