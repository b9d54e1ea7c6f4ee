"""Users' records and tombstones in Redis."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from memory_service.protocol.hash_slots import ALL_SLOTS, slot_of, user_key, user_of
from memory_service.store import scripts
from memory_service.store.keys import RECORDS, SECRET, records_of, tombstone_key
from memory_service.store.record import (
    CHECKSUM,
    MODEL,
    STAMP,
    RecordError,
    model_of,
    pack_record,
    stamp_bytes,
    unpack_record,
)
from memory_service.store.redis.adapter import Command
from memory_service.store.redis.connect import Connector
from memory_service.store.redis.connection import RedisConnection
from model.config import RulesConfig
from model.memory.record import UserRecord

TOMBSTONE_S = 30 * 86400
"""How long a tombstone is kept."""
TOMBSTONE = struct.Struct("<dQ")
COMMIT_USERS = 64
"""Records that one script call stores. Redis serves nobody else meanwhile, for about half a millisecond."""
NO_STAMP = bytes(STAMP.size)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tombstone:
    """What is left of a forgotten user: events up to `time` stay forgotten; a new record continues after `version`."""

    time: float
    version: int


@dataclass(frozen=True)
class Look:
    """What one round trip has found, in the order asked.

    Attributes:
        stamps: 0 where there is no record.
        records: packed; None where there is none.
        tombstones: None where there is none.
        lost: users whose records are out of reach.
    """

    stamps: list[int]
    records: list[bytes | None]
    tombstones: list[Tombstone | None]
    lost: Collection[str] = ()


class UserRecords:
    """Reads and writes records and tombstones; a part of `Store`. All methods raise StoreUnavailable.

    Args:
        redis: connection.
        rules: layout of the banks that are read.
        idle_s: records expire this many seconds after their last write (0: never).
    """

    def __init__(self, redis: Connector, rules: RulesConfig, idle_s: int) -> None:
        self.redis, self.rules, self.idle_s = redis, rules, idle_s
        self.rules_of: dict[str, RulesConfig] = {}
        """Layouts for the banks of these model versions, instead of `rules`."""
        self._secret = b""

    # --------------------------------------------------------------------------------------------- read

    async def look(
        self, check: Sequence[str], load: Sequence[str] = (), tombstones: Sequence[str] = (), *, partly: bool = False
    ) -> Look:
        """Stamps of the users `check`, records of `load`, tombstones of `tombstones`, in one round trip.

        With `partly`, users whose records are out of reach are named as `lost`, instead of a ShardUnavailable raised.
        """
        connection = await self.redis.connection()
        stamps = Reads(connection, [user_key(user) for user in check], _stamp, _stamps)
        records = Reads(connection, [user_key(user) for user in load], _get, _mget)
        tombs = Reads(connection, [await self._tombstone_key(user) for user in tombstones], _get, _mget)
        found = await self.redis.send(stamps.commands + records.commands + tombs.commands, partly=partly)
        seen, loaded, kept = stamps.take(found), records.take(found), tombs.take(found)
        lost = {u for u, data in zip([*check, *load], [*seen, *loaded], strict=True) if isinstance(data, Exception)}
        packed = b"".join(NO_STAMP if isinstance(data, Exception) else data or NO_STAMP for data in seen)
        return Look(
            [version << 32 | checksum for version, checksum in STAMP.iter_unpack(packed)],
            [None if isinstance(data, Exception) else data for data in loaded],
            [_tombstone(data) for data in kept],
            lost,
        )

    async def stamps(self, users: Sequence[str]) -> list[int]:
        """Stamp of each user's record, 0 where there is none. One round trip."""
        return (await self.look(users)).stamps

    async def load(self, users: Sequence[str]) -> dict[str, UserRecord | None]:
        """Records, None where there is none. One round trip. Raises RecordError for damaged ones."""
        return self.unpack(users, (await self.look((), users)).records)

    async def load_packed(self, users: Sequence[str]) -> list[bytes | None]:
        """Records as bytes, None where there is none. One round trip."""
        return (await self.look((), users)).records

    async def load_readable(self, users: Sequence[str]) -> dict[str, UserRecord]:
        """The records that exist and are undamaged; damaged ones are logged. One round trip."""
        return self.readable(users, (await self.look((), users)).records)

    async def tombstones(self, users: Sequence[str]) -> list[Tombstone | None]:
        """Tombstones, None where there is none. One round trip."""
        return (await self.look((), (), users)).tombstones

    async def models(self, users: Sequence[str]) -> list[str]:
        """Model version of each user's record, "" where there is none. One round trip."""
        found = await self.redis.send([("GETRANGE", user_key(user), MODEL.start, MODEL.stop - 1) for user in users])
        return [model_of(data) for data in found]

    def unpack(self, users: Sequence[str], found: Sequence[bytes | None]) -> dict[str, UserRecord | None]:
        """Packed records of these users, unpacked. Raises RecordError for a damaged one."""
        records: dict[str, UserRecord | None] = {}
        for user, data in zip(users, found, strict=True):
            try:
                records[user] = None if data is None else self._unpacked(data)
            except RecordError as error:
                raise RecordError(f"user {user!r}: {error}") from error
        return records

    def readable(self, users: Collection[str], found: Sequence[bytes | None]) -> dict[str, UserRecord]:
        """Packed records of these users, unpacked; a damaged one is logged and left out."""
        records = {}
        for user, data in zip(users, found, strict=True):
            try:
                if data is not None:
                    records[user] = self._unpacked(data)
            except RecordError as error:
                log.error("left out: a damaged record: %s", error)
                log.debug("the damaged record is %s", user_key(user))
        return records

    def _unpacked(self, data: bytes) -> UserRecord:
        return unpack_record(data, self.rules_of.get(model_of(data[MODEL]), self.rules))

    # -------------------------------------------------------------------------------------------- write

    async def commit(self, writes: Sequence[tuple[str, int, UserRecord]]) -> list[UserRecord | None]:
        """Store records (user, stamp of the record that it was computed from, new record). One round trip.

        Returns:
            Each record as stored, or None where the stored record is no longer the one that it was computed from.
        """
        packed = [pack_record(record) for _, _, record in writes]
        groups = (await self.redis.connection()).grouped([user_key(user) for user, _, _ in writes])
        groups = [group[at : at + COMMIT_USERS] for group in groups for at in range(0, len(group), COMMIT_USERS)]
        commands: list[Command] = []
        for group in groups:
            args: list[bytes | int] = [self.idle_s]
            for n in group:
                args += [stamp_bytes(writes[n][1]), packed[n]]
            commands.append(scripts.call(scripts.COMMIT, [user_key(writes[n][0]) for n in group], args))
        is_stored: dict[int, int] = {}
        for group, flags in zip(groups, await self.redis.send(commands, durable=True), strict=True):
            is_stored |= zip(group, flags, strict=True)
        return [
            replace(record, checksum=int.from_bytes(packed[n][CHECKSUM], "little")) if is_stored[n] else None
            for n, (_, _, record) in enumerate(writes)
        ]

    async def forget(self, user: str, now: float) -> bool:
        """Delete a user's record and leave a tombstone; returns whether there was a record. Idempotent.

        The tombstone comes first: after a crash in between, the user counts as forgotten, not as unknown.
        """
        while True:
            look = await self.look([user], (), [user])
            (stamp,), (old,) = look.stamps, look.tombstones
            version = stamp >> 32
            if version == 0 and old is None:
                return False
            tombstone = TOMBSTONE.pack(max(now, old.time if old else 0.0), max(version, old.version if old else 0))
            await self.redis.send(
                [("SET", await self._tombstone_key(user), tombstone, "EX", TOMBSTONE_S)], durable=True
            )
            deletion = scripts.call(scripts.FORGET, [user_key(user)], [stamp_bytes(stamp)])
            if (await self.redis.send([deletion], durable=True))[0]:
                return version > 0

    async def _tombstone_key(self, user: str) -> bytes:
        if not self._secret:
            await self.redis.send([("SET", SECRET, os.urandom(32), "NX")], durable=True)
            self._secret = (await self.redis.send([("GET", SECRET)]))[0]
        return tombstone_key(user, self._secret)

    # --------------------------------------------------------------------------------------------- walk

    async def all_users(self, batch: int) -> AsyncIterator[list[str]]:
        """Ids of all users who have a record, in batches; one may appear twice. Does not block Redis."""
        names: list[str] = []
        async for keys in (await self.redis.connection()).walk(RECORDS):
            names += map(user_of, keys)
            if len(names) >= batch:
                yield names
                names = []
        if names:
            yield names

    async def walk(self, cursor: int, count: int, slots: range = ALL_SLOTS) -> tuple[int, list[str]]:
        """One step of a walk through all users, about `count` of them; one may appear in several steps.

        Returns:
            The next cursor (0 at the end), and the users whose records are in these hash slots.
        """
        cursor, keys = await (await self.redis.connection()).scan(cursor, RECORDS, count)
        names = dict.fromkeys(map(user_of, keys))
        return cursor, [name for name in names if slots == ALL_SLOTS or slot_of(name) in slots]

    async def users(self, prefix: str, limit: int) -> list[str]:
        """User ids that begin with a prefix, sorted; any `limit` of them if there are more. Does not block Redis."""
        found: set[str] = set()
        async with aclosing((await self.redis.connection()).walk(records_of(prefix))) as steps:
            async for keys in steps:
                found.update(map(user_of, keys))
                if len(found) >= limit:
                    break
        return sorted(found)[:limit]


