"""All that belongs to one model: its users' banks ready to be asked, its collective index, rules and item clusters.

Banks of one space hold keys of one model; they are searched with states of that model and no other. No I/O; one thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from memory_service.index.collective import CollectiveScope
from memory_service.index.gpu import Replicate
from memory_service.index.residents import NOBODY, Found, Residents, Wish
from memory_service.protocol import wire
from memory_service.protocol.structs import RetrieveReply, RetrieveRequest, UserRekey, UserWrite
from memory_service.protocol.wire import STATE, UNIT, Prepared, column
from memory_service.service.catalogue import Catalogue
from model.checkpoint import Checkpoint
from model.memory import rules as rule
from model.memory.bank import Entries
from model.memory.collective import cells_of
from model.memory.events import Change, Stacked, UserRecord, rekey, rekey_job
from model.memory.plane import Plane
from model.memory.rules import Floats, Ints


class Space:
    """Banks and collective index of one model. `collective`: how many others must hold an item before memories of it
    are given to anybody; 0: others' memories are not kept at all. `collective_entries`: most of them that are kept; 0:
    all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        catalogue: Catalogue,
        resident_users: int,
        collective: int = 1,
        replicate: Replicate | None = None,
        collective_entries: int = 0,
    ) -> None:
        self.model_version = checkpoint.version
        self.rules = checkpoint.config.rules
        self.dim = checkpoint.config.encoder.width
        self.new = UserRecord.new(self.dim, self.rules)
        """The record of a user of whom nothing is known."""
        self.residents = Residents(resident_users, self.dim, self.rules, self.model_version, replicate)
        self.collective = CollectiveScope(checkpoint, collective, collective_entries) if collective else None
        self.complete = self.collective is None
        """Whether others' memories are all here."""
        self.plane = Plane.of(checkpoint.key_plane)
        """Where memories are drawn."""
        self._catalogue, self._items = catalogue, checkpoint.item_ids
        self._cluster_of = dict(zip(checkpoint.item_ids, checkpoint.item_clusters[1:].tolist(), strict=True))
        self._clusters: NDArray[np.int32] = np.full(1, -1, np.int32)
        self.know_items()

    def know_items(self) -> None:
        """Learn the catalogue numbers of the model's items; to be called again once the catalogue has them all."""
        if self.collective is not None:
            self.collective.know_items(np.array([0, *map(self._catalogue.number_of, self._items)], np.int64))

    @property
    def clusters(self) -> NDArray[np.int32]:
        """Item number → item cluster of the model; -1 for number 0 and for items that the model does not know."""
        new = self._catalogue.ids[len(self._clusters) - 1 :]
        if new:
            clusters = np.array([self._cluster_of.get(item, -1) for item in new], np.int32)
            self._clusters = np.concatenate([self._clusters, clusters])
        return self._clusters

    def is_stale(self, record: UserRecord) -> bool:
        """Whether a record's keys are another model's."""
        return record.version > 0 and record.model_version != self.model_version

    # ----------------------------------------------------------------------------------------- retrieve

    def answer(
        self, request: RetrieveRequest, slots: NDArray[np.int64], degraded: bool, *, others: bool
    ) -> RetrieveReply:
        """Everything about the residents in `slots`, one for each user of the request; `others`: whether memories of
        others may be given.
        """
        banks = self.residents
        entropy = self._entropy(request, slots)
        queries = wire.queries(request, rule.unit(banks.state[slots]))
        last = wire.last(request, banks.last[slots])
        found = banks.search(Wish(slots, queries, wire.asked_k(request), wire.asked_at(request)))
        self._count(request, slots, found)
        collective_k, theirs = self._others(request, queries, last, entropy, others)
        return wire.retrieve_reply(self._catalogue.size, degraded, banks, slots, entropy, found, collective_k, theirs)

    def _entropy(self, request: RetrieveRequest, slots: Ints) -> NDArray[np.float32]:
        """(B,) diversity of each bank; where there is none, what the caller says."""
        diversity = self.residents.entropy[slots]
        if not request.entropy:
            return diversity
        given = column(request.entropy, "<f4", len(diversity), "entropy")
        return np.where(self.residents.size[slots] > 0, diversity, np.clip(given, 0, 1)).astype(np.float32)

    def _others(
        self, request: RetrieveRequest, queries: Floats, last: Ints, entropy: Floats, given: bool
    ) -> tuple[Ints, Entries]:
        """Collective K and memories. Nobody can be asked about without a state or a query."""
        k = rule.collective_k(entropy, self.rules)
        k[~queries.any(axis=1)] = 0
        k[wire.rows(request.alone, len(k), "alone")] = 0
        if self.collective is None:
            return np.zeros_like(k), Entries.empty(len(k))
        return k, self.collective.search(queries, last, request.users, k) if given else Entries.empty(len(k))

    def sample(
        self, scope: CollectiveScope, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Questions of up to `count` residents chosen at random: queries (n, d), last items (n, L), and the slots (n,)
        of their own entries in `scope`, −1 where there are none.
        """
        names, slots = self.residents.sample(count, rng)
        return rule.unit(self.residents.state[slots]), self.residents.last[slots].astype(np.int64), scope.slots(names)

    def _count(self, request: RetrieveRequest, slots: Ints, found: Found) -> None:
        """Remember which memories were retrieved, until the user's next write."""
        counted = np.ones(len(slots), bool)
        counted[wire.rows(request.uncounted, len(slots), "uncounted")] = False
        self.residents.count(slots, found, counted, time.time())

    # -------------------------------------------------------------------------------------------- write

    def changes(
        self, prepared: Sequence[Prepared], writes: Sequence[UserWrite], first_versions: Sequence[int]
    ) -> list[Change]:
        """What writes do to the records that they were planned for. Raises BadRequest where vectors do not fit."""
        counts = [len(one.plan.accepted) for one in prepared]
        keys = [
            column(write.keys, "<f4", count * self.dim, "keys", UNIT)
            for write, count in zip(writes, counts, strict=True)
        ]
        return [
            Change(
                record=one.record,
                plan=one.plan,
                keys=own.reshape(-1, self.dim),
                state=column(write.state, "<f4", self.dim, "state", STATE),
                cells=cells_of(one.plan.job),
                accesses=self.residents.accesses(one.user_id),
                first_version=first,
                model_version=self.model_version,
            )
            for one, write, own, first in zip(prepared, writes, keys, first_versions, strict=True)
        ]

    def rekeyed(self, record: UserRecord, write: UserRekey, accesses: Sequence[tuple[int, int, float]]) -> UserRecord:
        """A record of another model with keys and state of this one, and retrievals counted there. Raises BadRequest
        where they do not fit.
        """
        made = column(write.keys, "<f4", record.size * self.dim, "keys", UNIT).reshape(record.size, self.dim)
        state = column(write.state, "<f4", self.dim, "state", STATE)
        new = rekey(record, self.model_version, made, state, cells_of(rekey_job(record)), self.rules)
        new.banks.touch(0, accesses)
        return new

    # --------------------------------------------------------------------------------------------- keep

    def put(self, records: Mapping[str, UserRecord]) -> None:
        """Make these the users' banks, whatever model they are of."""
        self.residents.put(list(records), list(records.values()), self.clusters)

    def share(self, records: Iterable[tuple[str, UserRecord]], loaded: Collection[str]) -> None:
        """Make these others' memories, as far as they are this model's. Who moved to another of the `loaded` models
        stays as before: those who did not move still need neighbours.
        """
        if self.collective is not None:
            self.collective.put(records, loaded)

    def show(self, names: list[str], stacked: Stacked) -> None:
        """What was just written, of this model: for the next retrieval. Banks that nobody asked for push none out."""
        slots, versions = self.residents.slots(names), np.array([record.version for record in stacked.records])
        here, room = slots != NOBODY, self.residents.limit - len(self.residents)
        shown = np.where(here, self.residents.version[slots] <= versions, np.cumsum(~here) <= room)
        rows = np.flatnonzero(shown).tolist()
        if rows:
            self.residents.put_fresh([names[row] for row in rows], stacked.take(rows), self.clusters)
        if self.collective is not None:
            self.collective.put_written(names, stacked)

    def fill(self, records: Mapping[str, UserRecord]) -> None:
        """Let as many of these become residents as there is room for."""
        absent = [name for name, slot in zip(records, self.residents.slots(list(records)), strict=True) if not slot]
        some = absent[: max(0, self.residents.limit - len(self.residents))]
        self.residents.put(some, [records[name] for name in some], self.clusters)

    def drop(self, users: Sequence[str]) -> None:
        """Nothing is known about these users any more."""
        self.residents.drop(users)
        if self.collective is not None:
            for user in users:
                self.collective.drop(user)
