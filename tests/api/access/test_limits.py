"""Requests per second of an API key, over several api processes."""

import asyncio
import logging
import os
from dataclasses import replace

import httpx2
import msgspec
import pytest
import redis

from api.access.keys import create_key, read_keys
from api.access.limits import ALONE_S, Limits
from api.http.app import create_app as create_api
from api.http.problems import RateLimited
from api.memory.client import MemoryClient
from api.settings import ApiSettings
from memory_service.protocol.structs import CONTENT_TYPE, QuotaReply, QuotaRequest
from tests.api.services import with_services
from tests.conftest import served


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A machine that is busy with other tests is no memory service out of reach."""
    monkeypatch.setattr("api.access.limits.PATIENCE_S", 30.0)


async def answered(limits: Limits, key, count: int) -> int:
    """How many of so many requests at once are let through."""

    async def one() -> bool:
        try:
            if not limits.take(key):
                await limits.more(key)
        except RateLimited:
            return False
        return True

    return sum(await asyncio.gather(*(one() for _ in range(count))))


def test_two_apis_together_stay_within_the_limit(run, memory_url, keys, stack):
    """Two apis, one memory service, one Redis; the clock stands still, then moves on."""
    secret = create_key(keys, "web", ("recommend",), 7)
    headers = {"Authorization": f"Bearer {secret}"}
    apis = [create_api(ApiSettings(run=run, memory_url=memory_url, keys=keys)) for _ in range(2)]
    now = 1000.25
    for app in apis:
        with_services(app, lambda one: replace(one, limits=Limits(one.engine.memory.quota, lambda: now)))
    urls = [stack.enter_context(served(app)) for app in apis]
    for _ in range(2):
        answers = [httpx2.post(f"{urls[n % 2]}/recommend", json={}, headers=headers) for n in range(12)]
        assert [answer.status_code for answer in answers] == [200] * 7 + [429] * 5
        assert answers[-1].json()["code"] == "rate_limited"
        assert answers[-1].headers["retry-after"] == "1"
        now += 1


@pytest.mark.parametrize(("limit", "apis"), [(1, 3), (10, 1), (95, 2), (1000, 3)])
def test_as_many_as_the_limit_says_are_let_through_at_once(go, memory_url, keys, limit, apis):
    create_key(keys, "web", ("recommend",), limit)
    (key,) = read_keys(keys)

    async def race() -> int:
        clients = [MemoryClient(memory_url, 5.0) for _ in range(apis)]
        sides = [Limits(client.quota, lambda: 5000.0) for client in clients]
        through = sum(await asyncio.gather(*(answered(side, key, limit) for side in sides)))
        for client in clients:
            await client.close()
        return through

    assert go(race()) == limit


def test_out_of_reach_each_process_grants_the_limit_by_itself(go, keys, caplog):
    create_key(keys, "web", ("recommend",), 20)
    (key,) = read_keys(keys)
    now = 1000.0

    async def alone() -> None:
        nonlocal now
        client = MemoryClient("http://127.0.0.1:9", 5.0)
        limits = Limits(client.quota, lambda: now)
        assert await answered(limits, key, 50) == 20
        now += ALONE_S
        assert await answered(limits, key, 50) == 20
        await client.close()

    with caplog.at_level(logging.WARNING):
        go(alone())
    assert caplog.text.count("not shared") == 1  # said once, not with every second


def test_after_an_outage_limits_are_shared_again(go, memory_url, keys, caplog):
    create_key(keys, "web", ("recommend",), 20)
    (key,) = read_keys(keys)
    now = 1000.0

    async def both() -> None:
        nonlocal now
        lost, found = MemoryClient("http://127.0.0.1:9", 5.0), MemoryClient(memory_url, 5.0)
        where = lost
        limits = Limits(lambda request: where.quota(request), lambda: now)
        assert await answered(limits, key, 30) == 20
        where = found
        now += ALONE_S
        assert await answered(Limits(found.quota, lambda: now), key, 15) == 15
        assert await answered(limits, key, 30) == 4  # portions of 2: the other side holds one more
        await lost.close()
        await found.close()

    with caplog.at_level(logging.WARNING):
        go(both())
    assert "shared again" in caplog.text


def test_redis_keeps_no_key_and_forgets_the_count(go, memory_url, valkey_url, keys):
    secret = create_key(keys, "web", ("recommend",), 20)
    (key,) = read_keys(keys)

    async def once() -> None:
        client = MemoryClient(memory_url, 5.0)
        assert await answered(Limits(client.quota, lambda: 1000.0), key, 1) == 1
        await client.close()

    go(once())
    with redis.Redis.from_url(valkey_url) as client:
        (name,) = client.keys("ramrec:quota:*")
        assert 0 < client.ttl(name) <= 60
        assert client.get(name) == b"2"
    assert not [word for word in (secret, key.sha256, "web") if word.encode() in name]


@pytest.mark.parametrize(
    "asked",
    [{"want": 0}, {"want": -1}, {"limit": 0}, {"second": -1}, {"key": "x"}, {"key": "*" * 32}, {"limit": 2**40}],
)
def test_odd_quotas_are_refused(memory_url, asked):
    body = {"key": os.urandom(16).hex(), "second": 1, "limit": 5, "want": 5}
    headers = {"Content-Type": CONTENT_TYPE}
    good = httpx2.post(f"{memory_url}/v1/quota", content=msgspec.msgpack.encode(body), headers=headers)
    assert msgspec.msgpack.decode(good.content, type=QuotaReply).granted == 5
    bad = httpx2.post(f"{memory_url}/v1/quota", content=msgspec.msgpack.encode(body | asked), headers=headers)
    assert bad.status_code == 400
    assert QuotaRequest(**body).want == 5
