"""The write path: events are planned, written with their keys, and records are rekeyed.

A write is stored only if the record is still the one that it was planned for (compare and set, atomic per user).
Otherwise the caller gets the current plan. What events mean: `model.memory.events`; what writes do: `.changes`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memory_service.protocol.plans import event_of, plan_out, refused_out, written_out
from memory_service.protocol.structs import EventIn, RekeyRequest, UserPlan, UserWritten
from memory_service.protocol.vectors import Vectors
from memory_service.service.catalogue import Catalogue
from memory_service.service.freshness import CachedUsers, Freshness
from memory_service.service.merging import Merged
from memory_service.service.models import Models
from memory_service.service.outage import Outage
from memory_service.service.recent import RecentRecord, new_token
from memory_service.service.space import Space
from memory_service.store.records import Tombstone
from memory_service.store.store import Store
from model.memory.changes import Stacked, apply_stacked
from model.memory.events import Plan, plan
from model.memory.record import UserRecord


@dataclass(frozen=True, kw_only=True)
class ToPlan:
    """One user's events in a call, the space that they are planned for, and when the call came (s). `token`: of the
    plan that was made before; "": none was.
    """

    user_id: str
    events: Sequence[EventIn]
    space: Space
    received_at: float
    token: str = ""


@dataclass(frozen=True, kw_only=True)
class ToWrite(ToPlan):
    """One user's events in a call, with the vectors that were computed by the plan from the record of `version`."""

    version: int
    vectors: Vectors


@dataclass(frozen=True)
class Planned:
    """One user's events, planned for the user's record."""

    user_id: str
    record: UserRecord
    tombstone: Tombstone | None
    plan: Plan
    token: str = ""


class Commits:
    """Stores changed records in Redis, and shows them to the next retrieval."""

    def __init__(self, store: Store, outage: Outage, models: Models, cached: CachedUsers) -> None:
        self._store, self._outage, self._models, self._cached = store, outage, models, cached
        self.pruned = 0
        """Entries that were pruned by writes of this process."""

    async def commit(self, space: Space, planned: Sequence[Planned], stacked: Stacked) -> list[UserRecord | None]:
        """Store the new records of planned users, which are of the space's model.

        Returns:
            Each record as stored; None: another writer, or a forget, was faster.

        Raises:
            StoreUnavailable: it is not known which records were stored.
        """
        users, before = [one.user_id for one in planned], [one.record.stamp for one in planned]
        with self._outage.guard():
            stored = await self._store.commit(list(zip(users, before, stacked.records, strict=True)))
            lost = await self._forgotten([one for one, record in zip(planned, stored, strict=True) if record])
        outcome = [None if user in lost else record for user, record in zip(users, stored, strict=True)]
        self._cached.recent.drop(user for user, record in zip(users, outcome, strict=True) if record is None)
        self._show(space, planned, stacked, outcome)
        return outcome

    async def _forgotten(self, stored: list[Planned]) -> set[str]:
        """Users who were forgotten while their first write was stored; what it wrote is deleted again."""
        created = [one for one in stored if one.record.version == 0]
        if not created:
            return set()
        tombstones = await self._store.tombstones([one.user_id for one in created])
        lost = set()
        for one, tombstone in zip(created, tombstones, strict=True):
            if tombstone is not None and tombstone != one.tombstone:
                await self._store.forget(one.user_id, tombstone.time)
                lost.add(one.user_id)
        return lost

    def _show(
        self, space: Space, planned: Sequence[Planned], stacked: Stacked, outcome: list[UserRecord | None]
    ) -> None:
        """Take over what was stored."""
        rows = [row for row, record in enumerate(outcome) if record is not None]
        if not rows:
            return
        done = [planned[row] for row in rows]
        self.pruned += int(stacked.banks.pruned[rows].sum()) - sum(int(one.record.banks.pruned[0]) for one in done)
        shown = replace(stacked.take(rows), records=[record for record in outcome if record is not None])
        users = [one.user_id for one in done]
        records = list(zip(users, shown.records, strict=True))
        tombstones = [one.tombstone for one in done]
        recent = zip(users, map(RecentRecord, shown.records, tombstones), strict=True)
        self._cached.recent.put(dict(recent))
        space.put_written(users, shown)
        for other in self._models.others(space):
            other.residents.drop(users)
            other.share(records, self._models.spaces)
        self._cached.note_changed(users)


