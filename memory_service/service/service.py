"""The use cases of the memory service: retrieve, plan, write, re-key, forget, inspect. State and order; the semantics
are `model.memory.bank`'s and `model.memory.events`'.

A replica is a cache of Redis, and there may be any number of them. Before every answer the versions of the users'
records are compared, in one round trip for the whole batch, and what changed is loaded: any replica may serve any user,
and an acknowledged write is seen by the next retrieval. Others' memories are kept in step by what Redis tells of
changes (`store.feed`). Everything runs on one event loop; nothing awaits between a search and the use of what it found.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from memory_service.index.gpu import Replicate
from memory_service.index.residents import NOBODY
from memory_service.protocol import wire
from memory_service.protocol.slots import ALL_SLOTS
from memory_service.protocol.structs import (
    EventIn,
    Forgotten,
    ModelReply,
    PlanReply,
    PlanRequest,
    QuotaReply,
    QuotaRequest,
    RekeyReply,
    RekeyRequest,
    RetrieveReply,
    RetrieveRequest,
    StalePage,
    StaleUser,
    UserEvents,
    UserMemory,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.wire import BadRequest, Prepared
from memory_service.service.catalogue import Catalogue
from memory_service.service.inspection import user_memory
from memory_service.service.merging import Merged
from memory_service.service.models import ModelMismatch, Models
from memory_service.service.space import Space
from memory_service.store.feed import Feed
from memory_service.store.link import ShardUnavailable, StoreUnavailable
from memory_service.store.presence import Presence
from memory_service.store.store import Store, Tombstone
from memory_service.tasks import end
from model.checkpoint import Checkpoint
from model.memory.events import Plan, Stacked, UserRecord, apply_stacked, plan, without

LOAD_USERS = 500
"""Users read and indexed at a time at start; other calls are answered in between."""
USERS_PER_CALL = 2048
"""Users that one call may name."""
RECENT_USERS = 2048
"""Records kept as a whole between the plan of a write and the write itself."""
LISTEN_S = 5.0
"""How long a start waits until changes are heard of."""
RETRY_S = 0.25
"""How often a lost Redis is looked for."""
User = TypeVar("User", UserEvents, UserWrite)
log = logging.getLogger(__name__)


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
    """A user's part of a call, the space of the model it was made with, and when the call came."""

    user: User
    space: Space
    received_at: float


