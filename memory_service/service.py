"""The use cases of the memory service: retrieve, plan, write, re-key, forget, inspect. State and order; the semantics
are `model.bank`'s and `model.events`'.

Resident banks are a cache: before every answer the versions in Redis are compared, in one round trip for the whole
batch, and what changed is loaded. So any replica may serve any user, and an acknowledged write is seen by the next
retrieval. Everything runs on one event loop; nothing awaits between a search and the use of what it found.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from memory_service import wire
from memory_service.catalogue import Catalogue
from memory_service.merging import Merged
from memory_service.replica import Replicate
from memory_service.residents import NOBODY
from memory_service.schemas import (
    EventIn,
    Forgotten,
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
from memory_service.space import Space
from memory_service.store import Store, StoreUnavailable, Tombstone
from memory_service.wire import BadRequest, Prepared
from model.checkpoint import Checkpoint
from model.events import Plan, Stacked, UserRecord, apply_stacked, plan, without

LOAD_USERS = 500
"""Users read and indexed at a time at start; other calls are answered in between."""
USERS_PER_CALL = 2048
"""Users that one call may name."""
RECENT_USERS = 2048
"""Records kept as a whole between the plan of a write and the write itself."""
RETRY_S = 0.25
"""How often a lost Redis is looked for."""
User = TypeVar("User", UserEvents, UserWrite)
log = logging.getLogger(__name__)


class ModelMismatch(ValueError):  # noqa: N818 - a state, answered with 409
    """The caller works with another model than this service."""


@dataclass(frozen=True)
class Known:
    """A user's record as of the last look at Redis, the tombstone that was there then, and what was planned last."""

    record: UserRecord
    stone: Tombstone | None
    plan: Plan | None = None
    events: Sequence[EventIn] = ()
    received_at: float = 0.0


@dataclass(frozen=True)
class Asked(Generic[User]):
    """A user's part of a call, and when the call came."""

    user: User
    received_at: float


