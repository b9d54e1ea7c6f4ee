"""Freshness: residents and records are brought to what Redis has."""

import pytest

from memory_service.protocol.hash_slots import user_key
from memory_service.service.freshness import CachedUsers
from memory_service.service.recent import RecentRecords
from tests.memory_service.calling import remember, service, took


@pytest.fixture
def pair(run, valkey_url, go):
    """Two started memory services over one Redis."""
    both = service(run, valkey_url), service(run, valkey_url)
    for one in both:
        go(one.start())
    yield both
    for one in both:
        go(one.close())


def versions(of, *users: str) -> list[int]:
    residents = of.serving.residents
    return residents.version[residents.slots(users)].tolist()


def test_residents_become_what_redis_has(pair, go):
    here, other = pair

    async def story():
        await remember(other, "a", took(0, "i1"))
        await remember(other, "b", took(0, "i2"))
        assert not await here._freshness.refresh(here.serving, ["a", "b", "nobody", "", "a"])
        assert versions(here, "a", "b", "nobody") == [1, 1, 0]
        await remember(other, "a", took(1, "i3"))
        await other.store.redis.send([("DEL", user_key("b"))])
        assert not await here._freshness.refresh(here.serving, ["a", "b"])
        assert versions(here, "a", "b") == [2, 0]

    go(story())


def test_a_damaged_record_makes_the_look_partial(pair, go):
    here, other = pair

    async def story():
        await remember(other, "a", took(0, "i1"))
        await other.store.redis.send([("SET", user_key("a"), b"x" * 100)])
        return await here._freshness.refresh(here.serving, ["a"])

    assert go(story())
    assert versions(here, "a") == [0]


def test_a_recent_record_is_read_again_only_if_it_changed(pair, go):
    here, other = pair

    async def story():
        await remember(here, "a", took(0, "i1"))
        first, again = [(await here._freshness.read({"a": here.serving}))["a"] for _ in range(2)]
        await remember(other, "a", took(1, "i2"))
        changed = (await here._freshness.read({"a": here.serving}))["a"]
        await other.forget("a")
        gone = (await here._freshness.read({"a": here.serving}))["a"]
        return first, again, changed, gone

    first, again, changed, gone = go(story())
    assert first is again
    assert (first.record.version, changed.record.version, changed.plan) == (1, 2, None)
    assert (gone.record.version, gone.tombstone.version) == (0, 2)


def test_watchers_hear_whom_others_change(pair):
    cached = CachedUsers(pair[0].models, RecentRecords())
    with cached.watching() as outer:
        cached.note_changed(["a"])
        with cached.watching() as inner:
            cached.drop(["b"])
        cached.note_changed(["c"])
    cached.note_changed(["d"])
    assert (outer, inner) == ({"a", "b", "c"}, {"b"})