class MemoryService:
    """All banks behind one Redis. This replica is reached at `url`; it is taken for gone once it was silent for
    `patience_s`.
    """

    def __init__(
        self,
        store: Store,
        checkpoint: Checkpoint,
        resident_users: int,
        collective: int = 1,
        replicate: Replicate | None = None,
        run: Path = Path(),
        url: str = "",
        patience_s: float = 5.0,
        collective_entries: int = 0,
    ) -> None:
        def space_of(checkpoint: Checkpoint) -> Space:
            return Space(checkpoint, self.catalogue, resident_users, collective, replicate, collective_entries)

        self.store = store
        self.catalogue = Catalogue(store)
        self.models = Models(store, self.catalogue, checkpoint, run, space_of, self._complete)
        self.pruned = 0
        """Entries that writes through this process pushed out of full banks."""
        self.presence = Presence(store, url, patience_s, self.compare)
        self._feed = Feed(store.link, self._look_at, self._missed)
        self._kept_up: list[asyncio.Task[None]] = []
        self._comparing = asyncio.Lock()
        self._recent: OrderedDict[str, Known] = OrderedDict()
        self._outage: asyncio.Task[None] | None = None
        self._watchers: list[set[str]] = []
        self._merged_plan = Merged(self._plan, lambda asked: asked.user.user_id)
        self._merged_write = Merged(self._write, lambda asked: asked.user.user_id)

    @property
    def serving(self) -> Space:
        """What belongs to the model that serves."""
        return self.models.serving

    @property
    def model_version(self) -> str:
        """The model that serves."""
        return self.serving.model_version

    @property
    def resident_users(self) -> int:
        """Banks in memory."""
        return sum(len(space.residents) for space in self.models.spaces.values())

    async def start(self) -> None:
        """Load models, catalogue and the collective scope. May be called again.

        Raises:
            StoreUnavailable. CheckpointError: the model that Redis says serves cannot be loaded.
        """
        await self.models.start()
        if not self._kept_up:  # heard of first, hearing second, loading third: nothing is missed
            await self.presence.beat()
            self._kept_up = [_watched(self._feed.run()), _watched(self.presence.run())]
        with suppress(TimeoutError):  # a Redis that lets nobody listen: `compare` now and then must do
            await asyncio.wait_for(self._feed.listening.wait(), LISTEN_S)
        await self.compare()
        self.presence.is_ready = True
        await self.presence.beat()

    async def _look_at(self, users: set[str]) -> None:
        """Other replicas, or time, did something to these users; or we did."""
        for space in list(self.models.spaces.values()):
            if space.collective is not None:
                read = partial(self._read, space)
                await space.collective.look_at(list(users), self.store.stamps, read, self.models.spaces)

    async def _missed(self) -> None:
        """Changes may have gone unheard."""
        if self.presence.is_ready:
            await self.compare()

    async def leave(self, linger_s: float) -> None:
        """Let others take over before this process ends."""
        await self.presence.leave(linger_s)

    async def compare(self) -> None:
        """Bring the collective scope to what is in Redis: all of it at start, later what other processes wrote or
        forgot, and what expired. Raises StoreUnavailable.
        """
        lapses = self.presence.lapses
        for space in list(self.models.spaces.values()):
            if space is self.serving:
                await self._complete(space)
            else:  # complete once it serves
                await self._compare(space)
        self.presence.caught_up(lapses)

    async def _complete(self, space: Space) -> None:
        await self._compare(space)
        space.complete = True

    async def _compare(self, space: Space) -> None:
        if space.collective is not None:
            async with self._comparing:
                users = self.store.all_users(LOAD_USERS)
                await space.collective.compare(users, self.store.stamps, partial(self._read, space), self.models.spaces)

    async def close(self) -> None:
        """Stop looking for Redis and close all connections to it."""
        await end([*self._kept_up, self._outage])
        await self.store.close()

    # ----------------------------------------------------------------------------------------- retrieve

    async def retrieve(self, request: RetrieveRequest) -> RetrieveReply:
        """Entropy, K, memories, state and seen items of a batch of users. Unknown users come back as not known."""
        space = await self._space(request.model_version)
        self._check_users(request.users)
        if not request.users:
            raise BadRequest("no users")
        others = space.collective is not None and self.presence.is_current
        degraded = not space.complete or (space.collective is not None and not others)
        altered = await self._altered(space, request) if request.ignore else {}
        try:
            damaged = await self._refresh(space, request.users)
            degraded = degraded or damaged
        except StoreUnavailable:
            degraded = True  # what is resident goes on answering, and the answer says so
        visitors = {f"\0{row}": record for row, record in altered.items() if record is not None}
        users = [f"\0{row}" if row in altered else user for row, user in enumerate(request.users)]
        with space.residents.visited(visitors, space.clusters):
            slots = space.residents.find(users)
            stale = space.residents.stale[slots]
            model_of = {row: space.residents.model_of[int(slots[row])] for row in np.flatnonzero(stale).tolist()}
            reply = space.answer(request, np.where(stale, NOBODY, slots), degraded, others=others)
        reply.without = {row: wire.state_job(record) for row, record in altered.items() if record is not None}
        if model_of:
            await self._follow_to(model_of.values())
            followed = {one.model_version for one in (self.models.serving, self.models.wanted)}
            reply.moved = {row: model for row, model in model_of.items() if model in followed}
            reply.stale = await self._jobs(space, [users[row] for row in model_of if row not in reply.moved])
        return reply

    async def _altered(self, space: Space, request: RetrieveRequest) -> dict[int, UserRecord | None]:
        """Rows that ignore something of what the user had, and the record without it; None where Redis cannot tell."""
        ignored = wire.ignored(request)
        try:
            with self._reaching():
                records = await self.store.load_readable(sorted({request.users[row] for row in ignored}))
                await self._know_items(list(records.values()))
        except StoreUnavailable:
            return dict.fromkeys(ignored)
        here = {name: record for name, record in records.items() if not space.is_stale(record)}
        pairs = [(row, here[request.users[row]]) for row in ignored if request.users[row] in here]
        altered = {row: without(record, ignored[row]) for row, record in pairs}
        return {row: altered[row] for row, record in pairs if altered[row] is not record}

    async def _jobs(self, space: Space, users: Sequence[str]) -> list[StaleUser]:
        """What would bring these users to a loaded model; nothing while Redis is out of reach."""
        if not users:
            return []
        try:
            records = await self.store.load_readable(list(dict.fromkeys(users)))
        except StoreUnavailable:
            return []
        return [wire.stale_user(user, record) for user, record in records.items() if space.is_stale(record)]

    # -------------------------------------------------------------------------------------------- write

    async def plan(self, request: PlanRequest) -> PlanReply:
        """What the events would mean, and which keys writing them needs. Nothing is changed."""
        space = await self._wanted(request.model_version)
        self._check_distinct([user.user_id for user in request.users])
        planned = await self._merged_plan([Asked(user, space, request.received_at) for user in request.users])
        return PlanReply(self.catalogue.size, planned)

    async def _plan(self, asked: Sequence[Asked[UserEvents] | Asked[UserWrite]]) -> list[UserPlan]:
        prepared = await self._prepare(asked, await self._know({one.user.user_id: one.space for one in asked}))
        return [wire.plan_out(one, of.space.is_stale(one.record)) for of, one in zip(asked, prepared, strict=True)]

    async def write(self, request: WriteRequest) -> WriteReply:
        """Write planned events with their keys, atomically per user, if nobody wrote in between.

        Raises:
            StoreUnavailable: it is not known what was written; repeating the events is harmless (event ids).
        """
        space = await self._space(request.model_version)
        self._check_distinct([user.user_id for user in request.users])
        written = await self._merged_write([Asked(user, space, request.received_at) for user in request.users])
        return WriteReply(self.catalogue.size, written)

    async def _write(self, asked: list[Asked[UserWrite]]) -> list[UserWritten]:
        prepared = await self._prepare(asked, await self._know_planned(asked))
        outdated = {row for row, one in enumerate(asked) if self._is_outdated(prepared[row], one)}
        rows = [row for row, one in enumerate(prepared) if row not in outdated and one.plan.accepted]
        written: dict[int, UserRecord] = {}
        for space in dict.fromkeys(asked[row].space for row in rows):  # two only while one model follows another
            mine = [row for row in rows if asked[row].space is space]
            chosen = [prepared[row] for row in mine]
            changes = space.changes(chosen, [asked[row].user for row in mine], [*map(self._first_version, chosen)])
            stored = await self._commit(space, chosen, apply_stacked(changes))
            written |= {row: record for row, record in zip(mine, stored, strict=True) if record is not None}
        outdated.update(set(rows) - written.keys())
        again = [asked[row] for row in sorted(outdated)]
        retries = dict(zip(sorted(outdated), await self._plan(again) if again else [], strict=True))
        return [wire.written_out(one, written.get(row), retries.get(row)) for row, one in enumerate(prepared)]

    async def _know(self, spaces: Mapping[str, Space]) -> dict[str, Known]:
        """Records and tombstones of users as they are in Redis now, new ones for the space of each; what is kept from
        a moment ago is not read again.

        Raises RecordError for a damaged record: it is not overwritten.
        """
        names = list(spaces)
        kept = {name: one for name in names if (one := self._recent.get(name)) and _is_for(one.record, spaces[name])}
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
        self._share([(name, record) for name, record in loaded.items() if record is not None and name not in changed])
        records |= {name: record or spaces[name].new for name, record in loaded.items()}
        stones = dict(zip([*kept, *rest], look.stones, strict=True))
        known = {name: Known(records[name], stones[name]) for name in names}
        for name, one in kept.items():
            if one.record is known[name].record and one.stone == known[name].stone:
                known[name] = one  # with the plan made from it
        self._keep(known)
        return known

    async def _know_planned(self, asked: Sequence[Asked[UserWrite]]) -> dict[str, Known]:
        """What the plans were made from, where it is still kept: whether it is current, the commit will show. Where
        there is no record yet to be compared, or nothing will be committed, only Redis can say.
        """
        known = {}
        for user in (one.user for one in asked):
            kept = self._recent.get(user.user_id)
            if kept is not None and 0 < kept.record.version == user.version and kept.plan and kept.plan.accepted:
                known[user.user_id] = kept
        rest = {one.user.user_id: one.space for one in asked if one.user.user_id not in known}
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

    def _is_outdated(self, one: Prepared, asked: Asked[UserWrite]) -> bool:
        """Whether the plan behind a write is not that of the present record. A forget between plan and first write
        shows in keys for more events than count now.
        """
        write, space = asked.user, asked.space
        forgotten = one.stone is not None and len(write.keys) > len(one.plan.accepted) * space.dim * 4
        return one.record.version != write.version or space.is_stale(one.record) or forgotten

    def _first_version(self, one: Prepared) -> int:
        """What the versions of a new record follow: those before a forget. Where banks expire, nothing is left of the
        versions before, so the clock (in ms) keeps them growing.
        """
        clock = int(time.time() * 1000) if self.store.idle_s and one.record.version == 0 else 0
        return max(clock, one.stone.version if one.stone else 0)

    async def _commit(self, space: Space, prepared: list[Prepared], stacked: Stacked) -> list[UserRecord | None]:
        """Store new records of a space's model; None where one lost against another writer or against a forget."""
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
            before_them = sum(int(prepared[row].record.banks.pruned[0]) for row in kept)
            self.pruned += int(stacked.banks.pruned[kept].sum()) - before_them
            self._show(space, [prepared[row] for row in kept], replace(stacked.take(kept), records=done))
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

    def _show(self, space: Space, prepared: list[Prepared], stacked: Stacked) -> None:
        """Let the next retrieval see what was just stored."""
        names = [one.user_id for one in prepared]
        new = zip(prepared, stacked.records, strict=True)
        self._keep({one.user_id: Known(record, one.stone) for one, record in new})
        space.show(names, stacked)
        for other in self._others(space):
            other.residents.drop(names)
            other.share(zip(names, stacked.records, strict=True), self.models.spaces)
        self._note(names)

    def _others(self, space: Space) -> list[Space]:
        return [other for other in self.models.spaces.values() if other is not space]

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Give stale records the keys and states of this model; those that changed meanwhile are left alone.

        Redis is asked first what is wanted: a process that is behind must not take users back.
        """
        await self._follow()
        space = await self._wanted(request.model_version)
        self._check_distinct([user.user_id for user in request.users])
        known = await self._know({user.user_id: space for user in request.users})
        prepared: list[Prepared] = []
        records: list[UserRecord] = []
        for user in request.users:
            record = known[user.user_id].record
            if record.version == user.version and space.is_stale(record):
                accesses = [one for of in self._others(space) for one in of.residents.accesses(user.user_id)]
                records.append(space.rekeyed(record, user, accesses))
                prepared.append(Prepared(user.user_id, record, known[user.user_id].stone, plan(record, [])))
        stored = await self._commit(space, prepared, Stacked.of(records)) if records else []
        return RekeyReply([one.user_id for one, done in zip(prepared, stored, strict=True) if done is not None])

    async def forget(self, user_id: str) -> Forgotten:
        """Remove everything about a user; a tombstone keeps late retries from bringing them back."""
        with self._reaching():
            existed = await self.store.forget(user_id, time.time())
            replicas = await self.presence.look()  # after the deletion: who joins later reads Redis as it is now
        self.let_go(user_id)
        return Forgotten(existed, [one for one in replicas if one != self.presence.url])

    def let_go(self, user_id: str) -> None:
        """Nothing is kept of a user whom another replica has forgotten."""
        self._remove([user_id])

    # ------------------------------------------------------------------------------------------ inspect

    async def inspect(self, user_id: str) -> UserMemory | None:
        """A user's bank laid open; None where nothing is known."""
        known = await self._know({user_id: self.serving})
        record = known[user_id].record
        if record.version == 0:
            return None
        space = self.models.spaces.get(record.model_version)
        clusters, plane = (self.serving.clusters, None) if space is None else (space.clusters, space.plane)
        return user_memory(user_id, record, clusters, plane)

    # ------------------------------------------------------------------------------------------- models

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """A step through the users of some slots: what brings those of other models to the wanted one, which `version`
        must be.
        """
        space = await self._wanted(version)
        with self._reaching():
            cursor, names = await self.store.walk(cursor, limit, slots)
            models = await self.store.models(names)
            others = [name for name, model in zip(names, models, strict=True) if model != version]
            records = await self.store.load_readable(others)
            await self._know_items(list(records.values()))
        jobs = [wire.stale_user(user, record) for user, record in records.items() if space.is_stale(record)]
        return StalePage(cursor, len(names), self.catalogue.size, jobs)

    def model(self) -> ModelReply:
        """Which models are loaded here and what for."""
        serving, wanted = self.serving, self.models.wanted
        return ModelReply(
            serving=serving.model_version,
            wanted=wanted.model_version,
            serving_run=self.models.run_of[serving.model_version],
            wanted_run=self.models.run_of[wanted.model_version],
            users=serving.collective.known if serving.collective is not None else 0,
            moved=wanted.collective.users if wanted.collective is not None else 0,
            trouble=self.models.trouble,
        )

    async def _space(self, version: str) -> Space:
        """The space of a loaded model. Raises ModelMismatch."""
        return self.models.spaces.get(version) or await self._found_space(version)

    async def _found_space(self, version: str) -> Space:
        await self._follow_to([version])
        space = self.models.spaces.get(version)
        if space is None:
            raise ModelMismatch(f"this service serves model {self.model_version}, the call is for {version}")
        return space

    async def _wanted(self, version: str) -> Space:
        """The space that records are written for. Raises ModelMismatch where the caller means another."""
        space = await self._space(version)
        if space is not self.models.wanted:
            raise ModelMismatch(
                f"records are written for model {self.models.wanted.model_version}, the call is for {version}"
            )
        return space

    async def _follow_to(self, versions: Collection[str]) -> None:
        """Look into Redis where a model is named that is not loaded: it may have become the wanted one."""
        if not self.models.spaces.keys() >= set(versions):
            await self._follow()

    async def _follow(self) -> None:
        with suppress(StoreUnavailable), self._reaching():
            await self.models.follow()

    # ----------------------------------------------------------------------------------------- resident

    def _check_users(self, names: Sequence[str]) -> None:
        if len(names) > USERS_PER_CALL:
            raise BadRequest(f"{len(names)} users in one call, at most {USERS_PER_CALL}")

    def _check_distinct(self, names: Sequence[str]) -> None:
        self._check_users(names)
        if len(set(names)) < len(names):
            raise BadRequest("a user is named twice")

    async def _refresh(self, space: Space, users: Sequence[str]) -> bool:
        """Bring residents of these users to what Redis has; returns whether some record could not be read. Who is on a
        primary that is out of reach goes on as resident.

        One round trip compares the stamps of residents and loads the others. Other calls run while this one waits:
        whom they changed, and whoever is not at the stamp agreed on once nothing is awaited, is looked at again.
        """
        space.residents.make_room()
        agreed: dict[str, int] = {}
        pending, damaged = [name for name in dict.fromkeys(users) if name], False
        while pending:
            here = _stamps(space, pending)
            check = [name for name in pending if here[name] and agreed.get(name, here[name]) == here[name]]
            load = sorted(set(pending).difference(check))
            with self._watching() as changed:
                with self._reaching():
                    look = await self.store.look(check, load, partly=True)
                records = self.store.readable(load, look.records)
                await self._know_items(list(records.values()))
            damaged |= bool(look.lost) or len(records) < sum(data is not None for data in look.records)
            found = dict(zip(check, look.stamps, strict=True))
            found |= {name: records[name].stamp if name in records else 0 for name in load}
            if look.lost:
                pending = [name for name in pending if name not in look.lost]
                found, agreed = ({u: n for u, n in one.items() if u not in look.lost} for one in (found, agreed))
            agreed |= {name: stamp for name, stamp in found.items() if name not in changed}
            self._settle(space, [name for name in pending if name not in changed], agreed, records)
            now = _stamps(space, list(agreed))
            pending = [name for name in found if name in changed]
            pending += [name for name in agreed if now[name] != agreed[name] and name not in changed]
        return damaged

    def _settle(self, space: Space, names: list[str], agreed: dict[str, int], records: dict[str, UserRecord]) -> None:
        """Take over what was read: who is not there goes, who was loaded stays."""
        self._remove([name for name in names if agreed[name] == 0])
        new = {name: records[name] for name in names if name in records}
        space.put(new)
        self._share(list(new.items()))
        self._note(new)

    def _share(self, records: Sequence[tuple[str, UserRecord]]) -> None:
        for space in self.models.spaces.values():
            space.share(records, self.models.spaces)

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

    async def _read(self, space: Space, names: list[str]) -> dict[str, UserRecord]:
        """The readable records of these users; at start, as many as there is room for become residents. Those of other
        models matter only to the serving one's space, which keeps whom it has.
        """
        if space is not self.serving:
            models = await self.store.models(names)
            names = [name for name, model in zip(names, models, strict=True) if model == space.model_version]
        records = await self.store.load_readable(names)
        await self._know_items(list(records.values()))
        if not self.presence.is_ready:
            space.fill({name: record for name, record in records.items() if not space.is_stale(record)})
        return records

    async def _know_items(self, records: Sequence[UserRecord]) -> None:
        """No record is used that names an item which another process registered and this one does not know yet."""
        if any(record.newest_item > self.catalogue.size for record in records):
            await self.catalogue.sync()

    def _remove(self, users: Sequence[str]) -> None:
        """Nothing is known about these users any more."""
        for space in self.models.spaces.values():
            space.drop(users)
        self._note(users)
        for user in users:
            self._recent.pop(user, None)

    # ------------------------------------------------------------------------------------------- outage

    async def quota(self, request: QuotaRequest) -> QuotaReply:
        """Grant requests of an API key. Raises StoreUnavailable."""
        with self._reaching():
            return QuotaReply(await self.store.grant(request.key, request.second, request.limit, request.want))

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
        except ShardUnavailable:  # the other primaries answer
            raise
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
        while self._outage is asyncio.current_task():  # a cancellation may be lost on the way (`memory_service.tasks`)
            await asyncio.sleep(RETRY_S)
            with suppress(StoreUnavailable):
                await self.store.ping()
                self._found()


def _watched(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that nobody waits for: what ends it must not go unseen."""

    def report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("no longer kept in step with Redis", exc_info=task.exception())

    task = asyncio.create_task(work)
    task.add_done_callback(report)
    return task


def _is_for(record: UserRecord, space: Space) -> bool:
    """Whether a record may be planned for in a space: a new one is laid out for one space only."""
    return record.version > 0 or record is space.new


def _stamps(space: Space, names: list[str]) -> dict[str, int]:
    """Stamps of residents, 0 where there is none; they count as used."""
    return dict(zip(names, space.residents.stamps(space.residents.find(names)), strict=True))
