"""Calls through two memory replicas at the same time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import redis

from memory_service.protocol.structs import (
    EventIn,
)
from tests.memory_service.calling import column
from tests.memory_service.plain_memory import (
    ITEMS,
    USERS,
)
from tests.memory_service.replica import Replica


def taken(user: str, *items: int, since: float = 1e9) -> list[EventIn]:
    """Events of one request, a second apart."""
    return [EventIn(n, ITEMS[user][item], since + n) for n, item in enumerate(items)]


def test_writers_through_both_replicas_at_once_lose_nothing(pair, go):
    requests = [taken("ann", n % 6, (n + 1) % 6, since=1e9 + 10 * n) for n in range(16)]

    async def together():
        calls = [pair[n % 2].ingest("ann", events, 1e9, tries=40) for n, events in enumerate(requests)]
        return await asyncio.gather(*calls), await pair[0].inspect("ann")

    written, memory = go(together())
    assert [one.accepted for one in written] == [[0, 1]] * len(requests)
    assert sorted(one.version for one in written) == list(range(1, len(requests) + 1))
    assert [when for _, when in memory.log] == sorted(event.timestamp for events in requests for event in events)
    assert (memory.version, memory.events) == (len(requests), 2 * len(requests))


def test_one_request_sent_many_times_at_once_is_kept_once(pair, go):
    events = taken("ann", 0, 1, 2)

    async def together():
        calls = [pair[n % 2].ingest("ann", events, 1e9, tries=40) for n in range(10)]
        return await asyncio.gather(*calls), await pair[1].inspect("ann")

    written, memory = go(together())
    assert Counter(len(one.accepted) for one in written) == {3: 1, 0: 9}
    assert Counter(len(one.duplicates) for one in written) == {3: 9, 0: 1}
    assert (memory.version, [entry.frequency for entry in memory.entries]) == (1, [1, 1, 1])


def test_readers_of_both_replicas_never_see_less_than_was_acknowledged(pair, go):
    acknowledged, done = 0, False

    async def writer():
        nonlocal acknowledged, done
        for n in range(30):
            acknowledged = (await pair[n % 2].ingest("ann", taken("ann", n % 6, since=1e9 + n), 1e9)).version
        done = True

    async def reader(replica: Replica, users: Sequence[str]):
        last = 0
        while not done:
            least = max(last, acknowledged)
            last = column((await replica.retrieve(users)).versions, "<i8")[0]
            assert last >= least

    async def together():
        for user in USERS[1:]:  # more than the second replica may keep
            await pair[0].ingest(user, taken(user, 0), 1e9)
        readers = [reader(replica, ["ann", *more]) for replica in pair for more in ((), USERS[1:])]
        await asyncio.gather(writer(), *readers)

    go(together())
    assert acknowledged == 30


def test_a_retrieval_is_counted_once_whoever_writes_next(pair, go):
    async def story():
        await pair[0].ingest("ann", taken("ann", 0), 1e9)
        for replica in (pair[0], pair[1], pair[1]):
            await replica.retrieve(["ann"], counted=True)
        for n in range(6):
            await pair[n // 2 % 2].ingest("ann", taken("ann", 1, since=2e9 + n), 2e9)
        return await pair[0].inspect("ann")

    assert [entry.access for entry in go(story()).entries] == [3, 0]


def test_a_redis_that_lost_its_last_second_does_not_leave_the_replicas_at_odds(pair, go, valkey_url):
    """What comes after the loss has the version of what was lost, and is not it."""
    here, there = pair

    async def story():
        await here.ingest("ann", taken("ann", 0, 1), 1e9)
        with redis.Redis.from_url(valkey_url) as raw:
            (key,) = (key for key in raw.scan_iter() if b"ann" in key)
            kept = raw.get(key)
            await there.ingest("ann", taken("ann", 2, since=2e9), 2e9)
            raw.set(key, kept)
        await here.ingest("ann", taken("ann", 3, since=3e9), 3e9)
        return (
            await here.retrieve(["ann"]),
            await there.retrieve(["ann"]),
            await here.others(""),
            await there.others(""),
        )

    one, other, others_here, others_there = go(story())
    assert (one.seen, one.own.item) == (other.seen, other.own.item)
    assert others_here == others_there