class WritePath:
    """Plans and writes events, and rekeys records. Calls that wait at the same time are worked on together."""

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        models: Models,
        freshness: Freshness,
        cached: CachedUsers,
        commits: Commits,
    ) -> None:
        self._store, self._catalogue, self._models = store, catalogue, models
        self._freshness, self._cached, self._commits = freshness, cached, commits
        self._merged_plan = Merged(self._plan, lambda part: part.user_id)
        self._merged_write = Merged(self._write, lambda part: part.user_id)

    async def plan(self, parts: Sequence[ToPlan]) -> list[UserPlan]:
        """What the events of distinct users would mean. Nothing is changed."""
        return await self._merged_plan(parts)

    async def write(self, parts: Sequence[ToWrite]) -> list[UserWritten]:
        """Write the planned events of distinct users.

        Raises:
            StoreUnavailable: it is not known what was written; repeating the events is harmless (event identities).
            BadRequest: the vectors of a user do not fit.
        """
        return await self._merged_write(parts)

    async def rekey(self, space: Space, request: RekeyRequest) -> list[str]:
        """Give stale records the keys and states of the space's model; records that changed meanwhile are left alone.
        Returns the users whose records were written.
        """
        found = await self._freshness.read({user.user_id: space for user in request.users})
        planned: list[Planned] = []
        records: list[UserRecord] = []
        for user in request.users:
            record, tombstone = found[user.user_id].record, found[user.user_id].tombstone
            if record.version == user.version and space.is_stale(record):
                others = self._models.others(space)
                accesses = [access for other in others for access in other.residents.accesses(user.user_id)]
                records.append(space.rekeyed(record, Vectors.unpacked(user), accesses))
                planned.append(Planned(user.user_id, record, tombstone, plan(record, [])))
        stored = await self._commits.commit(space, planned, Stacked.of(records)) if records else []
        return [one.user_id for one, record in zip(planned, stored, strict=True) if record is not None]

    # --------------------------------------------------------------------------------------------- plan

    async def _plan(self, parts: Sequence[ToPlan]) -> list[UserPlan]:
        planned = await self._planned(parts, await self._freshness.read({part.user_id: part.space for part in parts}))
        return [
            plan_out(one.user_id, one.record, one.plan, one.token, is_stale=part.space.is_stale(one.record))
            for part, one in zip(parts, planned, strict=True)
        ]

    async def _planned(self, parts: Sequence[ToPlan], known: dict[str, RecentRecord]) -> list[Planned]:
        """Each user's events planned for the known record, or the plan that was made before."""
        new = [part for part in parts if known[part.user_id].plan_named(part.token) is None]
        numbers = await self._catalogue.numbers(event.item_id for part in new for event in part.events)
        made = {part.user_id: self._made(part, known[part.user_id], numbers) for part in new}
        self._cached.recent.put(made)
        planned = []
        for user, recent in ((part.user_id, made.get(part.user_id) or known[part.user_id]) for part in parts):
            assert recent.plan is not None
            planned.append(Planned(user, recent.record, recent.tombstone, recent.plan, recent.token))
        return planned

    def _made(self, part: ToPlan, known: RecentRecord, numbers: dict[str, int]) -> RecentRecord:
        """The record with a new plan for the events."""
        events = [event_of(part.user_id, event, numbers[event.item_id], part.received_at) for event in part.events]
        forgotten_until = known.tombstone.time if known.tombstone else -np.inf
        return replace(known, plan=plan(known.record, events, forgotten_until), token=new_token())

    # -------------------------------------------------------------------------------------------- write

    async def _write(self, parts: list[ToWrite]) -> list[UserWritten]:
        planned = await self._planned(parts, await self._known(parts))
        outdated = {row for row, part in enumerate(parts) if _is_outdated(planned[row], part)}
        rows = [row for row, one in enumerate(planned) if row not in outdated and one.plan.accepted]
        written: dict[int, UserRecord] = {}
        for space in dict.fromkeys(parts[row].space for row in rows):  # two only while users are moved to another model
            mine = [row for row in rows if parts[row].space is space]
            changes = [
                space.change(one.user_id, one.record, one.plan, parts[row].vectors, self._first_version(one))
                for row, one in ((row, planned[row]) for row in mine)
            ]
            stored = await self._commits.commit(space, [planned[row] for row in mine], apply_stacked(changes))
            written |= {row: record for row, record in zip(mine, stored, strict=True) if record is not None}
        retries = await self._retries(parts, sorted(outdated | (set(rows) - written.keys())))
        return [
            refused_out(one.user_id, one.record.version, retries[row])
            if row in retries
            else written_out(one.user_id, (written.get(row) or one.record).version, one.plan)
            for row, one in enumerate(planned)
        ]

    async def _retries(self, parts: Sequence[ToWrite], rows: list[int]) -> dict[int, UserPlan]:
        """The current plans of these rows."""
        again = [replace(parts[row], token="") for row in rows]
        return dict(zip(rows, await self._plan(again), strict=True)) if again else {}

    async def _known(self, parts: Sequence[ToWrite]) -> dict[str, RecentRecord]:
        """The records that the plans were made for, if they are kept; whether they are current, the commit will show.
        Other records are read from Redis, as is one that the commit cannot compare: if there was none yet, or if
        nothing will be written.
        """
        known = {}
        for part in parts:
            recent = self._cached.recent.get(part.user_id)
            if recent is not None and 0 < recent.record.version == part.version:
                plan = recent.plan_named(part.token)
                if plan is not None and plan.accepted:
                    known[part.user_id] = recent
        rest = {part.user_id: part.space for part in parts if part.user_id not in known}
        return known | await self._freshness.read(rest) if rest else known

    def _first_version(self, planned: Planned) -> int:
        """The version that a new record follows: that of the forgotten record, if any. If banks expire, nothing is left
        of earlier versions, so the clock (ms) makes sure that versions grow.
        """
        clock = int(time.time() * 1000) if self._store.idle_s and planned.record.version == 0 else 0
        return max(clock, planned.tombstone.version if planned.tombstone else 0)


def _is_outdated(planned: Planned, part: ToWrite) -> bool:
    """Whether the vectors of a write were not computed from the present record. If the user was forgotten between the
    plan and the first write, they contain keys for more events than are accepted now.
    """
    is_forgotten = planned.tombstone is not None and len(part.vectors.keys) > len(planned.plan.accepted)
    return planned.record.version != part.version or part.space.is_stale(planned.record) or is_forgotten
