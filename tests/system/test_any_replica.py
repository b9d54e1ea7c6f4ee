"""Any number of memory replicas behind one api: the same answers as one gives, whoever joins, leaves or dies."""

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
from msgspec import structs

from api.http.app import create_app as create_api
from api.http.problems import MemoryUnavailable
from api.jobs.reembed import reembed
from api.memory.client import MemoryClient
from api.memory.replicas import MemoryReplicas
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.slots import SLOTS, slot_of
from memory_service.protocol.structs import (
    EventIn,
    PlanRequest,
    ReplicasReply,
    RetrieveRequest,
    UserEvents,
    UserWrite,
    WriteRequest,
)
from memory_service.settings import MemorySettings
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import RulesConfig
from model.memory.bank import Entries
from model.memory.habits import FEATURES
from tests.conftest import served
from tests.memory_service.service.test_service import vectors
from tests.redis_cluster import redis_cluster, until
from tests.replicas import Replicas, all_ready, replicas_seen_by
from tests.synthetic import habitual_config, random_checkpoint

ROOT = Path(__file__).parents[2]
USERS = [f"user {n}" for n in range(24)]
NOW = 1_700_000_000


def history(user: str) -> list[dict]:
    """What a user took: common items, and one that one other user has, or nobody."""
    n = USERS.index(user)
    rng = np.random.default_rng(n)
    items = [f"i{item}" for item in rng.choice(np.arange(1, 31), 7, replace=False)]
    items.insert(4, f"rare {n % (len(USERS) // 2)}" if n % 3 else f"only {n}")
    return [
        {"user_id": user, "item_id": item, "timestamp": NOW + 60 * at, "rating": float(rng.integers(1, 6))}
        for at, item in enumerate(items)
    ]


def take(api: httpx2.Client, *interactions: dict) -> dict:
    response = api.post("/memories", json={"interactions": list(interactions)})
    assert response.status_code == 200, response.text
    return response.json()


QUESTIONS = [
    *({"user_id": user, "top_n": 40} for user in USERS),
    *({"user_id": user, "top_n": 40, "ignore_memories": ["i1", "i2", "i3"]} for user in USERS[:6]),
    *({"user_id": user, "top_n": 40, "exclude_seen": False, "k": 2, "scopes": ["own"]} for user in USERS[:6]),
    *({"user_id": user, "sequence": ["i3", "i9"], "top_n": 40} for user in USERS[:6]),
    {"sequence": ["i1", "i5", "i7"], "top_n": 40},
    {"sequence": ["i2"], "scopes": ["collective"], "top_n": 40},
    {"user_id": "nobody", "top_n": 40},
    {},
]


def answers(api: httpx2.Client) -> list[dict]:
    """Answers to all questions, without what differs by nature."""
    questions = [{**one, "explain": True} for one in QUESTIONS]  # so that asking changes nothing
    response = api.post("/recommend/batch", json={"requests": questions})
    assert response.status_code == 200, response.text
    told = []
    for one in response.json()["results"]:
        one.pop("recommendation_id")
        one["items"] = {item["item_id"]: pytest.approx(item["score"], abs=1e-5) for item in one["items"]}
        about = one["memory"]  # batches differ, and with them the order of sums
        numbers = {"entropy", "gate", "copying", "log_z"} & about.keys()
        about |= {name: pytest.approx(about[name], abs=1e-5) for name in numbers}
        for memory in one["memory"]["memories"]:
            memory |= {name: pytest.approx(memory[name], abs=1e-5) for name in ("similarity", "weight")}
        told.append(one)
    return told


@pytest.fixture
def alone(run, valkey_url, stack):
    """An api over one memory service of the same events, in another database."""
    settings = MemorySettings(run=run, redis_url=f"{valkey_url}?db=1", collective_users=2)
    memory = stack.enter_context(served(create_memory(settings)))
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory))))
    client = stack.enter_context(httpx2.Client(base_url=url, timeout=60))
    client.memory_url = memory
    return client


