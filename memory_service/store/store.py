"""Redis: every key and what it holds. The truth; everything else in this service is a cache of it.

    ramrec:{USER}                     one user's record (`memory_service.store.record`)
    ramrec:forgotten:HASH             tombstone of a forgotten user: time f8, last version u8; expires. HASH is a
                                      keyed hash of the user id, so that it does not say who was forgotten
    ramrec:secret                     the key of that hash, made once
    ramrec:model                      the model that serves, and the one that is wanted (`ModelState`, JSON); not there
                                      until somebody asks for another model
    ramrec:quota:KEY:SECOND           requests of an API key granted in a second; expires
    ramrec:catalogue:{items}:number   hash item id → catalogue number (from 1; a number never changes)
    ramrec:catalogue:{items}:id       list of item ids in order of their numbers
    ramrec:catalogue:{items}:about    hash item id → JSON metadata
    ramrec:catalogue:{items}:hidden   set of hidden item ids
    ramrec:catalogue:{items}:revision counts changes of metadata and hidden flags of items that were there before
    ramrec:catalogue:{items}:changes  list of the numbers of the items changed, one a revision, newest first, 10,000
    ramrec:replicas                   sorted set of the memory service's replicas, `+URL` or, where not everything is
                                      loaded yet, `-URL`, by the time (ms) until which they count as there

In a Redis Cluster the braces say which part of a key its slot comes from: a user's slot follows from the user id, and
all of the catalogue is in one. How Redis is reached, and what can go wrong there: `memory_service.store.link`.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import msgspec

from memory_service.protocol.slots import ALL_SLOTS, slot_of, user_key, user_of
from memory_service.store.link import Cluster, Command, Link, Road, sha
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
from model.config import RulesConfig
from model.memory.events import UserRecord

TOMBSTONE_S = 30 * 86400
TOMBSTONE = struct.Struct("<dQ")
QUOTA_S = 60
"""How long a count of granted requests is kept: longer than clocks differ."""
COMMIT_USERS = 64
"""Records that one script call stores: Redis serves nobody else meanwhile, about half a millisecond."""
log = logging.getLogger(__name__)

MODEL_KEY, SECRET, REPLICAS = "ramrec:model", "ramrec:secret", "ramrec:replicas"
NO_STAMP = bytes(STAMP.size)
CATALOGUE = NUMBERS, IDS, ABOUT, HIDDEN, REVISION, CHANGES = [
    f"ramrec:catalogue:{{items}}:{name}" for name in ("number", "id", "about", "hidden", "revision", "changes")
]
CHANGES_KEPT = 10_000

STAMPS = """
local found = {}
for i, key in ipairs(KEYS) do
  local stamp = redis.call('GETRANGE', key, 8, 19)
  found[i] = stamp ~= '' and stamp or string.rep('\\0', 12)
end
return table.concat(found)
"""
"""Stamps of records (version and checksum), 12 bytes each; zeros where there is none."""

COMMIT = """
local done = {}
for i, key in ipairs(KEYS) do
  if redis.call('GETRANGE', key, 8, 19) == ARGV[2 * i] then
    if ARGV[1] == '0' then
      redis.call('SET', key, ARGV[2 * i + 1])
    else
      redis.call('SET', key, ARGV[2 * i + 1], 'EX', ARGV[1])
    end
    done[i] = 1
  else
    done[i] = 0
  end
