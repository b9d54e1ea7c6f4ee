"""Outages of Redis: calls fail at once while it lasts, and it ends by itself."""

import asyncio

import pytest

from memory_service.service import outage as module
from memory_service.service.outage import Outage
from memory_service.store.redis.errors import ShardUnavailable, StoreUnavailable


class Redis:
    """Answers pings while it is up."""

    def __init__(self) -> None:
        self.is_up, self.pings = True, 0

    async def ping(self) -> None:
        self.pings += 1
        if not self.is_up:
            raise StoreUnavailable("gone")


def fail(outage: Outage, error: Exception) -> None:
    with pytest.raises(type(error)), outage.guard():
        raise error


def test_after_one_failure_calls_fail_at_once_until_redis_answers(go, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.001)

    async def story() -> None:
        redis = Redis()
        outage, redis.is_up = Outage(redis.ping), False
        fail(outage, StoreUnavailable("gone"))
        assert outage.is_on
        with pytest.raises(StoreUnavailable, match="out of reach"), outage.guard():
            raise AssertionError("Redis is not called")
        redis.is_up = True
        while outage.is_on:
            await asyncio.sleep(0.001)
        with outage.guard():
            pass

    go(story())


def test_a_check_calls_redis_all_the_same_and_ends_the_outage(go):
    async def story() -> None:
        redis = Redis()
        outage, redis.is_up = Outage(redis.ping), False
        with pytest.raises(StoreUnavailable):
            await outage.check()
        assert outage.is_on
        redis.is_up = True
        await outage.check()
        assert not outage.is_on
        await outage.close()

    go(story())


def test_a_lost_shard_and_other_errors_are_no_outage(go):
    async def story() -> None:
        outage = Outage(Redis().ping)
        fail(outage, ShardUnavailable("one of three"))
        fail(outage, KeyError("x"))
        assert not outage.is_on

    go(story())


def test_closing_ends_the_search(go, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.001)

    async def story() -> None:
        redis = Redis()
        outage, redis.is_up = Outage(redis.ping), False
        fail(outage, StoreUnavailable("gone"))
        await outage.close()
        before = redis.pings
        await asyncio.sleep(0.01)
        assert redis.pings == before

    go(story())
