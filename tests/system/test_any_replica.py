"""Any number of memory replicas behind one api: they answer like a single one, and any of them may join or leave."""

import httpx2
import numpy as np
import pytest

from api.http.app import create_app as create_api
from api.jobs.reembed import reembed
from api.memory.client import MemoryClient
from api.memory.members import Members
from api.memory.replicas import MemoryReplicas
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.question import Question
from memory_service.protocol.structs import (
    EventIn,
    PlanRequest,
    ReplicasReply,
    UserEvents,
    UserWrite,
    WriteRequest,
)
from memory_service.settings import MemorySettings
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import RulesConfig
from model.memory.habits import FEATURES
from model.memory.retrieval import Entries
from tests.conftest import served
from tests.memory_service.calling import vectors
from tests.redis_cluster import until
from tests.replicas import NOW, USERS, Replicas, answers, history, metric, take
from tests.synthetic import habitual_config, random_checkpoint


@pytest.fixture
def alone(run, valkey_url, stack):
    """An api over a single memory service, which gets the same events in another database."""
    settings = MemorySettings(run=run, redis_url=f"{valkey_url}?db=1", collective_users=2)
    memory = stack.enter_context(served(create_memory(settings)))
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory))))
    client = stack.enter_context(httpx2.Client(base_url=url, timeout=60))
    client.memory_url = memory
    return client


def test_replicas_answer_like_a_single_one(run, valkey_url, stack, alone):
    replicas = Replicas(run, valkey_url, stack, collective_users=2)
    first, *_ = (replicas.add() for _ in range(3))
    replicas.settle()
    api = replicas.api(first)  # it learns of the others from the first
    for user in USERS:
        assert take(api, *history(user))["accepted"] == take(alone, *history(user))["accepted"] == 8
    wanted = answers(alone)
    assert any("rare" in item for answer in wanted for item in answer["items"])
    assert not any("only" in item for answer in wanted for item in answer["items"])
    until(lambda: answers(api) == wanted)
    retrieved = [metric(url, "ramrec_memory_users_retrieved_total") for url in replicas.opened]
    assert all(retrieved), "every replica must have taken part"

    stays, goes, comes = USERS[0], USERS[4], USERS[5]
    for client in (alone, api):  # a forgotten user is forgotten by all; the rare item has one holder less
        assert client.delete(f"/users/{goes}/memory").json()["existed"]
        assert client.get(f"/users/{goes}/memory").status_code == 404
        take(client, {"user_id": comes, "item_id": "i30", "timestamp": NOW + 10_000})
        assert client.get(f"/users/{stays}/memory").status_code == 200
    assert not any(item == "rare 4" for answer in answers(api) for item in answer["items"]), "gone at once"
    until(lambda: answers(api) == answers(alone))

    replicas.add()
    replicas.settle()
    until(lambda: answers(api) == answers(alone))
    until(lambda: metric(first, "ramrec_memory_replicas") == 4)
    wanted = answers(alone)
    replicas.remove(first)  # the only seed of the api crashes
    for _ in range(5):
        assert answers(api) == wanted, "another replica answers, completely"
    replicas.settle()
    assert answers(api) == wanted


def test_a_replica_that_joins_takes_over_few_users_and_the_others_stay():
    """Rendezvous hashing: a fourth replica takes over a quarter of the users, evenly from the three."""

    def first_choices(urls: list[str]) -> list[str]:
        members = Members(["http://seed"])
        members.adopt(ReplicasReply("", dict.fromkeys(urls, True)))
        return [members.order(f"user {n}")[0] for n in range(4000)]

    urls = [f"http://10.0.0.{n}:8001" for n in range(4)]
    three, four = first_choices(urls[:3]), first_choices(urls)
    moved = [after for before, after in zip(three, four, strict=True) if before != after]
    assert set(moved) == {urls[3]}
    assert [four.count(url) for url in urls] == pytest.approx([1000] * 4, rel=0.1)


def test_replicas_notice_what_another_process_does_to_redis(run, valkey_url, stack, go):
    replicas = Replicas(run, valkey_url, stack)
    replicas.add(), replicas.add()
    replicas.settle()
    api = replicas.api()
    take(api, *history(USERS[0]), *history(USERS[1]))
    store = Store(valkey_url, RulesConfig(capacity=10), 5)
    until(lambda: any(answer["memory"]["collective"]["retrieved"] for answer in answers(api)[: len(USERS)]))
    go(store.forget(USERS[0], NOW + 10_000.0))
    go(store.forget(USERS[1], NOW + 10_000.0))  # no replica is told
    request = {"sequence": ["i1", "i5"], "scopes": ["collective"]}
    until(lambda: not api.post("/recommend", json=request).json()["memory"]["collective"]["retrieved"])
    go(store.close())


def test_replicas_move_to_another_model_like_a_single_one(run, valkey_url, stack, alone, tmp_path):
    replicas = Replicas(run, valkey_url, stack, collective_users=2)
    replicas.add(), replicas.add()
    replicas.settle()
    api = replicas.api()
    other = tmp_path / "other"
    save_checkpoint(other, random_checkpoint(seed=1))
    version = load_checkpoint(other).version
    for client in (alone, api):
        take(client, *(event for user in USERS for event in history(user)))
        assert client.post("/model/reload", json={"run": str(other)}).status_code == 200
        assert reembed(other, client.memory_url) == len(USERS)
        until(lambda client=client: client.get("/model").json()["model_version"] == version)
    until(lambda: answers(api) == answers(alone))


def test_replicas_retrieve_by_habits_like_a_single_one(valkey_url, stack, tmp_path, go):
    """Banks have different sizes, and some items are taken at the time of the request."""
    save_checkpoint(tmp_path, random_checkpoint(habitual_config()))
    version = load_checkpoint(tmp_path).version
    replicas = Replicas(tmp_path, valkey_url, stack, collective_users=2)
    first, second = replicas.add(), replicas.add()
    replicas.settle()
    names, times = [*USERS, "nobody"], NOW + 60.0 * np.arange(len(USERS))
    uncounted = np.ones(len(names), bool)

    async def ask():
        both, single = MemoryReplicas(first, 30), MemoryClient(second, 30)
        try:
            for n, user in enumerate(USERS):
                events = [EventIn(at, f"i{at % (n + 1) + 1}", NOW + 60.0 * at) for at in range(n + 1)]
                plan = (await both.plan(PlanRequest(version, NOW, [UserEvents(user, events)]))).users[0]
                write = UserWrite(user, plan.version, events, vectors(user, n + 1), vectors(user, 1))
                await both.write(WriteRequest(version, NOW, [write]))
            timed = Question(version, names, now=np.append(times, NOW), uncounted=uncounted)
            untimed = Question(version, names, uncounted=uncounted)
            return await both.retrieve(timed), await single.retrieve(timed), await both.retrieve(untimed)
        finally:
            await both.close()
            await single.close()

    found, wanted, untimed = (answer.retrieved for answer in go(ask()))
    for name in Entries.COLUMNS:
        assert np.array_equal(getattr(found.own, name), getattr(wanted.own, name)), name
    assert found.habits.shape == (*found.own.item.shape, len(FEATURES))
    assert np.array_equal(found.habits, wanted.habits)
    assert np.array_equal(found.present, wanted.present)
    assert found.present.any()
    assert (untimed.habits.shape, untimed.present.shape) == ((*untimed.own.item.shape, 0), (len(names), 0))