def test_replicas_answer_as_one_would(run, valkey_url, stack, alone):
    replicas = Replicas(run, valkey_url, stack, collective_users=2)
    first, *_ = (replicas.add() for _ in range(3))
    replicas.settle()
    api = replicas.api(first)  # the others are learnt from it
    for user in USERS:
        assert take(api, *history(user))["accepted"] == take(alone, *history(user))["accepted"] == 8
    wanted = answers(alone)
    assert any("rare" in item for one in wanted for item in one["items"])
    assert not any("only" in item for one in wanted for item in one["items"])
    until(lambda: answers(api) == wanted)
    assert all(asked_of(url) > 0 for url in replicas.opened), "or this test shows nothing"

    stays, goes, comes = USERS[0], USERS[4], USERS[5]
    for one in (alone, api):  # who is forgotten is forgotten everywhere; its rare item has one holder less
        assert one.delete(f"/users/{goes}/memory").json()["existed"]
        assert one.get(f"/users/{goes}/memory").status_code == 404
        take(one, {"user_id": comes, "item_id": "i30", "timestamp": NOW + 10_000})
        assert one.get(f"/users/{stays}/memory").status_code == 200
    assert not any(item == "rare 4" for one in answers(api) for item in one["items"]), "no later than the forgetting"
    until(lambda: answers(api) == answers(alone))

    replicas.add()
    replicas.settle()
    until(lambda: answers(api) == answers(alone))
    until(lambda: shown(first, "ramrec_memory_replicas") == 4)
    wanted = answers(alone)
    replicas.remove(first)  # a crash, of the only seed the api was given
    for _ in range(5):
        assert answers(api) == wanted, "not refused, not incomplete: another one answers"
    replicas.settle()
    assert answers(api) == wanted


def shown(url: str, metric: str) -> float:
    """What a metric of a replica shows."""
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{metric} "))


def asked_of(url: str) -> float:
    """Users that a replica was asked about."""
    return shown(url, "ramrec_memory_users_retrieved_total")


def entries_at(url: str) -> float:
    """Others' memories that a replica can find."""
    return shown(url, "ramrec_memory_collective_entries")


def test_users_go_on_to_the_same_replica_when_another_comes_and_few_move(go):
    """Rendezvous hashing: of three replicas' users a fourth takes a quarter, evenly."""

    def shares(urls: list[str]) -> list[str]:
        async def choose() -> list[str]:
            chooser = MemoryReplicas("http://seed", 1)
            chooser._adopt(ReplicasReply("", dict.fromkeys(urls, True)))
            try:
                return [chooser.replica_of(f"user {n}") for n in range(4000)]
            finally:
                await chooser.close()

        return go(choose())

    urls = [f"http://10.0.0.{n}:8001" for n in range(4)]
    three, four = shares(urls[:3]), shares(urls)
    moved = [new for old, new in zip(three, four, strict=True) if old != new]
    assert set(moved) == {urls[3]}
    assert [four.count(url) for url in urls] == pytest.approx([1000] * 4, rel=0.1)


def test_what_another_process_does_to_redis_is_heard_within_moments(run, valkey_url, stack, go):
    replicas = Replicas(run, valkey_url, stack)
    replicas.add(), replicas.add()
    replicas.settle()
    api = replicas.api()
    take(api, *history(USERS[0]), *history(USERS[1]))
    store = Store(valkey_url, RulesConfig(capacity=10), 5)
    until(lambda: any(one["memory"]["collective"]["retrieved"] for one in answers(api)[: len(USERS)]))
    go(store.forget(USERS[0], NOW + 10_000.0))
    go(store.forget(USERS[1], NOW + 10_000.0))  # behind the replicas' backs
    asked = {"sequence": ["i1", "i5"], "scopes": ["collective"]}
    until(lambda: not api.post("/recommend", json=asked).json()["memory"]["collective"]["retrieved"])
    go(store.close())


class Load:
    """Somebody who goes on taking and asking while things break, and keeps what was acknowledged."""

    def __init__(self, api: httpx2.Client, users: list[str]) -> None:
        self._api, self._users = api, users
        self.acknowledged: dict[str, list[str]] = defaultdict(list)
        self.versions: dict[str, int] = {}
        self.faults: list[str] = []
        self.refused = self.written = self.asked = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(users[n::2], n), daemon=True) for n in range(2)]

    def __enter__(self):
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for one in self._threads:
            one.join(60)

    def _run(self, users: list[str], seed: int) -> None:
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
        event = {"user_id": user, "item_id": item, "timestamp": when}
        while not self._stop.is_set():
            response = self._api.post("/memories", json={"interactions": [event]})
            if response.status_code == 200:
                told = response.json()
                if told["rejected"] or told["accepted"] + told["duplicates"] != 1:
                    self.faults.append(f"{user}: {told}")
                version = told["versions"].get(user, self.versions.get(user, 0))
                if version < self.versions.get(user, 0):
                    self.faults.append(f"{user}: version {version} after {self.versions[user]}")
                self.versions[user] = version
                self.acknowledged[user].append(item)
                self.written += 1
                return
            if response.status_code != 503:
                self.faults.append(f"{response.status_code}: {response.text}")
            self.refused += 1

    def _ask(self, user: str) -> None:
        before = self.versions.get(user, 0)
        response = self._api.post("/recommend", json={"user_id": user, "scopes": ["own"], "explain": True})
        if response.status_code != 200:
            self.faults.append(f"recommend: {response.status_code}: {response.text}")
            return
        told = response.json()
        self.asked += 1
        if not told["memory"]["degraded"] and told["memory"]["version"] < before:
            self.faults.append(f"{user}: stale: {told['memory']['version']} after {before}")
        for item in told["items"]:
            for memory in item.get("because") or []:
                if not memory["item_id"].startswith(f"{user}/"):
                    self.faults.append(f"{user} was shown {memory['item_id']}")


