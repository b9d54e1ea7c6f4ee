"""The use cases of the memory service: retrieve, plan, write, re-key, forget, inspect. State and order; the semantics
are `model.bank`'s and `model.events`'.

Resident banks are a cache: before every answer the versions in Redis are compared, in one round trip for the whole
batch, and what changed is loaded. So any replica may serve any user, and an acknowledged write is seen by the next
retrieval. Everything runs on one event loop; nothing awaits between a search and the use of what it found.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.catalogue import Catalogue
from memory_service.collective import CollectiveScope
from memory_service.index import OwnIndex
from memory_service.schemas import (
    Columns,
    EntryOut,
    EventIn,
    Forgotten,
    Job,
    PlanReply,
    PlanRequest,
    RekeyReply,
    RekeyRequest,
    RetrieveReply,
    RetrieveRequest,
    StaleUser,
    UserEvents,
    UserMemory,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteReply,
    WriteRequest,
)
from memory_service.store import Store, StoreUnavailable, Tombstone
from model import rules as rule
from model.bank import KEY, Banks, Entries, select, stack_banks
from model.checkpoint import Checkpoint
from model.collective import cells
from model.events import Change, Event, Plan, UserRecord, apply, event_identity, plan, rekey, rekey_job
from model.rules import Bools, Floats, Ints

LOAD_USERS = 500
"""Users read and indexed at a time at start; other calls are answered in between."""


class ModelMismatch(ValueError):  # noqa: N818 - a state, answered with 409
    """The caller works with another model than this service."""


class BadRequest(ValueError):  # noqa: N818 - answered with 422
    """Columns of a request do not fit together; says which."""


@dataclass(frozen=True)
class Prepared:
    """One user's events against their record as of now."""

    user_id: str
    record: UserRecord
    stone: Tombstone | None
    plan: Plan


@dataclass
class Resident:
    """A record in memory, the slot of its keys in the index, and retrievals not yet written: item → (count, last)."""

    record: UserRecord
    slot: int
    accesses: dict[int, tuple[int, float]]