class Reads:
    """The fewest commands that read values of many keys: `one` reads a single key, `many` several of one group."""

    def __init__(
        self,
        connection: RedisConnection,
        keys: Sequence[bytes],
        one: Callable[[bytes], Command],
        many: Callable[[list[bytes]], Command],
    ) -> None:
        self._count, self._groups = len(keys), connection.grouped(keys)
        self.commands = [one(keys[g[0]]) if len(g) == 1 else many([keys[n] for n in g]) for g in self._groups]

    def take(self, answers: list[Any]) -> list[Any]:
        """Remove the answers to these commands from the front of the list; the values in the order of the keys."""
        values: list[Any] = [None] * self._count
        mine, answers[:] = answers[: len(self._groups)], answers[len(self._groups) :]
        for group, answer in zip(self._groups, mine, strict=True):
            for n, part in zip(group, _parts(answer, len(group)), strict=True):
                values[n] = part
        return values


def _parts(answer: Any, count: int) -> Sequence[Any]:
    """The values of `count` keys in one answer: a list, or stamps one after the other."""
    if count == 1 or isinstance(answer, Exception):
        return [answer] * count
    if isinstance(answer, list):
        return answer
    return [answer[at : at + STAMP.size] for at in range(0, len(answer), STAMP.size)]


def _stamp(key: bytes) -> Command:
    return ("GETRANGE", key, 8, 19)


def _stamps(keys: list[bytes]) -> Command:
    return scripts.call(scripts.STAMPS, keys)


def _get(key: bytes) -> Command:
    return ("GET", key)


def _mget(keys: list[bytes]) -> Command:
    return ("MGET", *keys)


def _tombstone(data: bytes | None) -> Tombstone | None:
    return None if data is None else Tombstone(*TOMBSTONE.unpack(data))