class MemoryService:
    """All banks behind one Redis, for one model."""

    def __init__(
        self,
        store: Store,
        checkpoint: Checkpoint,
        resident_users: int,
        collective: int = 1,
        replicate: Replicate | None = None,
    ) -> None:
        self.store = store
        self.catalogue = Catalogue(store)
        self._checkpoint = checkpoint
        self.serving = Space(checkpoint, self.catalogue, resident_users, collective, replicate)
        self._recent: OrderedDict[str, Known] = OrderedDict()
        self._outage: asyncio.Task[None] | None = None
        self._watchers: list[set[str]] = []
        self._merged_plan = Merged(self._plan, lambda asked: asked.user.user_id)
        self._merged_write = Merged(self._write, lambda asked: asked.user.user_id)

    @property
    def model_version(self) -> str:
        """The model that is served."""
        return self.serving.model_version

    @property
    def resident_users(self) -> int:
        """Banks in memory."""
        return len(self.serving.residents)

    async def start(self) -> None:
        """Load the catalogue and the collective scope. Raises StoreUnavailable; may be called again."""
        await self.catalogue.start(self._checkpoint)
        await self.compare()

    async def compare(self) -> None:
        """Bring the collective scope to what is in Redis: all of it at start, later what other processes wrote or
        forgot, and what expired. Raises StoreUnavailable.
        """
        if self.serving.collective is not None:
            await self.serving.collective.compare(self.store.all_users(LOAD_USERS), self.store.stamps, self._read)

    async def close(self) -> None:
        """Stop looking for Redis and close all connections to it."""
        if self._outage is not None:
            self._outage.cancel()
            await asyncio.gather(self._outage, return_exceptions=True)
        await self.store.close()

    # ----------------------------------------------------------------------------------------- retrieve

    async def retrieve(self, request: RetrieveRequest) -> RetrieveReply:
        """Entropy, K, memories, state and seen items of a batch of users. Unknown users come back as not known."""
        self._check_model(request.model_version)
        self._check_users(request.users)
        if not request.users:
            raise BadRequest("no users")
        space, degraded = self.serving, self.serving.degraded
        altered = await self._altered(request) if request.ignore else {}
        try:
            damaged = await self._refresh(request.users)
            degraded = degraded or damaged
        except StoreUnavailable:
            degraded = True  # what is resident goes on answering, and the answer says so
        visitors = {f"\0{row}": record for row, record in altered.items() if record is not None}
        users = [f"\0{row}" if row in altered else user for row, user in enumerate(request.users)]
        with space.residents.visited(visitors, space.clusters):
            slots = space.residents.find(users)
            stale = space.residents.stale[slots]
            reply = space.answer(request, np.where(stale, NOBODY, slots), degraded)
        reply.without = {row: wire.state_job(record) for row, record in altered.items() if record is not None}
        reply.stale = await self._jobs([user for user, is_old in zip(users, stale.tolist(), strict=True) if is_old])
        return reply

    async def _altered(self, request: RetrieveRequest) -> dict[int, UserRecord | None]:
        """Rows that ignore something of what the user had, and the record without it; None where Redis cannot tell."""
        ignored = wire.ignored(request)
        try:
            with self._reaching():
                records = await self.store.load_readable(sorted({request.users[row] for row in ignored}))
                await self._know_items(list(records.values()))
        except StoreUnavailable:
            return dict.fromkeys(ignored)
        here = {name: record for name, record in records.items() if not self.serving.is_stale(record)}
        pairs = [(row, here[request.users[row]]) for row in ignored if request.users[row] in here]
        altered = {row: without(record, ignored[row]) for row, record in pairs}
        return {row: altered[row] for row, record in pairs if altered[row] is not record}

    async def _jobs(self, users: Sequence[str]) -> list[StaleUser]:
        """What would bring these users to this model; nothing while Redis is out of reach."""
        if not users:
            return []
        try:
            records = await self.store.load_readable(list(dict.fromkeys(users)))
        except StoreUnavailable:
            return []
        return [wire.stale_user(user, record) for user, record in records.items() if self.serving.is_stale(record)]

    # -------------------------------------------------------------------------------------------- write

    async def plan(self, request: PlanRequest) -> PlanReply:
        """What the events would mean, and which keys writing them needs. Nothing is changed."""
        self._check_model(request.model_version)
        self._check_distinct([user.user_id for user in request.users])
        planned = await self._merged_plan([Asked(user, request.received_at) for user in request.users])
        return PlanReply(self.catalogue.size, planned)

    async def _plan(self, asked: Sequence[Asked[UserEvents] | Asked[UserWrite]]) -> list[UserPlan]:
        known = await self._know([one.user.user_id for one in asked])
        return [wire.plan_out(one, self.serving.is_stale(one.record)) for one in await self._prepare(asked, known)]

    async def write(self, request: WriteRequest) -> WriteReply:
        """Write planned events with their keys, atomically per user, if nobody wrote in between.

        Raises:
            StoreUnavailable: it is not known what was written; repeating the events is harmless (event ids).
        """
        self._check_model(request.model_version)
        self._check_distinct([user.user_id for user in request.users])
        written = await self._merged_write([Asked(user, request.received_at) for user in request.users])
        return WriteReply(self.catalogue.size, written)

    async def _write(self, asked: list[Asked[UserWrite]]) -> list[UserWritten]:
        prepared = await self._prepare(asked, await self._know_planned([one.user for one in asked]))
        outdated = {row for row, one in enumerate(asked) if self._is_outdated(prepared[row], one.user)}
        rows = [row for row, one in enumerate(prepared) if row not in outdated and one.plan.accepted]
        chosen = [prepared[row] for row in rows]
        changes = self.serving.changes(chosen, [asked[row].user for row in rows], [*map(self._first_version, chosen)])
        stored = await self._commit(chosen, apply_stacked(changes)) if rows else []
        written = {row: record for row, record in zip(rows, stored, strict=True) if record is not None}
        outdated.update(set(rows) - written.keys())
        again = [asked[row] for row in sorted(outdated)]
        retries = dict(zip(sorted(outdated), await self._plan(again) if again else [], strict=True))
        return [wire.written_out(one, written.get(row), retries.get(row)) for row, one in enumerate(prepared)]

    async def _know(self, names: list[str]) -> dict[str, Known]:
        """Records and tombstones as they are in Redis now; what is kept from a moment ago is not read again.

        Raises RecordError for a damaged record: it is not overwritten.
        """
        kept = {name: self._recent[name] for name in names if name in self._recent}
        records = {name: one.record for name, one in kept.items()}
        rest = [name for name in names if name not in records]
        with self._watching() as changed:
            with self._reaching():
                look = await self.store.look(list(kept), rest, [*kept, *rest])
                loaded = self.store.unpack(rest, look.records)
                seen = zip(kept, look.stamps, strict=True)
                loaded |= await self.store.load([name for name, stamp in seen if records[name].stamp != stamp])
            await self._know_items([record for record in loaded.values() if record is not None])
        self._remove([name for name, record in loaded.items() if record is None and name not in changed])
        new = ((name, record) for name, record in loaded.items() if record is not None and name not in changed)
        self.serving.share(new)
        records |= {name: record or self.serving.new for name, record in loaded.items()}
        stones = dict(zip([*kept, *rest], look.stones, strict=True))
        known = {name: Known(records[name], stones[name]) for name in names}
        for name, one in kept.items():
            if one.record is known[name].record and one.stone == known[name].stone:
                known[name] = one  # with the plan made from it
        self._keep(known)
        return known

    async def _know_planned(self, users: Sequence[UserWrite]) -> dict[str, Known]:
        """What the plans were made from, where it is still kept: whether it is current, the commit will show. Where
        there is no record yet to be compared, or nothing will be committed, only Redis can say.
        """
        known = {}
        for user in users:
            kept = self._recent.get(user.user_id)
            if kept is not None and 0 < kept.record.version == user.version and kept.plan and kept.plan.accepted:
                known[user.user_id] = kept
        rest = [user.user_id for user in users if user.user_id not in known]
        return known | await self._know(rest) if rest else known

    def _keep(self, known: dict[str, Known]) -> None:
        self._recent.update(known)
        for name in known:
            self._recent.move_to_end(name)
        while len(self._recent) > RECENT_USERS:
            self._recent.popitem(last=False)

    async def _prepare(
        self, asked: Sequence[Asked[UserEvents] | Asked[UserWrite]], known: dict[str, Known]
    ) -> list[Prepared]:
        """Each user's events planned against what is known of the user; a plan made a moment ago is not made again."""
        numbers = await self.catalogue.numbers(event.item_id for one in asked for event in one.user.events)
        prepared = []
        for one in asked:
            user, now = one.user, known[one.user.user_id]
            planned = now.plan
            if planned is None or now.received_at != one.received_at or now.events != user.events:
                planned = self._planned(user, now, numbers, one.received_at)
                self._recent[user.user_id] = replace(now, plan=planned, events=user.events, received_at=one.received_at)
            prepared.append(Prepared(user.user_id, now.record, now.stone, planned))
        return prepared

    def _planned(self, user: UserEvents | UserWrite, now: Known, numbers: dict[str, int], received_at: float) -> Plan:
        events = [wire.event(user.user_id, event, numbers[event.item_id], received_at) for event in user.events]
        return plan(now.record, events, now.stone.time if now.stone else -np.inf)

    def _is_outdated(self, one: Prepared, write: UserWrite) -> bool:
        """Whether the plan behind a write is not that of the present record. A forget between plan and first write
        shows in keys for more events than count now.
        """
        forgotten = one.stone is not None and len(write.keys) > len(one.plan.accepted) * self.serving.dim * 4
        return one.record.version != write.version or self.serving.is_stale(one.record) or forgotten

    def _first_version(self, one: Prepared) -> int:
        """What the versions of a new record follow: those before a forget. Where banks expire, nothing is left of the
        versions before, so the clock (in ms) keeps them growing.
        """
        clock = int(time.time() * 1000) if self.store.idle_s and one.record.version == 0 else 0
        return max(clock, one.stone.version if one.stone else 0)

    async def _commit(self, prepared: list[Prepared], stacked: Stacked) -> list[UserRecord | None]:
        """Store new records; None where one lost against another writer or against a forget."""
        names = [one.user_id for one in prepared]
        before = [one.record.stamp for one in prepared]
        with self._reaching():
            stored = await self.store.commit(list(zip(names, before, stacked.records, strict=True)))
            lost = await self._forgotten_meanwhile([one for one, done in zip(prepared, stored, strict=True) if done])
        outcome = [None if name in lost else done for name, done in zip(names, stored, strict=True)]
        kept = [row for row, done in enumerate(outcome) if done is not None]
        for name in set(names).difference(names[row] for row in kept):
            self._recent.pop(name, None)
        if kept:
            done = [record for record in outcome if record is not None]
            self._show([prepared[row] for row in kept], replace(stacked.take(kept), records=done))
        return outcome

    async def _forgotten_meanwhile(self, stored: list[Prepared]) -> set[str]:
        """Users who were forgotten while their first write was under way: what it wrote is taken back."""
        created = [one for one in stored if one.record.version == 0]
        stones = await self.store.tombstones([one.user_id for one in created])
        lost = set()
        for one, stone in zip(created, stones, strict=True):
            if stone is not None and stone != one.stone:
                await self.store.forget(one.user_id, stone.time)
                lost.add(one.user_id)
        return lost

    def _show(self, prepared: list[Prepared], stacked: Stacked) -> None:
        """Let the next retrieval see what was just stored."""
        names = [one.user_id for one in prepared]
        new = zip(prepared, stacked.records, strict=True)
        self._keep({one.user_id: Known(record, one.stone) for one, record in new})
        self.serving.show(names, stacked)
        self._note(names)

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Give stale records the keys and states of this model; those that changed meanwhile are left alone."""
        self._check_model(request.model_version)
        self._check_distinct([user.user_id for user in request.users])
        known = await self._know([user.user_id for user in request.users])
        prepared: list[Prepared] = []
        records: list[UserRecord] = []
        for user in request.users:
            record = known[user.user_id].record
            if record.version == user.version and self.serving.is_stale(record):
                records.append(self.serving.rekeyed(record, user.keys, user.state))
                prepared.append(Prepared(user.user_id, record, known[user.user_id].stone, plan(record, [])))
        stored = await self._commit(prepared, Stacked.of(records)) if records else []
        return RekeyReply([one.user_id for one, done in zip(prepared, stored, strict=True) if done is not None])

    async def forget(self, user_id: str) -> Forgotten:
        """Remove everything about a user; a tombstone keeps late retries from bringing them back."""
        with self._reaching():
            existed = await self.store.forget(user_id, time.time())
        self._remove([user_id])
        return Forgotten(existed)

    # ------------------------------------------------------------------------------------------ inspect

    async def inspect(self, user_id: str) -> UserMemory | None:
        """A user's bank laid open; None where nothing is known."""
        known = await self._know([user_id])
        record = known[user_id].record
        if record.version == 0:
            return None
        return wire.user_memory(user_id, record, self.serving.clusters)

    # ----------------------------------------------------------------------------------------- resident

    def _check_model(self, version: str) -> None:
        if version != self.model_version:
            raise ModelMismatch(f"this service serves model {self.model_version}, the call is for {version}")

    def _check_users(self, names: Sequence[str]) -> None:
        if len(names) > USERS_PER_CALL:
            raise BadRequest(f"{len(names)} users in one call, at most {USERS_PER_CALL}")

    def _check_distinct(self, names: Sequence[str]) -> None:
        self._check_users(names)
        if len(set(names)) < len(names):
            raise BadRequest("a user is named twice")

    async def _refresh(self, users: Sequence[str]) -> bool:
        """Bring residents of these users to what Redis has; returns whether some record could not be read.

        One round trip compares the stamps of residents and loads the others. Other calls run while this one waits:
        whom they changed, and whoever is not at the stamp agreed on once nothing is awaited, is looked at again.
        """
        self.serving.residents.make_room()
        agreed: dict[str, int] = {}
        pending, damaged = [name for name in dict.fromkeys(users) if name], False
        while pending:
            here = self._stamps(pending)
            check = [name for name in pending if here[name] and agreed.get(name, here[name]) == here[name]]
            load = sorted(set(pending).difference(check))
            with self._watching() as changed:
                with self._reaching():
                    look = await self.store.look(check, load)
                records = self.store.readable(load, look.records)
                await self._know_items(list(records.values()))
            damaged |= len(records) < sum(data is not None for data in look.records)
            found = dict(zip(check, look.stamps, strict=True))
            found |= {name: records[name].stamp if name in records else 0 for name in load}
            agreed |= {name: stamp for name, stamp in found.items() if name not in changed}
            self._settle([name for name in pending if name not in changed], agreed, records)
            now = self._stamps(list(agreed))
            pending = [name for name in found if name in changed]
            pending += [name for name in agreed if now[name] != agreed[name] and name not in changed]
        return damaged

    def _settle(self, names: list[str], agreed: dict[str, int], records: dict[str, UserRecord]) -> None:
        """Take over what was read: who is not there goes, who was loaded stays."""
        self._remove([name for name in names if agreed[name] == 0])
        new = {name: records[name] for name in names if name in records}
        self.serving.put(new)
        self._note(new)

    def _stamps(self, names: list[str]) -> dict[str, int]:
        """Stamps of residents, 0 where there is none; they count as used."""
        residents = self.serving.residents
        return dict(zip(names, residents.stamps(residents.find(names)), strict=True))

    @contextmanager
    def _watching(self) -> Iterator[set[str]]:
        """Collects the users whose resident or collective state other calls change meanwhile."""
        changed: set[str] = set()
        self._watchers.append(changed)
        try:
            yield changed
        finally:
            self._watchers = [one for one in self._watchers if one is not changed]

    def _note(self, users: Iterable[str]) -> None:
        for changed in self._watchers:
            changed.update(users)

    async def _read(self, names: list[str]) -> dict[str, UserRecord]:
        """The readable records of these users; as many as there is room for become residents."""
        records = await self.store.load_readable(names)
        await self._know_items(list(records.values()))
        self.serving.fill(records)
        return records

    async def _know_items(self, records: Sequence[UserRecord]) -> None:
        """No record is used that names an item which another process registered and this one does not know yet."""
        if any(record.newest_item > self.catalogue.size for record in records):
            await self.catalogue.sync()

    def _remove(self, users: Sequence[str]) -> None:
        """Nothing is known about these users any more."""
        self.serving.drop(users)
        self._note(users)
        for user in users:
            self._recent.pop(user, None)

    # ------------------------------------------------------------------------------------------- outage

    async def check_store(self) -> None:
        """Whether Redis answers. Raises StoreUnavailable."""
        try:
            await self.store.ping()
        except StoreUnavailable:
            self._lost()
            raise
        self._found()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Around calls of Redis: after one failed, others fail at once until Redis is found again."""
        if self._outage is not None:
            raise StoreUnavailable("Redis is out of reach")
        try:
            yield
        except StoreUnavailable:
            self._lost()
            raise

    def _lost(self) -> None:
        if self._outage is None:
            log.warning("Redis is out of reach")
            self._outage = asyncio.create_task(self._look_for_redis())

    def _found(self) -> None:
        if self._outage is not None:
            log.warning("Redis answers again")
            self._outage.cancel()
            self._outage = None

    async def _look_for_redis(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            with suppress(StoreUnavailable):
                await self.store.ping()
                self._outage = None
                log.warning("Redis answers again")
                return