def kept(url: str, users: list[str]) -> dict[str, list[str]]:
    """What Redis has of users, oldest first."""

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
    with Load(api, users) as load:
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
        cluster.signal(hung, signal.SIGSTOP)  # a primary that hangs is replaced as one that died
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


def test_replicas_move_to_another_model_as_one_does(run, valkey_url, stack, alone, tmp_path):
    replicas = Replicas(run, valkey_url, stack, collective_users=2)
    replicas.add(), replicas.add()
    replicas.settle()
    api = replicas.api()
    other = tmp_path / "other"
    save_checkpoint(other, random_checkpoint(seed=1))
    version = load_checkpoint(other).version
    for one in (alone, api):
        take(one, *(event for user in USERS for event in history(user)))
        assert one.post("/model/reload", json={"run": str(other)}).status_code == 200
        assert reembed(other, one.memory_url) == len(USERS)
        until(lambda one=one: one.get("/model").json()["model_version"] == version)
    until(lambda: answers(api) == answers(alone))


def test_replicas_retrieve_by_habits_as_one_does(valkey_url, stack, tmp_path, go):
    """Banks of any size, some present at the time of the request."""
    save_checkpoint(tmp_path, random_checkpoint(habitual_config()))
    version = load_checkpoint(tmp_path).version
    replicas = Replicas(tmp_path, valkey_url, stack, collective_users=2)
    first, second = replicas.add(), replicas.add()
    replicas.settle()
    times = NOW + 60.0 * np.arange(len(USERS))
    asked = RetrieveRequest(version, [*USERS, "nobody"], now=np.append(times, NOW).tobytes(), uncounted=[*range(25)])

    async def ask():
        both, one = MemoryReplicas(first, 30), MemoryClient(second, 30)
        try:
            for n, user in enumerate(USERS):
                taken = [EventIn(at, f"i{at % (n + 1) + 1}", NOW + 60.0 * at) for at in range(n + 1)]
                plans = await both.plan(PlanRequest(version, NOW, [UserEvents(user, taken)]))
                keys, state = vectors(user, n + 1), vectors(user, 1)
                write = UserWrite(user, plans.users[0].version, taken, keys, state)
                await both.write(WriteRequest(version, NOW, [write]))
            return (
                await both.retrieve(asked),
                await one.retrieve(asked),
                await both.retrieve(structs.replace(asked, now=b"")),
            )
        finally:
            await both.close()
            await one.close()

    whole, wanted, plain = (found.retrieved for found in go(ask()))
    for name in Entries.COLUMNS:
        assert np.array_equal(getattr(whole.own, name), getattr(wanted.own, name)), name
    assert whole.habits.shape == (*whole.own.item.shape, len(FEATURES))
    assert np.array_equal(whole.habits, wanted.habits)
    assert np.array_equal(whole.present, wanted.present)
    assert whole.present.any()
    assert (plain.habits.shape, plain.present.shape) == ((*plain.own.item.shape, 0), (len(USERS) + 1, 0))


@pytest.fixture
def process(run, valkey_url):
    """Starts replicas as processes of their own; gives the process and the URL of each."""
    started: list[subprocess.Popen] = []

    def start() -> tuple[subprocess.Popen, str]:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        words = ["--run", str(run), "--port", str(port), "--redis-url", valkey_url]
        told = {"RAMREC_MEMORY_COLLECTIVE_USERS": "1", "RAMREC_MEMORY_PATIENCE_S": "3"}
        started.append(
            subprocess.Popen([sys.executable, "-m", "memory_service", *words], cwd=ROOT, env=os.environ | told)
        )
        return started[-1], url

    yield start
    for one in started:
        one.kill()
        one.wait(30)