end
return done
"""
"""Compare-and-set of records: each is stored only while there is the record that the write was computed from."""

FORGET = """
local current = redis.call('GETRANGE', KEYS[1], 8, 19)
if current ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return 1
"""

REGISTER = """
local overwrite, numbers = ARGV[1] == '1', {}
for i = 3, #ARGV, 3 do
  local id, about, hidden, changed = ARGV[i], ARGV[i + 1], ARGV[i + 2], false
  local number = redis.call('HGET', KEYS[1], id)
  local known = number
  if not number then
    number = redis.call('RPUSH', KEYS[2], id)
    redis.call('HSET', KEYS[1], id, number)
  end
  numbers[#numbers + 1] = tonumber(number)
  if about ~= '' and (overwrite or redis.call('HEXISTS', KEYS[3], id) == 0) then
    redis.call('HSET', KEYS[3], id, about)
    changed = true
  end
  if overwrite and hidden ~= '' then
    redis.call(hidden == '1' and 'SADD' or 'SREM', KEYS[4], id)
    changed = true
  end
  if changed and known then
    redis.call('INCR', KEYS[5])
    redis.call('LPUSH', KEYS[6], number)
  end
end
redis.call('LTRIM', KEYS[6], 0, ARGV[2] - 1)
return numbers
"""
"""Register items atomically: new ones get the next number; metadata is set where there is none, or on overwrite."""

CHANGED = """
local revision = tonumber(redis.call('GET', KEYS[1]) or '0')
local behind = revision - ARGV[1]
if behind < 0 or behind > redis.call('LLEN', KEYS[2]) then return {revision} end
return {revision, behind > 0 and redis.call('LRANGE', KEYS[2], 0, behind - 1) or {}}
"""
"""The revision and the numbers of the items that changed since another one, where that is still known."""


SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
"""Compare-and-set of a small value."""

QUOTA = """
local used = tonumber(redis.call('GET', KEYS[1]) or '0')
local granted = math.max(0, math.min(tonumber(ARGV[1]), tonumber(ARGV[2]) - used))
if granted > 0 then
  redis.call('INCRBY', KEYS[1], granted)
  redis.call('EXPIRE', KEYS[1], ARGV[3])
end
return granted
"""
"""Grant some of the requests that a limit leaves."""


BEAT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local was_there = 0
if #ARGV > 0 then
  was_there = redis.call('ZREM', KEYS[1], '+' .. ARGV[1], '-' .. ARGV[1])
  redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2] .. ARGV[1])
end
return {was_there, redis.call('ZRANGE', KEYS[1], 0, -1)}
"""
"""A replica (none: nobody) is there for a while; whether it was before, and all who are. By the clock of Redis."""


SCRIPTS = (STAMPS, COMMIT, FORGET, REGISTER, CHANGED, SWAP, QUOTA, BEAT)
SHA = {text: sha(text) for text in SCRIPTS}


class ModelState(msgspec.Struct, frozen=True):
    """Versions of the serving and the wanted model and the folders that hold them. `base`: what the process that asked
    was started with; one that is started with it again follows, one started with something new makes that serve.
    """

    serving: str
    serving_run: str
    wanted: str
    wanted_run: str
    base: str

    def replace(self, **changes: str) -> ModelState:
        """The same but for these fields."""
        return msgspec.structs.replace(self, **changes)


@dataclass(frozen=True)
class Tombstone:
    """A forgotten user: events up to `time` stay forgotten; a new record's version follows `version`."""

    time: float
    version: int


@dataclass(frozen=True)
class Look:
    """What one round trip found: stamps (0: no record), records as bytes, tombstones, in the order asked. `lost`: users
    whose records are out of reach.
    """

    stamps: list[int]
    records: list[bytes | None]
    stones: list[Tombstone | None]
    lost: Collection[str] = ()


@dataclass(frozen=True)
class CatalogueItem:
    """One item as Redis keeps it; `about` is JSON, empty where there is none."""

    item_id: str
    about: bytes
    hidden: bool


class Store:
    """Records, tombstones and catalogue in one Redis. `rules` lay out the banks that are read; records expire
    `idle_s` seconds after their last write (0: never).

    Raises:
        StoreURLError: `url` cannot be used.
    """

    def __init__(
        self, url: str, rules: RulesConfig, timeout_s: float, idle_s: int = 0, replicas: int | None = None
    ) -> None:
        self.rules, self.idle_s = rules, idle_s
        self.rules_of: dict[str, RulesConfig] = {}
        """Rules that the banks of a model version are laid out for; `rules` those of all others."""
        self.link = Link(url, timeout_s, SCRIPTS, replicas)
        self._secret = b""

    async def close(self) -> None:
        """Close all connections."""
        await self.link.close()

    async def ping(self) -> None:
        """Raises StoreUnavailable where Redis does not answer."""
        await (await self.link.road()).ping()

    # ------------------------------------------------------------------------------------------ records

    async def look(
        self, check: Sequence[str], load: Sequence[str] = (), stones: Sequence[str] = (), *, partly: bool = False
    ) -> Look:
        """Stamps of some users' records, others' records, and tombstones. One round trip. `partly`: users whose records
        are out of reach are named as `lost`.
        """
        road = await self.link.road()
        stamps = Reads(road, [user_key(user) for user in check], _stamp_of, _stamps_of)
        records = Reads(road, [user_key(user) for user in load], _get, _mget)
        kept = Reads(road, [await self._tombstone_key(user) for user in stones], _get, _mget)
        found = await self.link.send(stamps.commands + records.commands + kept.commands, partly=partly)
        seen, loaded = stamps.answers(found), records.answers(found)
        lost: set[str] = set()
        if partly and isinstance(road, Cluster):
            lost = {u for u, one in zip([*check, *load], [*seen, *loaded], strict=True) if isinstance(one, Exception)}
            seen, loaded = ([None if isinstance(one, Exception) else one for one in some] for some in (seen, loaded))
        stamped = STAMP.iter_unpack(b"".join(data or NO_STAMP for data in seen))
        return Look(
            [version << 32 | checksum for version, checksum in stamped],
            loaded,
            [_tombstone(data) for data in kept.answers(found)],
            lost,
        )

    async def stamps(self, users: Sequence[str]) -> list[int]:
        """Stamp of each user's record, 0 where there is none. One round trip."""
        return (await self.look(users)).stamps

    async def load(self, users: Sequence[str]) -> dict[str, UserRecord | None]:
        """Records, None where there is none. One round trip. Raises RecordError for damaged ones."""
        return self.unpack(users, (await self.look((), users)).records)

    def unpack(self, users: Sequence[str], found: Sequence[bytes | None]) -> dict[str, UserRecord | None]:
        """What was found of these users as records. Raises RecordError for a damaged one."""
        records: dict[str, UserRecord | None] = {}
        for user, data in zip(users, found, strict=True):
            try:
                records[user] = None if data is None else self._unpack(data)
            except RecordError as error:
                raise RecordError(f"user {user!r}: {error}") from error
        return records

    async def load_readable(self, users: Sequence[str]) -> dict[str, UserRecord]:
        """The records that are there and undamaged; a damaged one is logged. One round trip."""
        return self.readable(users, (await self.look((), users)).records)

    def readable(self, users: Collection[str], found: Sequence[bytes | None]) -> dict[str, UserRecord]:
        """What was found of these users as records; a damaged one is logged and left out."""
        records = {}
        for user, data in zip(users, found, strict=True):
            try:
                if data is not None:
                    records[user] = self._unpack(data)
            except RecordError as error:
                log.error("left out: a damaged record: %s", error)
                log.debug("the damaged record is %s", user_key(user))
        return records

    def _unpack(self, data: bytes) -> UserRecord:
        return unpack_record(data, self.rules_of.get(model_of(data[MODEL]), self.rules))

    async def commit(self, writes: Sequence[tuple[str, int, UserRecord]]) -> list[UserRecord | None]:
        """Store records (user, stamp of what it was computed from, record); the record as it is stored now, None where
        another came first. Each record is stored or not as a whole. One round trip.
        """
        packed = [pack_record(record) for _, _, record in writes]
        groups = (await self.link.road()).together([user_key(user) for user, _, _ in writes])
        groups = [some[at : at + COMMIT_USERS] for some in groups for at in range(0, len(some), COMMIT_USERS)]
        commands: list[Command] = []
        for some in groups:
            args: list[bytes | int] = [self.idle_s]
            for n in some:
                args += [stamp_bytes(writes[n][1]), packed[n]]
            commands.append(_script(COMMIT, [user_key(writes[n][0]) for n in some], args))
        done: list[int] = [0] * len(writes)
        for some, flags in zip(groups, await self.link.send(commands, durable=True), strict=True):
            for n, flag in zip(some, flags, strict=True):
                done[n] = flag
        return [
            replace(record, checksum=int.from_bytes(data[CHECKSUM], "little")) if stored else None
            for (_, _, record), data, stored in zip(writes, packed, done, strict=True)
        ]

    async def forget(self, user: str, now: float) -> bool:
        """Delete everything about a user and leave a tombstone; whether a record was there. Idempotent."""
        while True:
            look = await self.look([user], (), [user])
            (stamp,), (old,) = look.stamps, look.stones
            version = stamp >> 32
            last = max(version, old.version if old else 0)
            if version == 0 and old is None:
                return False
            stone = TOMBSTONE.pack(max(now, old.time if old else 0.0), last)
            kept: Command = ("SET", await self._tombstone_key(user), stone, "EX", TOMBSTONE_S)
            await self.link.send([kept], durable=True)  # first: a crash in between forgets nothing silently
            if (await self.link.send([_script(FORGET, [user_key(user)], [stamp_bytes(stamp)])], durable=True))[0]:
                return version > 0

    async def tombstones(self, users: Sequence[str]) -> list[Tombstone | None]:
        """Tombstones, None where there is none. One round trip."""
        return (await self.look((), (), users)).stones

    async def all_users(self, batch: int) -> AsyncIterator[list[str]]:
        """Ids of all users who have a record, in batches; one may be named twice. Does not block Redis."""
        names: list[str] = []
        async for keys in (await self.link.road()).keys(b"ramrec:{*}"):
            names += map(user_of, keys)
            if len(names) >= batch:
                yield names
                names = []
        if names:
            yield names

    async def walk(self, cursor: int, count: int, slots: range = ALL_SLOTS) -> tuple[int, list[str]]:
        """A step through all users, about `count` of them: where to go on (0: all were named), and those who have their
        record in these slots; one may be named at several steps. Does not block Redis.
        """
        cursor, keys = await (await self.link.road()).scan(cursor, b"ramrec:{*}", count)
        names = dict.fromkeys(map(user_of, keys))
        return cursor, [name for name in names if slots == ALL_SLOTS or slot_of(name) in slots]

    async def models(self, users: Sequence[str]) -> list[str]:
        """Model version of each user's record, "" where there is none. One round trip."""
        found = await self.link.send([("GETRANGE", user_key(user), MODEL.start, MODEL.stop - 1) for user in users])
        return [model_of(data) for data in found]

    async def users(self, prefix: str, limit: int) -> list[str]:
        """User ids with a prefix, sorted; where there are more than `limit`, some of them. Walks the key space without
        blocking Redis, no farther than it must.
        """
        found: set[str] = set()  # a walk may name a key twice
        async with aclosing((await self.link.road()).keys(b"ramrec:{" + _escaped(prefix).encode() + b"*}")) as walk:
            async for keys in walk:
                found.update(map(user_of, keys))
                if len(found) >= limit:
                    break
        return sorted(found)[:limit]

    # ---------------------------------------------------------------------------------------- catalogue

    async def register(self, items: Iterable[CatalogueItem], *, overwrite: bool, flags: bool = True) -> list[int]:
        """Catalogue numbers of items, registering those that are new; `flags`: hidden flags are overwritten, too."""
        args: list[Any] = ["1" if overwrite else "0", CHANGES_KEPT]
        for item in items:
            args += [item.item_id, item.about, str(int(item.hidden)) if flags else ""]
        if len(args) == 2:
            return []
        numbers: list[int] = (await self.link.send([_script(REGISTER, CATALOGUE, args)], durable=True))[0]
        return numbers

    async def catalogue(self, since: int, limit: int | None = None) -> tuple[int, list[CatalogueItem]]:
        """Revision, and the items numbered from `since` on, at most `limit`."""
        last = -1 if limit is None else since + limit - 2
        revision, ids = await self.link.send([("GET", REVISION), ("LRANGE", IDS, since - 1, last)])
        return int(revision or 0), await self._items(ids)

    async def item_ids(self, since: int) -> list[str]:
        """Ids of the items numbered from `since` on."""
        return [item.decode() for item in (await self.link.send([("LRANGE", IDS, since - 1, -1)]))[0]]

    async def changed(self, revision: int, below: int) -> tuple[int, dict[int, CatalogueItem] | None]:
        """Revision, and the items numbered below `below` that changed since an earlier one; None: too long ago."""
        now, *numbers = (await self.link.send([_script(CHANGED, [REVISION, CHANGES], [revision])]))[0]
        if not numbers:
            return now, None
        wanted = sorted({int(number) for number in numbers[0] if int(number) < below})
        ids = await self.link.send([("LINDEX", IDS, number - 1) for number in wanted])
        return now, dict(zip(wanted, await self._items(ids), strict=True))

    async def _items(self, ids: list[bytes]) -> list[CatalogueItem]:
        """What is known of items."""
        if not ids:
            return []
        about, hidden = await self.link.send([("HMGET", ABOUT, *ids), ("SMISMEMBER", HIDDEN, *ids)])
        return [
            CatalogueItem(item.decode(), text or b"", bool(flag))
            for item, text, flag in zip(ids, about, hidden, strict=True)
        ]

    async def catalogue_state(self) -> tuple[int, int]:
        """How many items there are, and the revision."""
        size, revision = await self.link.send([("LLEN", IDS), ("GET", REVISION)])
        return int(size), int(revision or 0)

    # -------------------------------------------------------------------------------------------- model

    async def model(self) -> ModelState | None:
        """Which model serves and which is wanted; None until somebody asked for another."""
        data = (await self.link.send([("GET", MODEL_KEY)]))[0]
        return None if data is None else msgspec.json.decode(data, type=ModelState)

    async def swap_model(self, before: ModelState, after: ModelState) -> bool:
        """Set what is wanted, unless it is not `before` (or nothing) any more."""
        data = (await self.link.send([("GET", MODEL_KEY)]))[0]
        if data is not None and msgspec.json.decode(data, type=ModelState) != before:
            return False
        return await self.swap(MODEL_KEY, data or b"", msgspec.json.encode(after))

    async def swap(self, key: str, before: bytes, after: bytes) -> bool:
        """Compare-and-set of a small value; `before` is empty where there is none."""
        return bool((await self.link.send([_script(SWAP, [key], [before, after])], durable=True))[0])

    # ----------------------------------------------------------------------------------------- replicas

    async def beat(self, url: str, is_ready: bool, for_ms: int) -> tuple[bool, dict[str, bool]]:
        """Count a replica as there for a while: whether it still was, and all who are there (see `replicas`)."""
        script = _script(BEAT, [REPLICAS], [url, "+" if is_ready else "-", for_ms])
        was_there, found = (await self.link.send([script]))[0]
        return bool(was_there), _replicas(found)

    async def replicas(self) -> dict[str, bool]:
        """Who is there, by URL, and whether everything is loaded there."""
        return _replicas((await self.link.send([_script(BEAT, [REPLICAS], [])]))[0][1])

    async def silence(self, url: str) -> None:
        """Count a replica as there no longer."""
        await self.link.send([("ZREM", REPLICAS, f"+{url}", f"-{url}")])

    # ------------------------------------------------------------------------------------------- quotas

    async def grant(self, key: str, second: int, limit: int, want: int) -> int:
        """How many of the wanted requests a limit a second leaves; they count as used."""
        script = _script(QUOTA, [f"ramrec:quota:{key}:{second}"], [want, limit, QUOTA_S])
        granted: int = (await self.link.send([script]))[0]
        return granted

    # -------------------------------------------------------------------------------------------- seams

    async def _tombstone_key(self, user: str) -> bytes:
        if not self._secret:
            await self.link.send([("SET", SECRET, os.urandom(32), "NX")], durable=True)
            self._secret = (await self.link.send([("GET", SECRET)]))[0]
        return f"ramrec:forgotten:{blake2b(user.encode(), key=self._secret, digest_size=16).hexdigest()}".encode()


class Reads:
    """Reads of many keys, as few commands as may name several."""

    def __init__(
        self, road: Road, keys: Sequence[bytes], one: Callable[[bytes], Command], many: Callable[[list[bytes]], Command]
    ) -> None:
        self._count, self._groups = len(keys), road.together(keys)
        self.commands = [one(keys[g[0]]) if len(g) == 1 else many([keys[n] for n in g]) for g in self._groups]

    def answers(self, found: list[Any]) -> list[Any]:
        """Takes the answers to our commands off the front of those found, and puts them in the order of the keys."""
        values: list[Any] = [None] * self._count
        mine, found[:] = found[: len(self._groups)], found[len(self._groups) :]
        for group, answer in zip(self._groups, mine, strict=True):
            if len(group) == 1 or isinstance(answer, Exception):
                parts = [answer] * len(group)
            else:
                parts = answer if isinstance(answer, list) else _cut(answer)
            for n, part in zip(group, parts, strict=True):
                values[n] = part
        return values


def _cut(stamps: bytes) -> list[bytes]:
    return [stamps[at : at + STAMP.size] for at in range(0, len(stamps), STAMP.size)]


def _stamp_of(key: bytes) -> Command:
    return ("GETRANGE", key, 8, 19)


def _stamps_of(keys: list[bytes]) -> Command:
    return _script(STAMPS, keys, ())


def _get(key: bytes) -> Command:
    return ("GET", key)


def _mget(keys: list[bytes]) -> Command:
    return ("MGET", *keys)


def _script(text: str, keys: Sequence[bytes | str], args: Sequence[bytes | str | int]) -> Command:
    return ("EVALSHA", SHA[text], len(keys), *keys, *args)


def _replicas(found: Sequence[bytes]) -> dict[str, bool]:
    return {one[1:].decode(): one[:1] == b"+" for one in found}


def _tombstone(data: bytes | None) -> Tombstone | None:
    return None if data is None else Tombstone(*TOMBSTONE.unpack(data))


def _escaped(prefix: str) -> str:
    return "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in prefix)
