"""Memory replicas and Redis nodes that stop, hang, die or move slots: nothing acknowledged is lost or comes back."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import httpx2
import numpy as np
import pytest

from api.http.app import create_app as create_api
from api.http.problems import MemoryUnavailable
from api.memory.client import MemoryClient
from api.memory.replicas import MemoryReplicas
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.protocol.hash_slots import SLOTS, slot_of
from memory_service.protocol.question import Question
from memory_service.protocol.structs import EventIn, PlanRequest, UserEvents, UserWrite, WriteRequest
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint
from model.config import RulesConfig
from tests.conftest import served
from tests.memory_service.calling import vectors
from tests.redis_cluster import redis_cluster, until
from tests.replicas import NOW, USERS, Replicas, all_ready, answers, history, metric, replicas_seen_by, take

ROOT = Path(__file__).parents[2]


class LoadUnderFailures:
    """Two threads that write and ask while things break, and note what was acknowledged and what went wrong."""

    def __init__(self, api: httpx2.Client, users: list[str]) -> None:
        self._api, self._users = api, users
        self.acknowledged: dict[str, list[str]] = defaultdict(list)
        self.versions: dict[str, int] = {}
        self.faults: list[str] = []
        self.refused = self.written = self.asked = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(users[n::2],), daemon=True) for n in range(2)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, users: list[str]) -> None:
        step = 0
        try:
            while not self._stop.is_set():
                step += 1
                user = users[step % len(users)]
                self._write(user, f"{user}/{step}", NOW + step)
                self._ask(users[(step + 1) % len(users)])
        except Exception as error:
            self.faults.append(repr(error))

    def _write(self, user: str, item: str, when: int) -> None:
        """Sends an event until it is acknowledged; only 503 is an excuse."""
        event = {"user_id": user, "item_id": item, "timestamp": when}
        while not self._stop.is_set():
            response = self._api.post("/memories", json={"interactions": [event]})
            if response.status_code == 200:
                self._acknowledge(user, item, response.json())
                return
            if response.status_code != 503:
                self.faults.append(f"{response.status_code}: {response.text}")
            self.refused += 1

    def _acknowledge(self, user: str, item: str, answer: dict) -> None:
        if answer["rejected"] or answer["accepted"] + answer["duplicates"] != 1:
            self.faults.append(f"{user}: {answer}")
        before = self.versions.get(user, 0)
        self.versions[user] = answer["versions"].get(user, before)
        if self.versions[user] < before:
            self.faults.append(f"{user}: version {self.versions[user]} after {before}")
        self.acknowledged[user].append(item)
        self.written += 1

    def _ask(self, user: str) -> None:
        before = self.versions.get(user, 0)
        response = self._api.post("/recommend", json={"user_id": user, "scopes": ["own"], "explain": True})
        if response.status_code != 200:
            self.faults.append(f"recommend: {response.status_code}: {response.text}")
            return
        answer = response.json()
        self.asked += 1
        if not answer["memory"]["degraded"] and answer["memory"]["version"] < before:
            self.faults.append(f"{user}: stale: {answer['memory']['version']} after {before}")
        for item in answer["items"]:
            for memory in item.get("because") or []:
                if not memory["item_id"].startswith(f"{user}/"):
                    self.faults.append(f"{user} was shown {memory['item_id']}")


def kept(url: str, users: list[str]) -> dict[str, list[str]]:
    """Items that Redis holds of users, oldest first."""

    async def read_all() -> dict[str, list[str]]:
        store = Store(url, RulesConfig(capacity=10), 10)
        try:
            ids = await store.item_ids(1)
            records = await store.load(users)
            return {
                user: [] if record is None else [ids[n - 1] for n in record.log_item.tolist()]
                for user, record in records.items()
            }
        finally:
            await store.close()

    return asyncio.run(read_all())


def test_nothing_acknowledged_is_lost_while_a_primary_dies_and_replicas_come_and_go(run, tmp_path, stack):
    users = [f"walker {n}" for n in range(12)]
    cluster = stack.enter_context(redis_cluster(tmp_path / "redis"))
    replicas = Replicas(run, cluster.url, stack)
    first, second = replicas.add(), replicas.add()
    replicas.settle()
    api = replicas.api()
    with LoadUnderFailures(api, users) as load:
        until(lambda: load.written > 60)
        victim = cluster.primary_of_slot(5000)
        cluster.kill(victim)
        until(lambda: cluster.primary_of_slot(5000) != victim)
        calm = load.written
        until(lambda: load.written > calm + 60)
        cluster.start_again(victim)
        replicas.add()
        until(lambda: len(replicas_seen_by(first)) == 3 and load.written > calm + 120)
        replicas.remove(second)
        until(lambda: second not in replicas_seen_by(first))
        calm = load.written
        until(lambda: load.written > calm + 60)
        until(lambda: cluster.is_whole(victim))
        hung = cluster.primary_of_slot(12000)
        cluster.signal(hung, signal.SIGSTOP)  # a primary that hangs is replaced like one that died
        until(lambda: cluster.primary_of_slot(12000) != hung)
        cluster.signal(hung, signal.SIGCONT)
        calm = load.written
        until(lambda: load.written > calm + 60)
    assert not load.faults
    found = kept(cluster.url, users)
    for user in users:
        assert found[user] == list(dict.fromkeys(load.acknowledged[user])), user
    replicas.settle()
    assert load.asked > 100


# ----------------------------------------------------------------------------------- replicas as processes


@pytest.fixture
def process(run, valkey_url):
    """Starts replicas as processes. Returns the process and the URL of each."""
    started: list[subprocess.Popen] = []

    def start() -> tuple[subprocess.Popen, str]:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        options = ["--run", str(run), "--port", str(port), "--redis-url", valkey_url]
        settings = {"RAMREC_MEMORY_COLLECTIVE_USERS": "1", "RAMREC_MEMORY_PATIENCE_S": "3"}
        command = [sys.executable, "-m", "memory_service", *options]
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | settings))
        return started[-1], url

    yield start
    for replica in started:
        replica.kill()
        replica.wait(30)


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


def both_ready(first: str, second: str) -> bool:
    return is_ready(first) and is_ready(second) and all_ready(first, second)


def test_a_replica_that_is_told_to_stop_answers_until_callers_ask_others(run, process, stack):
    (stays, staying), (goes, going) = process(), process()
    until(lambda: both_ready(staying, going))
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=f"{going},{staying}"))))
    api = stack.enter_context(httpx2.Client(base_url=url, timeout=60))
    for user in USERS:
        take(api, *history(user))
    entries = 7 * len(USERS)  # a user's first entry is not shared
    until(lambda: all(metric(url, "ramrec_memory_collective_entries") == entries for url in (going, staying)))
    before = answers(api)
    goes.send_signal(signal.SIGTERM)
    while goes.poll() is None:
        assert answers(api) == before
    assert goes.returncode == 0
    assert all_ready(staying)
    assert answers(api) == before
    stays.send_signal(signal.SIGTERM)  # the last one stops at once
    assert stays.wait(30) == 0


def test_a_user_forgotten_while_a_replica_hangs_is_not_kept_by_it(run, process, go):
    """Forgetting waits for a hanging replica until it is no longer listed; awake, it gives nothing of the user."""
    (_, awake), (hangs, hanging) = process(), process()
    until(lambda: both_ready(awake, hanging))
    version, (query,) = load_checkpoint(run).version, np.frombuffer(vectors("stays", 1), "<f4").reshape(1, -1)
    question = Question(version, [""], query_rows=np.array([0]), queries=query[None])

    async def scenario():
        one, other, both = MemoryClient(awake, 5), MemoryClient(hanging, 5), MemoryReplicas(awake, 0.5)
        try:
            events = [EventIn(at, f"i{at + 1}", NOW + at) for at in range(4)]
            plan = (await one.plan(PlanRequest(version, NOW, [UserEvents("goes", events)]))).users[0]
            write = UserWrite("goes", plan.version, events, vectors("goes", 4), vectors("goes", 1))
            await one.write(WriteRequest(version, NOW, [write]))
            while not (await other.retrieve(question)).retrieved.collective.valid.any():
                await asyncio.sleep(0.01)
            hangs.send_signal(signal.SIGSTOP)
            with pytest.raises(MemoryUnavailable, match="not confirmed by every replica"):
                await both.forget("goes")
            while hanging in (await one.replicas()).replicas:
                await asyncio.sleep(0.05)
            await both.forget("goes")  # waits for nobody
            hangs.send_signal(signal.SIGCONT)
            seen = []
            while not seen or seen[-1].degraded:
                try:
                    seen.append(await other.retrieve(question))
                except MemoryUnavailable:
                    continue
            return seen
        finally:
            for client in (one, other, both):
                await client.close()

    seen = go(scenario())
    assert not any(answer.retrieved.collective.valid.any() for answer in seen)
    assert metric(hanging, "ramrec_memory_lapses_total") == 1


def test_a_hanging_replica_is_given_up_for_another(run, process, go):
    (_, awake), (hangs, hanging) = process(), process()
    until(lambda: both_ready(awake, hanging))
    version = load_checkpoint(run).version

    async def scenario():
        patient = MemoryReplicas(awake, timeout_s=600)
        try:
            await patient.ready()
            users = [user for user in USERS if patient.replica_of(user) == hanging]
            hangs.send_signal(signal.SIGSTOP)
            return [await patient.retrieve(Question(version, [user])) for user in users]
        finally:
            hangs.send_signal(signal.SIGCONT)
            await patient.close()

    found = go(scenario())
    assert found
    assert not any(answer.degraded for answer in found)


# ---------------------------------------------------------------------------------------- a Redis Cluster


def test_a_primary_acknowledges_nothing_while_its_replica_hangs_but_does_without_a_replica(run, tmp_path, stack):
    cluster = stack.enter_context(redis_cluster(tmp_path / "redis"))
    replicas = Replicas(run, cluster.url, stack)
    replicas.add()
    api = replicas.api()
    user = next(f"u{n}" for n in range(100) if slot_of(f"u{n}") < SLOTS // 3)  # on the first primary
    events = [{"user_id": user, "item_id": f"i{n}", "timestamp": NOW + n} for n in range(1, 6)]
    take(api, events[0])
    replica = cluster.primaries  # number of the first primary's replica
    cluster.signal(replica, signal.SIGSTOP)
    refused = api.post("/memories", json={"interactions": [events[1]]})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    cluster.signal(replica, signal.SIGCONT)
    until(lambda: api.post("/memories", json={"interactions": [events[1]]}).status_code == 200)
    cluster.kill(replica)
    until(lambda: api.post("/memories", json={"interactions": [events[2]]}).status_code == 200)
    assert kept(cluster.url, [user])[user] == ["i1", "i2", "i3"]
    text = httpx2.get(f"{next(iter(replicas.opened))}/metrics").text
    assert "ramrec_memory_redis_primaries_lost 0.0" in text
    assert "ramrec_memory_redis_unreplicated_writes_total 0.0" not in text
    assert load_checkpoint(run).version == api.get("/model").json()["model_version"]


def test_hash_slots_that_move_between_primaries_are_followed(run, tmp_path, stack):
    with ExitStack() as opened:
        cluster = opened.enter_context(redis_cluster(tmp_path / "redis", replicas=0))
        replicas = Replicas(run, cluster.url, opened, redis_replicas=0)
        replicas.add()
        api = replicas.api()
        take(api, {"user_id": "u", "item_id": "i1", "timestamp": NOW})
        key = b"ramrec:{u}"
        source = cluster.primary_of(key)
        target = (source + 1) % 3
        slot = cluster.client(source).execute_command("CLUSTER", "KEYSLOT", key)
        ids = [cluster.client(n).execute_command("CLUSTER", "MYID").decode() for n in range(3)]
        cluster.client(target).execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        cluster.client(source).execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        cluster.client(source).execute_command("MIGRATE", "127.0.0.1", cluster.ports[target], key, 0, 5000)
        answer = take(api, {"user_id": "u", "item_id": "i2", "timestamp": NOW + 1})  # redirected with ASK
        assert answer["versions"] == {"u": 2}
        for n in (target, source, 3 - source - target):
            cluster.client(n).execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        answer = take(api, {"user_id": "u", "item_id": "i3", "timestamp": NOW + 2})  # redirected with MOVED
        assert answer["versions"] == {"u": 3}
        assert api.post("/recommend", json={"user_id": "u"}).json()["memory"]["version"] == 3
        assert kept(cluster.url, ["u"])["u"] == ["i1", "i2", "i3"]