def answers_at(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


def test_a_replica_that_is_told_to_stop_answers_until_callers_ask_others(run, process, stack):
    (stays, staying), (goes, going) = process(), process()
    until(lambda: answers_at(staying) and answers_at(going) and all_ready(staying, going))
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=f"{going},{staying}"))))
    api = stack.enter_context(httpx2.Client(base_url=url, timeout=60))
    for user in USERS:
        take(api, *history(user))
    until(lambda: entries_at(going) == entries_at(staying) == 7 * len(USERS))  # all but those made before any item
    before = answers(api)
    goes.send_signal(signal.SIGTERM)
    while goes.poll() is None:
        assert answers(api) == before
    assert goes.returncode == 0
    assert all_ready(staying)
    assert answers(api) == before
    stays.send_signal(signal.SIGTERM)  # the last one stops at once
    assert stays.wait(30) == 0


def test_who_was_forgotten_while_a_replica_hung_does_not_live_on_in_it(run, process, go):
    """A forget waits for a replica that hangs until it counts as gone; once awake that gives nothing of the user."""
    (_, awake), (hangs, hanging) = process(), process()
    until(lambda: answers_at(awake) and answers_at(hanging) and all_ready(awake, hanging))
    version, (query,) = load_checkpoint(run).version, np.frombuffer(vectors("stays", 1), "<f4").reshape(1, -1)
    asked = RetrieveRequest(version, [""], query_rows=b"\0\0\0\0", queries=query.tobytes())

    async def scenario():
        one, other, both = MemoryClient(awake, 5), MemoryClient(hanging, 5), MemoryReplicas(awake, 0.5)
        try:
            taken = [EventIn(at, f"i{at + 1}", NOW + at) for at in range(4)]
            plans = await one.plan(PlanRequest(version, NOW, [UserEvents("goes", taken)]))
            write = UserWrite("goes", plans.users[0].version, taken, vectors("goes", 4), vectors("goes", 1))
            await one.write(WriteRequest(version, NOW, [write]))
            while not (await other.retrieve(asked)).retrieved.collective.valid.any():
                await asyncio.sleep(0.01)
            hangs.send_signal(signal.SIGSTOP)
            with pytest.raises(MemoryUnavailable, match="not confirmed by every replica"):
                await both.forget("goes")
            while hanging in (await one.replicas()).replicas:
                await asyncio.sleep(0.05)
            await both.forget("goes")  # nobody waits any more
            hangs.send_signal(signal.SIGCONT)
            seen = []
            while not seen or seen[-1].degraded:
                try:
                    seen.append(await other.retrieve(asked))
                except MemoryUnavailable:
                    continue
            return seen
        finally:
            for client in (one, other, both):
                await client.close()

    seen = go(scenario())
    assert not any(one.retrieved.collective.valid.any() for one in seen)
    assert shown(hanging, "ramrec_memory_lapses_total") == 1


def test_a_replica_that_hangs_is_given_up_for_another(run, process, go):
    (_, awake), (hangs, hanging) = process(), process()
    until(lambda: answers_at(awake) and answers_at(hanging) and all_ready(awake, hanging))
    version = load_checkpoint(run).version

    async def scenario():
        patient = MemoryReplicas(awake, timeout_s=600)
        try:
            await patient.ready()
            users = [user for user in USERS if patient.replica_of(user) == hanging]
            hangs.send_signal(signal.SIGSTOP)
            return [await patient.retrieve(RetrieveRequest(version, [user])) for user in users]
        finally:
            hangs.send_signal(signal.SIGCONT)
            await patient.close()

    found = go(scenario())
    assert found
    assert not any(one.degraded for one in found)


def test_a_primary_whose_replica_hangs_does_not_acknowledge_and_one_without_replica_does(run, tmp_path, stack):
    cluster = stack.enter_context(redis_cluster(tmp_path / "redis"))
    replicas = Replicas(run, cluster.url, stack)
    replicas.add()
    api = replicas.api()
    user = next(f"u{n}" for n in range(100) if slot_of(f"u{n}") < SLOTS // 3)  # of the first primary
    events = [{"user_id": user, "item_id": f"i{n}", "timestamp": NOW + n} for n in range(1, 6)]
    take(api, events[0])
    replica = cluster.primaries  # of the first primary
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


def test_slots_that_move_between_primaries_are_followed(run, tmp_path, stack):
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
        told = take(api, {"user_id": "u", "item_id": "i2", "timestamp": NOW + 1})  # asked for (ASK), not moved yet
        assert told["versions"] == {"u": 2}
        for n in (target, source, 3 - source - target):
            cluster.client(n).execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        told = take(api, {"user_id": "u", "item_id": "i3", "timestamp": NOW + 2})  # moved (MOVED)
        assert told["versions"] == {"u": 3}
        assert api.post("/recommend", json={"user_id": "u"}).json()["memory"]["version"] == 3
        assert kept(cluster.url, ["u"])["u"] == ["i1", "i2", "i3"]