class MemoryService:
    """All banks behind one Redis, for one model."""

    def __init__(self, store: Store, checkpoint: Checkpoint, resident_users: int, collective: bool = True) -> None:
        self.store = store
        self.model_version = checkpoint.version
        self.rules = checkpoint.config.rules
        self.dim = checkpoint.config.encoder.width
        self.centroids = checkpoint.index_centroids
        self.catalogue = Catalogue(store, checkpoint)
        self.index = OwnIndex(self.dim)
        self.collective = CollectiveScope(checkpoint) if collective else None
        self.resident_limit = resident_users
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self._new = UserRecord.new(self.dim, self.rules)

    @property
    def resident_users(self) -> int:
        """Banks in memory."""
        return len(self._resident)

    async def start(self) -> None:
        """Load the catalogue and the collective scope. Raises StoreUnavailable; may be called again."""
        await self.catalogue.start()
        if self.collective is not None and not self.collective.ready:
            await self.collective.load(self.store.all_users(LOAD_USERS), self._read)

    # ----------------------------------------------------------------------------------------- retrieve

    async def retrieve(self, request: RetrieveRequest) -> RetrieveReply:
        """Entropy, K, memories, state and seen items of a batch of users. Unknown users come back as not known."""
        self._check_model(request.model_version)
        if not request.users:
            raise BadRequest("no users")
        degraded = self.collective is not None and not self.collective.ready
        try:
            await self._refresh(request.users)
        except StoreUnavailable:
            degraded = True  # what is resident goes on answering, and the answer says so
        records = [self._current(user) for user in request.users]
        fresh = [record.model_version == self.model_version for record in records]
        stale = [
            StaleUser(user, record.version, Job.pack(rekey_job(record)))
            for user, record, is_fresh in zip(request.users, records, fresh, strict=True)
            if record.version and not is_fresh
        ]
        answered = [record if is_fresh else self._new for record, is_fresh in zip(records, fresh, strict=True)]
        return self._answer(request, answered, stale, degraded)

    def _answer(
        self, request: RetrieveRequest, records: list[UserRecord], stale: list[StaleUser], degraded: bool
    ) -> RetrieveReply:
        banks = stack_banks([record.banks for record in records])
        states = np.stack([record.state for record in records])
        entropy = self._entropy(request, banks)
        usable = self._usable(request, banks)
        k = self._wanted_k(request, entropy, banks.size, usable)
        queries = self._queries(request, states)
        similarity = self._similarity(request, queries, banks.key.shape[1])
        slots, chosen = select(similarity, usable, banks.fields["time"], k, self.rules.similarity_threshold)
        found = np.take_along_axis(similarity, slots, 1)
        own = banks.describe(np.arange(len(records)), slots, chosen, found)
        self._count(request, own)
        collective_k, others = self._others(request, queries, entropy)
        return RetrieveReply(
            catalogue_size=self.catalogue.size,
            degraded=degraded,
            known=np.array([record.version > 0 for record in records], "u1").tobytes(),
            versions=np.array([record.version for record in records], "<i8").tobytes(),
            entropy=entropy.astype("<f4").tobytes(),
            k=k.astype("<i4").tobytes(),
            collective_k=collective_k.astype("<i4").tobytes(),
            bank_size=banks.size.astype("<i4").tobytes(),
            states=states.astype("<f4").tobytes(),
            own=Columns.pack(own),
            collective=Columns.pack(others),
            seen_count=np.array([len(record.seen) for record in records], "<i4").tobytes(),
            seen=b"".join(record.seen.astype("<u4").tobytes() for record in records),
            stale=stale,
        )

    def _entropy(self, request: RetrieveRequest, banks: Banks) -> NDArray[np.float32]:
        """(B,) diversity of each bank; where there is none, what the caller says."""
        diversity = banks.entropy(self.catalogue.clusters)
        if not request.entropy:
            return diversity
        given = _column(request.entropy, "<f4", len(diversity), "entropy")
        return np.where(banks.size > 0, diversity, np.clip(given, 0, 1)).astype(np.float32)

    def _others(self, request: RetrieveRequest, queries: Floats, entropy: Floats) -> tuple[Ints, Entries]:
        """Collective K and memories. Nobody can be asked about without a state or a query."""
        k = rule.collective_k(entropy, self.rules)
        k[~queries.any(axis=1)] = 0
        for row in request.alone:
            if not 0 <= row < len(k):
                raise BadRequest(f"alone names row {row} of {len(k)}")
            k[row] = 0
        if self.collective is None:
            return np.zeros_like(k), Entries.empty(len(k))
        return k, self.collective.search(queries, request.users, k)

    def _usable(self, request: RetrieveRequest, banks: Banks) -> Bools:
        """(B, C) entries that may be retrieved: all but those the caller ignores."""
        usable = banks.valid()
        for row, items in request.ignore.items():
            if not 0 <= row < len(usable):
                raise BadRequest(f"ignore names row {row} of {len(usable)}")
            usable[row] &= ~np.isin(banks.fields["item"][row], items)
        return usable

    def _wanted_k(self, request: RetrieveRequest, entropy: Floats, size: Ints, usable: Bools) -> Ints:
        adaptive = rule.own_k(entropy, size, self.rules)
        if not request.k:
            return np.asarray(np.minimum(adaptive, usable.sum(axis=1)))
        asked = _column(request.k, "<i4", len(size), "k")
        return np.asarray(np.minimum(np.where(asked > 0, asked, adaptive), usable.sum(axis=1)))

    def _queries(self, request: RetrieveRequest, states: Floats) -> NDArray[np.float32]:
        """(B, d) of unit length: what the caller sent, or the state in the record; zero where there is neither."""
        queries = rule.unit(states).astype(np.float32)
        rows = _column(request.query_rows, "<u4", len(request.query_rows) // 4, "query_rows")
        given = _column(request.queries, "<f4", len(rows) * self.dim, "queries")
        if len(rows) and rows.max() >= len(states):
            raise BadRequest(f"query_rows names row {rows.max()} of {len(states)}")
        queries[rows] = given.reshape(len(rows), self.dim)
        return queries

    def _similarity(self, request: RetrieveRequest, queries: Floats, width: int) -> NDArray[np.float32]:
        """(B, width) of each user's entries to their query; −inf where there is no entry."""
        residents = [self._resident.get(user) for user in request.users]
        at = np.array([row for row, one in enumerate(residents) if one is not None], np.int64)
        slots = np.array([one.slot for one in residents if one is not None], np.int64)
        found = np.full((len(queries), width), -np.inf, np.float32)
        found[at] = self.index.search(slots, queries[at], width)
        return found

    def _count(self, request: RetrieveRequest, own: Entries) -> None:
        """Remember which memories were retrieved, until the user's next write."""
        now, uncounted = time.time(), set(request.uncounted)
        for row, user in enumerate(request.users):
            resident = self._resident.get(user)
            if resident is not None and row not in uncounted:
                for item in own.item[row, own.valid[row]].tolist():
                    count, _ = resident.accesses.get(item, (0, 0.0))
                    resident.accesses[item] = (count + 1, now)

    # -------------------------------------------------------------------------------------------- write

    async def plan(self, request: PlanRequest) -> PlanReply:
        """What the events would mean, and which keys writing them needs. Nothing is changed."""
        self._check_model(request.model_version)
        prepared = await self._prepare(request.users, request.received_at)
        return PlanReply(self.catalogue.size, [self._plan_out(one) for one in prepared])

    async def write(self, request: WriteRequest) -> WriteReply:
        """Write planned events with their keys, atomically per user, if nobody wrote in between.

        Raises:
            StoreUnavailable: it is not known what was written; repeating the events is harmless (event ids).
        """
        self._check_model(request.model_version)
        prepared = await self._prepare(request.users, request.received_at)
        outdated = [
            row
            for row, (one, write) in enumerate(zip(prepared, request.users, strict=True))
            if one.record.version != write.version or self._is_stale(one.record) or self._forgotten_since(one, write)
        ]
        changes = {
            row: self._change(one, write)
            for row, (one, write) in enumerate(zip(prepared, request.users, strict=True))
            if row not in outdated and one.plan.accepted
        }
        written = dict(zip(changes, apply(list(changes.values())), strict=True))
        lost = await self._commit(prepared, written)
        outdated = sorted({*outdated, *lost})
        again = await self._prepare([request.users[row] for row in outdated], request.received_at)
        retries = {row: self._plan_out(one) for row, one in zip(outdated, again, strict=True)}
        return WriteReply(
            self.catalogue.size,
            [_written_out(one, written.get(row), retries.get(row)) for row, one in enumerate(prepared)],
        )

    async def _prepare(self, users: Sequence[UserEvents | UserWrite], received_at: float) -> list[Prepared]:
        """Current record, tombstone and plan of each user."""
        names = [user.user_id for user in users]
        if len(set(names)) < len(names):
            raise BadRequest("a user is named twice")
        await self._refresh(names)
        records = [self._current(name) for name in names]
        stones = await self.store.tombstones(names)
        numbers = await self.catalogue.numbers(event.item_id for user in users for event in user.events)
        prepared = []
        for user, record, stone in zip(users, records, stones, strict=True):
            events = [_event(user.user_id, event, numbers[event.item_id], received_at) for event in user.events]
            forgotten_until = stone.time if stone else -np.inf
            prepared.append(Prepared(user.user_id, record, stone, plan(record, events, forgotten_until)))
        return prepared

    def _plan_out(self, one: Prepared) -> UserPlan:
        record, planned = one.record, one.plan
        stale = StaleUser(one.user_id, record.version, Job.pack(rekey_job(record))) if self._is_stale(record) else None
        return UserPlan(
            user_id=one.user_id,
            version=record.version,
            accepted=[event.index for event in planned.accepted],
            duplicates=list(planned.duplicates),
            forgotten=list(planned.forgotten),
            job=Job.pack(planned.job),
            stale=stale,
        )

    def _forgotten_since(self, one: Prepared, write: UserWrite) -> bool:
        """Whether a forget came between plan and first write, so that fewer events count than keys were made for."""
        return one.stone is not None and len(write.keys) > len(one.plan.accepted) * self.dim * 4

    def _change(self, one: Prepared, write: UserWrite) -> Change:
        count = len(one.plan.accepted)
        keys = _column(write.keys, "<f4", count * self.dim, "keys").reshape(count, self.dim)
        resident = self._resident.get(one.user_id)
        accesses = [(item, *seen) for item, seen in resident.accesses.items()] if resident else []
        return Change(
            record=replace(one.record, model_version=self.model_version),
            plan=one.plan,
            keys=keys,
            state=_column(write.state, "<f4", self.dim, "state"),
            cells=cells(keys, one.plan.job.positions, self.centroids),
            accesses=accesses,
            first_version=one.stone.version if one.stone else 0,
        )

    async def _commit(self, prepared: list[Prepared], written: dict[int, UserRecord]) -> set[int]:
        """Store the new records; returns the rows that lost against another writer or against a forget."""
        outcomes = await self.store.commit(
            [(prepared[row].user_id, prepared[row].record.version, record) for row, record in written.items()]
        )
        lost = {row for row, done in zip(written, outcomes, strict=True) if not done}
        created = [row for row in written if row not in lost and prepared[row].record.version == 0]
        stones = await self.store.tombstones([prepared[row].user_id for row in created])
        for row, stone in zip(created, stones, strict=True):
            if stone is not None and stone != prepared[row].stone:  # forgotten while the first write was under way
                await self.store.forget(prepared[row].user_id, stone.time)
                lost.add(row)
        for row in written.keys() - lost:
            self._install(prepared[row].user_id, written[row], keep_accesses=False)
        for row in lost:
            del written[row]
        return lost

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Give stale records the keys and states of this model; those that changed meanwhile are left alone."""
        self._check_model(request.model_version)
        await self._refresh([user.user_id for user in request.users])
        writes = []
        for user in request.users:
            record = self._current(user.user_id)
            if record.version == user.version and self._is_stale(record):
                keys = _column(user.keys, "<f4", record.size * self.dim, "keys").reshape(record.size, self.dim)
                state = _column(user.state, "<f4", self.dim, "state")
                listed = cells(keys, rekey_job(record).positions, self.centroids)
                fresh = rekey(record, self.model_version, keys, state, listed)
                writes.append((user.user_id, user.version, fresh))
        outcomes = await self.store.commit(writes)
        done = [write for write, stored in zip(writes, outcomes, strict=True) if stored]
        for user_id, _, record in done:
            self._install(user_id, record)
        return RekeyReply([user_id for user_id, _, _ in done])

    async def forget(self, user_id: str) -> Forgotten:
        """Remove everything about a user; a tombstone keeps late retries from bringing them back."""
        existed = await self.store.forget(user_id, time.time())
        self._remove(user_id)
        return Forgotten(existed)

    # ------------------------------------------------------------------------------------------ inspect

    async def inspect(self, user_id: str) -> UserMemory | None:
        """A user's bank laid open; None where nothing is known."""
        await self._refresh([user_id])
        record = self._current(user_id)
        if record.version == 0:
            return None
        banks, size = record.banks, record.size
        cluster = banks.entry_clusters(self.catalogue.clusters)
        worth, recency = banks.quality(), banks.recency()
        entropy = rule.entropy(worth, cluster, self.rules.clusters)
        shares = rule.cluster_shares(worth * banks.valid(), cluster, self.rules.clusters)[0]
        return UserMemory(
            user_id=user_id,
            version=record.version,
            model_version=record.model_version,
            events=record.events,
            share=record.share,
            entropy=float(entropy[0]),
            k=int(rule.own_k(entropy, banks.size, self.rules)[0]),
            capacity=self.rules.capacity,
            pruned=int(banks.pruned[0]),
            clusters={int(n): float(shares[n]) for n in np.flatnonzero(shares)},
            entries=[_entry_out(banks, slot, worth, recency, cluster) for slot in range(size)],
            log=list(zip(record.log_item.tolist(), record.log_time.tolist(), strict=True)),
            seen=len(record.seen),
            catalogue_size=self.catalogue.size,
        )

    # ----------------------------------------------------------------------------------------- resident

    def _check_model(self, version: str) -> None:
        if version != self.model_version:
            raise ModelMismatch(f"this service serves model {self.model_version}, the call is for {version}")

    def _is_stale(self, record: UserRecord) -> bool:
        return record.version > 0 and record.model_version != self.model_version

    def _current(self, user_id: str) -> UserRecord:
        resident = self._resident.get(user_id)
        return resident.record if resident else self._new

    async def _refresh(self, users: Sequence[str]) -> None:
        """Bring residents of these users to what Redis has. Room is made first, so that all of them stay.

        Other calls run while this one waits and may exchange residents for older ones: those found current are
        compared again once nothing is awaited any more.
        """
        while len(self._resident) > self.resident_limit:
            self._drop(next(iter(self._resident)))
        names = [name for name in dict.fromkeys(users) if name]
        while names:
            seen = dict(zip(names, await self.store.versions(names), strict=True))
            changed = {name for name in names if seen[name] not in (0, self._current(name).version)}
            await self._load(sorted(changed))
            for name in names:
                if seen[name] == 0:
                    self._remove(name)
                elif name in self._resident:
                    self._resident.move_to_end(name)
            if all(self._current(name).version == seen[name] for name in names if name not in changed):
                return

    async def _load(self, names: list[str]) -> None:
        """Read records anew. The catalogue comes first: no resident names an item that is not in it."""
        records = await self.store.load(names)
        if any(self._names_new_items(record) for record in records if record is not None):
            await self.catalogue.sync()
        for name, record in zip(names, records, strict=True):
            if record is None:
                self._remove(name)
            else:
                self._install(name, record)

    async def _read(self, names: list[str]) -> dict[str, UserRecord]:
        """The readable records of these users, no item of which is missing in the catalogue."""
        records = await self.store.load_readable(names)
        if any(self._names_new_items(record) for record in records.values()):
            await self.catalogue.sync()
        return records

    def _names_new_items(self, record: UserRecord) -> bool:
        """Whether another process registered items that this record names."""
        columns = (record.banks.fields["item"], record.log_item, record.seen)
        return max(int(column.max(initial=0)) for column in columns) > self.catalogue.size

    def _install(self, user_id: str, record: UserRecord, *, keep_accesses: bool = True) -> None:
        old = self._resident.pop(user_id, None)
        slot = old.slot if old else self.index.claim()
        usable = not self._is_stale(record)
        self.index.put(slot, record.banks.key[0, : record.size] if usable else np.zeros((0, self.dim), KEY))
        accesses = old.accesses if old and keep_accesses else {}
        self._resident[user_id] = Resident(record, slot, accesses)
        if self.collective is not None:
            self.collective.put([(user_id, record)])

    def _remove(self, user_id: str) -> None:
        """Nothing is known about the user any more."""
        self._drop(user_id)
        if self.collective is not None:
            self.collective.drop(user_id)

    def _drop(self, user_id: str) -> None:
        """Make room; the user's record stays in Redis and their entries in the collective scope."""
        resident = self._resident.pop(user_id, None)
        if resident is not None:
            self.index.drop(resident.slot)


def _event(user_id: str, event: EventIn, number: int, received_at: float) -> Event:
    return Event(
        index=event.index,
        item=number,
        time=received_at if event.timestamp is None else event.timestamp,
        rating=float("nan") if event.rating is None else event.rating,
        event_id=event_identity(user_id, event.item_id, event.timestamp, event.event_id),
        timed=event.timestamp is not None,
    )


def _written_out(one: Prepared, record: UserRecord | None, retry: UserPlan | None) -> UserWritten:
    planned = one.plan
    if retry is not None:
        return UserWritten(one.user_id, one.record.version, [], [], [], retry)
    return UserWritten(
        user_id=one.user_id,
        version=(record or one.record).version,
        accepted=[event.index for event in planned.accepted],
        duplicates=list(planned.duplicates),
        forgotten=list(planned.forgotten),
    )


def _entry_out(banks: Banks, slot: int, worth: Floats, recency: Floats, cluster: Ints) -> EntryOut:
    fields = {name: values[0, slot].item() for name, values in banks.fields.items()}
    return EntryOut(
        item=fields["item"],
        quality=float(worth[0, slot]),
        recency=float(recency[0, slot]),
        rating=None if np.isnan(fields["rating"]) else fields["rating"],
        time=fields["time"],
        frequency=fields["frequency"],
        access=fields["access"],
        last_access=fields["last_access"],
        cluster=int(cluster[0, slot]),
    )


def _column(data: bytes, kind: str, count: int, name: str) -> NDArray[Any]:
    """Bytes as numbers. Raises BadRequest where they are not `count` finite ones."""
    if len(data) != count * np.dtype(kind).itemsize:
        raise BadRequest(f"{name} has {len(data)} bytes, wanted {count} values of {np.dtype(kind).itemsize}")
    values = np.frombuffer(data, kind)
    if not np.isfinite(values).all():
        raise BadRequest(f"{name} holds a number that is not finite")
    return values
