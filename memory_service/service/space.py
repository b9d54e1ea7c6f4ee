"""Spaces: all that belongs to one loaded model, namely its users' banks in memory, its collective index, its rules and
item clusters.

The banks of a space hold keys of one model, and are searched with states of that model only. No I/O; one thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from memory_service.index.collective import CollectiveScope, Loaded
from memory_service.index.gpu import Copier
from memory_service.index.residents import EMPTY_SLOT, OwnQueries, Residents
from memory_service.protocol.answer import Answer
from memory_service.protocol.plans import state_job
from memory_service.protocol.question import Question
from memory_service.protocol.vectors import Vectors
from memory_service.service.catalogue import Catalogue
from memory_service.settings import MemorySettings
from model.checkpoint import Checkpoint
from model.memory import rules as rule
from model.memory.changes import Change, Stacked, rekey, rekey_job
from model.memory.collective.layout import cells_of
from model.memory.events import Plan
from model.memory.plane import Plane
from model.memory.record import UserRecord
from model.memory.retrieval import Entries, Retrieved
from model.memory.rules import Floats, Ints

Accesses = Sequence[tuple[int, int, float]]
"""Retrievals that no record holds yet: (item, count, time of the last)."""


class Space:
    """Banks and collective index of one model.

    Args:
        checkpoint: the model.
        catalogue: numbers of items.
        settings: `resident_users`, `collective`, `collective_users` and `collective_entries` (None: no limit).
        copier: copies indexes to a GPU; None: banks are searched on the CPU.
    """

    def __init__(
        self, checkpoint: Checkpoint, catalogue: Catalogue, settings: MemorySettings, copier: Copier | None = None
    ) -> None:
        self.model_version = checkpoint.version
        self.rules = checkpoint.config.rules
        self.dim = checkpoint.config.encoder.width
        self.new = UserRecord.new(self.dim, self.rules)
        """The record of a user of whom nothing is known."""
        self.residents = Residents(settings.resident_users, self.dim, self.rules, self.model_version, copier)
        users, entries = settings.collective_users, settings.collective_entries or 0
        self.collective = CollectiveScope(checkpoint, users, entries) if settings.collective else None
        self.is_complete = self.collective is None
        """Whether the collective index has been brought to what Redis has."""
        self.plane = Plane.of(checkpoint.key_plane)
        """Where memories are drawn."""
        self._catalogue, self._items = catalogue, checkpoint.item_ids
        self._cluster_of = dict(zip(checkpoint.item_ids, checkpoint.item_clusters[1:].tolist(), strict=True))
        self._clusters: NDArray[np.int32] = np.full(1, -1, np.int32)
        self.know_items()

    def know_items(self) -> None:
        """Learn the catalogue numbers of the model's items. Must be called again once the catalogue has all of them."""
        if self.collective is not None:
            self.collective.know_items(np.array([0, *map(self._catalogue.number_of, self._items)], np.int64))

    @property
    def clusters(self) -> NDArray[np.int32]:
        """Catalogue number → item cluster of the model, (items + 1,); −1 for number 0 and for unknown items."""
        new = self._catalogue.ids[len(self._clusters) - 1 :]
        if new:
            clusters = np.array([self._cluster_of.get(item, -1) for item in new], np.int32)
            self._clusters = np.concatenate([self._clusters, clusters])
        return self._clusters

    def is_stale(self, record: UserRecord) -> bool:
        """Whether the keys of a record are another model's."""
        return record.version > 0 and record.model_version != self.model_version

    # ----------------------------------------------------------------------------------------- retrieve

    def stale_rows(self, users: Sequence[str]) -> dict[int, str]:
        """Rows of residents whose records belong to another model → that model's version."""
        slots = self.residents.slots(users)
        rows = np.flatnonzero(self.residents.stale[slots]).tolist()
        return {row: self.residents.model_of[int(slots[row])] for row in rows}

    def answer(
        self, question: Question, altered: Mapping[int, UserRecord | None], *, with_others: bool, is_degraded: bool
    ) -> Answer:
        """All that the residents tell about the users of a question. Users whose records belong to another model, and
        users who are not resident, come back as not known.

        Args:
            question: its arrays must have full length, as those that `Question.unpacked` makes.
            altered: rows → the record that answers for the user this time; None: the user is not known.
            with_others: whether memories of other users may be given.
            is_degraded: what the answer says of itself.
        """
        records = {row: record for row, record in altered.items() if record is not None}
        slots = self.residents.find(question.users)
        slots[self.residents.stale[slots]] = EMPTY_SLOT
        slots[[row for row in altered if row not in records]] = EMPTY_SLOT
        with self.residents.guests(list(records.values()), self.clusters) as guests:
            slots[list(records)] = guests
            answer = self._answer(question, slots, with_others)
        jobs = {row: state_job(record) for row, record in records.items()}
        return replace(answer, degraded=is_degraded, without=jobs)

    def _answer(self, question: Question, slots: Ints, with_others: bool) -> Answer:
        banks = self.residents
        states, entropy = banks.state[slots], self._entropy(question, slots)
        queries, last = question.queries_or(rule.unit(states)), question.last_or(banks.last[slots])
        found = banks.search(OwnQueries(slots, queries, question.k, question.now))
        banks.count(slots, found, ~question.uncounted, time.time())
        collective_k = self._collective_k(question, queries, entropy)
        versions = banks.version[slots]
        return Answer(
            retrieved=Retrieved(
                entropy=entropy,
                k=found.k,
                bank_size=banks.size[slots].astype(np.int64),
                own=found.entries,
                collective=self._others(question, queries, last, collective_k if with_others else None),
                collective_k=collective_k,
                habits=found.habits,
                present=found.present,
            ),
            known=versions != 0,
            versions=versions,
            states=states,
            seen=[banks.seen[slot] for slot in slots.tolist()],
            degraded=False,
            catalogue_size=self._catalogue.size,
        )

    def _entropy(self, question: Question, slots: Ints) -> NDArray[np.float32]:
        """(B,) entropy of each bank; for users without memories that of the question, if it names any."""
        own = self.residents.entropy[slots]
        if question.entropy is None:
            return own
        return np.where(self.residents.size[slots] > 0, own, question.entropy).astype(np.float32)

    def _collective_k(self, question: Question, queries: Floats, entropy: Floats) -> NDArray[np.int64]:
        """(B,) number of memories of others that are wanted; 0 for rows without a state or query."""
        if self.collective is None:
            return np.zeros(len(entropy), np.int64)
        k = rule.collective_k(entropy, self.rules).astype(np.int64, copy=False)
        k[~queries.any(axis=1)] = 0
        k[question.alone] = 0
        return k

    def _others(self, question: Question, queries: Floats, last: Ints, k: Ints | None) -> Entries:
        """Memories of other users, K of each row; k None: none."""
        if self.collective is None or k is None:
            return Entries.empty(len(queries))
        return self.collective.search(queries, last, list(question.users), k)

    def sample(
        self, scope: CollectiveScope, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """What up to `count` randomly chosen residents would ask: queries (n, d), last items (n, L), and the slots (n,)
        of their own entries in `scope`, −1 if there are none.
        """
        users, slots = self.residents.sample(count, rng)
        return rule.unit(self.residents.state[slots]), self.residents.last[slots].astype(np.int64), scope.slots(users)

    # -------------------------------------------------------------------------------------------- write

    def change(self, user: str, record: UserRecord, plan: Plan, vectors: Vectors, first_version: int) -> Change:
        """What a planned write does to a record. Raises BadRequest if the vectors do not fit the plan or the model."""
        vectors.check(len(plan.accepted), self.dim)
        return Change(
            record=record,
            plan=plan,
            keys=vectors.keys,
            state=vectors.state,
            cells=cells_of(plan.job),
            accesses=self.residents.accesses(user),
            first_version=first_version,
            model_version=self.model_version,
        )

    def rekeyed(self, record: UserRecord, vectors: Vectors, accesses: Accesses) -> UserRecord:
        """The record with keys and state of this model, and retrievals counted under the other model. Raises BadRequest
        if the vectors do not fit the record or this model.
        """
        vectors.check(record.size, self.dim)
        new = rekey(record, self.model_version, vectors.keys, vectors.state, cells_of(rekey_job(record)), self.rules)
        new.banks.touch(0, accesses)
        return new

    # --------------------------------------------------------------------------------------------- keep

    def put(self, records: Mapping[str, UserRecord]) -> None:
        """Make the users residents with these records, of whatever model."""
        self.residents.put(list(records), list(records.values()), self.clusters)

    def share(self, records: Iterable[tuple[str, UserRecord]], loaded: Collection[str]) -> None:
        """Put the entries of these records into the collective index, if they are of this model. Entries of a user
        whose record moved to another of the `loaded` models stay, for the users who have not moved yet.
        """
        if self.collective is not None:
            self.collective.put(records, loaded)

    def put_written(self, users: list[str], stacked: Stacked) -> None:
        """Take over records of this model that were just stored, so that the next retrieval sees them. Users who are
        not resident become so only if there is room.
        """
        slots, versions = self.residents.slots(users), np.array([record.version for record in stacked.records])
        is_resident, room = slots != EMPTY_SLOT, self.residents.limit - len(self.residents)
        is_put = np.where(is_resident, self.residents.version[slots] <= versions, np.cumsum(~is_resident) <= room)
        rows = np.flatnonzero(is_put).tolist()
        if rows:
            self.residents.put_fresh([users[row] for row in rows], stacked.take(rows), self.clusters)
        if self.collective is not None:
            self.collective.put_written(users, stacked)

    def fill(self, loaded: Loaded) -> None:
        """Make as many of these users residents as there is room for, if their records are of this model."""
        rows = self._with_room(loaded.users)
        if rows:
            stacked = loaded.batch.take(rows).stacked()
            self.residents.put_fresh([loaded.users[row] for row in rows], stacked, self.clusters)
        fresh = {user: record for user, record in loaded.records.items() if not self.is_stale(record)}
        some = [list(fresh)[row] for row in self._with_room(list(fresh))]
        self.residents.put(some, [fresh[user] for user in some], self.clusters)

    def _with_room(self, users: list[str]) -> list[int]:
        """Rows of the users who are not resident, as many as there is room for."""
        absent = np.flatnonzero(self.residents.slots(users) == EMPTY_SLOT)
        return [int(row) for row in absent[: max(0, self.residents.limit - len(self.residents))]]

    def drop(self, users: Iterable[str]) -> None:
        """Hold nothing of these users."""
        names = list(users)
        self.residents.drop(names)
        if self.collective is not None:
            for user in names:
                self.collective.drop(user)
