"""The memory service keeps its bounds: calls under way, users in a call, idle banks, other processes' changes."""

import asyncio
import time

import httpx2
import msgspec
import numpy as np
import redis

from memory_service.http.app import create_app
from memory_service.http.metrics import Distribution
from memory_service.protocol.bounds import USERS_PER_CALL
from memory_service.protocol.hash_slots import user_key
from memory_service.protocol.structs import Problem, RetrieveRequest, UserEvents
from memory_service.service.service import MemoryService
from memory_service.settings import MemorySettings
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint
from tests.memory_service.calling import NOW, Caller, ask, column, opened, remember, retrieved, service, took
from tests.memory_service.index.test_collective_scope import others


def test_calls_beyond_the_queue_are_turned_away_and_the_others_answered(run, valkey_url, go):
    """Sixteen plans at once where two may be under way."""
    app = create_app(MemorySettings(run=run, redis_url=valkey_url, queue_ingest=2))
    version = load_checkpoint(run).version

    async def many():
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://memory") as client:
            body = {"model_version": version, "received_at": NOW, "users": [{"user_id": "u", "events": []}]}
            plans = [client.post("/v1/plan", content=msgspec.msgpack.encode(body)) for _ in range(16)]
            answers = await asyncio.gather(*plans)
            metrics = (await client.get("/metrics")).text
        await app.state.service.close()
        return answers, metrics

    answers, metrics = go(many())
    refused = [one for one in answers if one.status_code == 429]
    assert {one.status_code for one in answers} == {200, 429}
    assert len(refused) == 14
    assert refused[0].headers["Retry-After"] == "1"
    assert msgspec.msgpack.decode(refused[0].content, type=Problem).code == "queue_full"
    assert 'route="/v1/plan",status="429"} 14.0' in metrics


def test_a_call_names_so_many_users_at_most(caller):
    names = [f"u{n}" for n in range(USERS_PER_CALL + 1)]
    problem = caller.call("/v1/retrieve", RetrieveRequest(caller.model_version, names), Problem, status=422)
    assert f"at most {USERS_PER_CALL}" in problem.detail
    assert len(column(caller.retrieve(*names[:-1]).known, "u1")) == USERS_PER_CALL


def test_idle_banks_expire_and_their_versions_never_come_back(run, valkey_url, stack):
    idle = opened(run, valkey_url, idle_days=2)
    caller = Caller(stack.enter_context(idle), load_checkpoint(run).version)
    caller.remember("u", took(0, "i1"))
    version = caller.remember("u", took(1, "i2")).users[0].version
    with redis.Redis.from_url(valkey_url) as client:
        assert 2 * 86400 - 60 < client.ttl(user_key("u")) <= 2 * 86400
        client.pexpire(user_key("u"), 1)
        while client.exists(user_key("u")):
            pass
    assert column(caller.retrieve("u").known, "u1") == [0]
    assert caller.remember("u", took(2, "i3")).users[0].version > version
    assert [entry.item for entry in caller.inspect("u").entries] == [3]


def test_banks_are_kept_for_good_unless_told_otherwise(caller, valkey_url):
    caller.remember("u", took(0, "i1"))
    with redis.Redis.from_url(valkey_url) as client:
        assert client.ttl(user_key("u")) == -1


def test_comparing_with_redis_finds_what_others_wrote_forgot_or_let_expire(run, valkey_url, go):
    """Without any of these users being asked about here."""

    async def compared():
        here, other = service(run, valkey_url), service(run, valkey_url)
        for user in ("a", "b", "c"):
            await remember(other, user, took(0, "i1"), took(1, "i2"))
        await here.start()
        before = others(await _everybody(here))
        await remember(other, "a", took(2, "i7"))
        await other.forget("b")
        await other.store.redis.send([("DEL", user_key("c"))])  # as if expired
        await here.compare()
        after = others(await _everybody(here))
        for one in (here, other):
            await one.close()
        return before, after

    before, after = go(compared())
    assert sorted(before) == [2, 2, 2]  # an entry made before any item is not shared
    assert sorted(after) == [2, 7]


async def _everybody(of: MemoryService):
    query = np.ones(of.serving.dim, "<f4") / np.sqrt(of.serving.dim)
    asked = RetrieveRequest(of.model_version, ["x"], query_rows=b"\0\0\0\0", queries=query.astype("<f4").tobytes())
    return await retrieved(of, asked)


def test_banks_read_at_start_answer_without_being_read_again(run, valkey_url, go):
    class Counting(Store):
        loaded = 0

        async def look(self, check, load=(), tombstones=(), **more):
            self.loaded += len(load)
            return await super().look(check, load, tombstones, **more)

    async def started():
        writer = service(run, valkey_url)
        await remember(writer, "u", took(0, "i1"))
        await writer.close()
        here = service(run, valkey_url, Counting)
        await here.start()
        at_start = here.store.loaded
        reply = await ask(here, "u")
        await here.close()
        return at_start, here.store.loaded, reply

    at_start, after, reply = go(started())
    assert (at_start, after) == (1, 1)
    assert column(reply.known, "u1") == [1]


def test_a_damaged_record_is_unknown_and_marked_for_readers_and_refused_to_writers(caller, valkey_url):
    caller.remember("good", took(0, "i1"))
    caller.remember("bad", took(0, "i2"))
    with redis.Redis.from_url(valkey_url) as client:
        before = client.get(user_key("bad"))
        damaged = before[:8] + (9).to_bytes(8, "little") + before[16:]
        client.set(user_key("bad"), damaged)
    reply = caller.retrieve("good", "bad")
    assert (reply.degraded, column(reply.known, "u1")) == (True, [1, 0])
    events = [UserEvents("bad", [took(5, "i5")])]
    response = caller.client.post(
        "/v1/plan",
        content=msgspec.msgpack.encode({"model_version": caller.model_version, "received_at": NOW, "users": events}),
    )
    assert response.status_code == 500
    assert "user 'bad': the record is damaged" in msgspec.msgpack.decode(response.content)["detail"]
    with redis.Redis.from_url(valkey_url) as client:
        assert client.get(user_key("bad")) == damaged


def test_a_distribution_is_a_histogram_of_arrays():
    seen = Distribution("k", "about", (1, 2, 5))
    seen.observe(np.array([0, 1, 1.5, 2, 5, 9]))
    (family,) = seen.collect()
    counts = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "k_bucket"}
    assert counts == {"1.0": 2, "2.0": 4, "5.0": 5, "+Inf": 6}
    assert {s.name: s.value for s in family.samples if s.name != "k_bucket"} == {"k_count": 6, "k_sum": 18.5}


def test_writes_of_many_callers_at_once_all_arrive(run, valkey_url, go):
    """Merged calls, several for the same user: every event is written once, versions count the writes."""

    async def crowd():
        here = service(run, valkey_url)
        await here.start()
        users = [f"u{n % 5}" for n in range(40)]
        outcomes = await asyncio.gather(*(_try(here, user, n) for n, user in enumerate(users)))
        known = {user: await here.inspect(user) for user in set(users)}
        await here.close()
        return outcomes, known

    outcomes, known = go(crowd())
    assert all(outcomes)
    for memory in known.values():
        assert memory.events == memory.version == 8
        assert len({when for _, when in memory.log}) == 8


async def _try(of: MemoryService, user: str, n: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        await remember(of, user, took(n, f"i{n % 30 + 1}"))
        memory = await of.inspect(user)
        if memory is not None and NOW + n in {when for _, when in memory.log}:
            return True
    return False
