"""Residents: the users whose banks are in memory, with all that retrieval needs of them, in arrays by slot.

What follows from a record alone (entropy, K, qualities) is computed once, when the record is put here, so that a
retrieval only gathers and searches. Entries are stored newest first: of equally similar memories, the one in the
earlier place is chosen, as `model.memory.retrieval.select` does. Arrays have their full length from the beginning; the
operating system provides memory only for what is used. No I/O; use it from one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from memory_service.index.gpu import Copier, GpuOwnIndex
from memory_service.index.own import OwnIndex
from model.config import RulesConfig
from model.memory import habits
from model.memory import rules as rule
from model.memory.bank import ENTRY_FIELDS, HABIT_FIELDS
from model.memory.changes import Stacked
from model.memory.collective.layout import LAST
from model.memory.record import UserRecord
from model.memory.retrieval import Entries, chosen_features, packed_items, select, select_own, tied_rows
from model.memory.rules import Bools, Ints

EMPTY_SLOT = 0
"""The slot that stands for users who are not resident: an empty bank, version 0, no state."""
SPARE = 4096
"""Slots beyond the limit, for the users of calls in progress: all their banks must be in memory at once."""
EVICT = 64
"""Banks that are evicted together; also, `limit // EVICT` more than needed are: finding the least used takes time."""
NO_ITEMS = np.zeros(0, np.uint32)
FACTS = np.dtype([("item", "<u4"), ("quality", "<f4"), ("recency", "<f4"), ("rating", "<f4")])


@dataclass(frozen=True)
class OwnQueries:
    """What is searched in the own scope of B users.

    Attributes:
        slots: (B,).
        queries: (B, d) unit length.
        k: (B,), 0 = adaptive.
        now: (B,) times of the requests in seconds; None: habits are not used.
    """

    slots: Ints
    queries: NDArray[np.float32]
    k: Ints
    now: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Found:
    """Memories found in the own scope of B users.

    Attributes:
        entries: (B, K).
        places: (B, K) their places in the bank.
        k: (B,) number of memories that was wanted.
        habits: (B, K, F), as in `model.memory.retrieval.Retrieved`; F is 0 if habits are not used.
        present: (B, P), likewise.
    """

    entries: Entries
    places: NDArray[np.int64]
    k: NDArray[np.int64]
    habits: NDArray[np.float32]
    present: NDArray[np.int64]


class Residents:
    """Banks of at most `limit` users between calls; the least recently used are evicted first.

    Habits are kept only for a model that retrieves by them (`rules.activation`).

    Args:
        limit: number of users.
        dim: of the keys.
        rules: of the model.
        model_version: of the model; records of other models are kept as stale, without their banks.
        copier: makes GPU copies of the index; None: the CPU searches.
    """

    def __init__(
        self, limit: int, dim: int, rules: RulesConfig, model_version: str, copier: Copier | None = None
    ) -> None:
        slots, places = limit + SPARE + 1, rules.capacity
        self.limit, self.rules, self.model_version = limit, rules, model_version
        self.index = GpuOwnIndex(dim, slots, places, copier) if copier else OwnIndex(dim, slots, places)
        self.version, self._checksum = np.zeros(slots, np.int64), np.zeros(slots, np.uint32)
        self.stale = np.zeros(slots, bool)
        self.model_of: dict[int, str] = {}
        """Model version of each stale record, by slot."""
        self.size = np.zeros(slots, np.int32)
        self.entropy = np.zeros(slots, np.float32)
        self.k = np.zeros(slots, np.int32)
        self.state = np.zeros((slots, dim), np.float32)
        self.last = np.zeros((slots, LAST), np.uint32)
        """Items taken last, newest first; 0 = none."""
        self._facts = np.zeros((slots, places), FACTS)
        known = HABIT_FIELDS if rules.activation else ()
        self._habits = {name: np.zeros((slots, places), ENTRY_FIELDS[name]) for name in known}
        self._occasions = np.zeros(slots if known else 0, np.int64)
        self.seen: list[NDArray[np.uint32]] = [NO_ITEMS] * slots
        self._hits = np.zeros((slots, places), np.uint32)
        self._hit_time = np.zeros((slots, places), np.float64)
        self._asked = np.zeros(slots, bool)
        self._used = np.zeros(slots, np.int64)
        self._slot: dict[str, int] = {}
        self._name: list[str] = [""] * slots
        self._free = list(range(slots - 1, EMPTY_SLOT, -1))
        self._calls = 0
        self.entropy[EMPTY_SLOT] = rule.NEUTRAL

    def __len__(self) -> int:
        return len(self._slot)

    def find(self, users: Sequence[str]) -> NDArray[np.int64]:
        """(B,) slots of users, EMPTY_SLOT for those who are not resident; marks them as just used."""
        slots = self.slots(users)
        self._calls += 1
        self._used[slots] = self._calls
        return slots

    def slots(self, users: Sequence[str]) -> NDArray[np.int64]:
        """(B,) slots of users, EMPTY_SLOT for those who are not resident."""
        return np.fromiter(map(self._slot.get, users, repeat(EMPTY_SLOT)), np.int64, len(users))

    def stamps(self, slots: Ints) -> list[int]:
        """`UserRecord.stamp` of the records in these slots; 0 for EMPTY_SLOT."""
        both = zip(self.version[slots].tolist(), self._checksum[slots].tolist(), strict=True)
        return [version << 32 | checksum for version, checksum in both]

    def make_room(self) -> None:
        """Evict the least recently used until the limit holds."""
        excess = len(self._slot) - self.limit
        if excess > 0:
            self._evict(min(excess + self.limit // EVICT, len(self._slot)))

    def put(self, users: Sequence[str], records: Sequence[UserRecord], clusters: Ints) -> None:
        """Make users (at most SPARE) residents with these records, of whatever model; others may be evicted.

        Retrievals that are not in a record yet are kept.

        Args:
            clusters: item cluster by catalogue number.
        """
        uncounted = {user: accesses for user in users if (accesses := self.accesses(user))}
        here = [record.model_version == self.model_version for record in records]
        fresh = [n for n, is_fresh in enumerate(here) if is_fresh]
        if fresh:
            self.put_fresh([users[n] for n in fresh], Stacked.of([records[n] for n in fresh]), clusters)
        for n in (n for n, is_fresh in enumerate(here) if not is_fresh):  # keys of another model cannot be searched
            slots = self._claim([users[n]])
            self._describe(slots, [records[n]])
            self._empty(slots)
            self.stale[slots], self.model_of[int(slots[0])] = True, records[n].model_version
        for user, record in zip(users, records, strict=True):
            if user in uncounted:
                self._carry_over(user, record, uncounted[user])

    def put_fresh(self, users: Sequence[str], stacked: Stacked, clusters: Ints) -> None:
        """Make users residents with these records of our model, which contain all retrievals counted so far."""
        self._fill(self._claim(users), stacked, clusters)

    def _fill(self, slots: NDArray[np.int64], stacked: Stacked, clusters: Ints) -> None:
        self._describe(slots, stacked.records)
        banks, facts = stacked.banks, stacked.entries
        width, rows = self.rules.capacity, np.arange(len(slots))[:, None]
        oldest = np.argsort(np.where(banks.valid(), banks.fields["time"], -np.inf), axis=1, kind="stable")
        newest = oldest[:, ::-1]
        places = np.empty_like(newest)
        places[rows, newest] = np.arange(newest.shape[1])
        for name in FACTS.names or ():
            self._facts[name][slots] = getattr(facts, name)[rows, newest[:, :width]]
        for name, values in self._habits.items():
            values[slots] = banks.fields[name][rows, newest[:, :width]]
        if self._habits:
            self._occasions[slots] = banks.occasions
        cluster = banks.entry_clusters(clusters)
        self.size[slots], self.entropy[slots] = banks.size, rule.entropy(facts.quality, cluster, self.rules.clusters)
        self.k[slots] = rule.own_k(self.entropy[slots], banks.size, self.rules)
        self.state[slots] = [record.state for record in stacked.records]
        self.last[slots] = last_of(stacked.records)
        self.index.put(slots, banks.key, banks.size, places)

    def _describe(self, slots: NDArray[np.int64], records: Sequence[UserRecord]) -> None:
        """Store what does not depend on the model, and no retrievals."""
        self.version[slots] = [record.version for record in records]
        self._checksum[slots] = [record.checksum for record in records]
        self.stale[slots] = False
        self._hits[slots], self._asked[slots] = 0, False
        for slot, record in zip(slots.tolist(), records, strict=True):
            self.seen[slot] = record.seen.astype(np.uint32)  # a copy: a view would keep the whole packed record

    def drop(self, users: Sequence[str]) -> None:
        """Remove users, if they are resident."""
        residents = [user for user in users if user in self._slot]
        self._release(np.array([self._slot.pop(user) for user in residents], np.int64))

    def _release(self, slots: NDArray[np.int64]) -> None:
        if not len(slots):
            return
        self._empty(slots)
        self.version[slots], self._checksum[slots], self.stale[slots], self._used[slots] = 0, 0, False, 0
        for slot in slots.tolist():
            self._name[slot], self.seen[slot] = "", NO_ITEMS
            self.model_of.pop(slot, None)
        self._free.extend(slots.tolist())

    @contextmanager
    def guests(self, records: Sequence[UserRecord], clusters: Ints) -> Iterator[NDArray[np.int64]]:
        """Slots (B,) with the banks of these records (of our model), which belong to no user and are emptied after the
        `with` block. Nothing may be awaited within it.
        """
        slots = np.array([self._free_slot() for _ in records], np.int64)
        try:
            if records:
                self._fill(slots, Stacked.of(records), clusters)
            yield slots
        finally:
            self._release(slots)

    def search(self, asked: OwnQueries) -> Found:
        """The most similar memories of each user, or the most active ones, if the model has learned an activation and
        the times of the requests are given. Exact; ties (to 6 decimals) go to the newer memory.

        Retrievals are not counted: see `count`.
        """
        wanted = np.where(asked.k > 0, asked.k, self.k[asked.slots]).astype(np.int64)
        wanted = np.minimum(wanted, self.size[asked.slots])
        if self._habits and asked.now is not None:
            return self._by_activation(asked, asked.now, wanted)
        width = int(wanted.max(initial=0))
        similarity, places = self.index.search(asked.slots, asked.queries, min(width + 1, self.rules.capacity))
        chosen = (places >= 0) & (similarity >= np.float32(self.rules.similarity_threshold))
        chosen &= np.arange(places.shape[1]) < wanted[:, None]
        tied = tied_rows(similarity, places >= 0)
        if len(tied):
            self._choose_tied(asked, tied, wanted, similarity, places, chosen)
        places, chosen = places[:, :width], chosen[:, :width]
        entries = self._entries(asked.slots, similarity[:, :width], places, chosen)
        none = np.zeros((len(places), 0), np.int64)
        return Found(entries, places, wanted, chosen_features(None, places, chosen), none)

    def _by_activation(self, asked: OwnQueries, now: NDArray[np.float64], wanted: NDArray[np.int64]) -> Found:
        """`search` by activation, among all entries: chooses as `model.memory.bank.Banks.retrieve` does."""
        slots, size = asked.slots, self.size[asked.slots]
        width = int(size.max(initial=0))
        at = np.arange(width)
        valid = at < size[:, None]
        facts = {name: values[slots, :width] for name, values in self._habits.items()}
        features = habits.features(facts, valid, self._occasions[slots], now, self.rules)
        every = np.where(valid, self.index.similarities(slots, asked.queries)[:, :width], np.float32(0))
        newest_first = np.broadcast_to(-at, valid.shape).astype(np.float64)
        best, chosen = select_own(every, features, valid, newest_first, wanted, self.rules)
        places = best.astype(np.int64, copy=False)
        entries = self._entries(slots, np.take_along_axis(every, places, 1), places, chosen)
        at_once = valid & (facts["time"] == now[:, None])
        present = packed_items(self._facts["item"][slots, :width], at_once)
        return Found(entries, places, wanted, chosen_features(features, places, chosen), present)

    def _choose_tied(
        self,
        asked: OwnQueries,
        rows: Ints,
        wanted: Ints,
        similarity: NDArray[np.float32],
        places: NDArray[np.int64],
        chosen: Bools,
    ) -> None:
        """Choose again, among all entries, in rows with ties. Writes the result to similarity, places and chosen."""
        slots, at = asked.slots[rows], np.arange(self.rules.capacity)
        usable = at < self.size[slots][:, None]
        every = self.index.similarities(slots, asked.queries[rows])
        newest_first = np.broadcast_to(-at, usable.shape).astype(np.float64)
        best, good = select(every, usable, newest_first, wanted[rows], self.rules.similarity_threshold)
        width = best.shape[1]
        places[rows, :width], chosen[rows], similarity[rows, :width] = best, False, np.take_along_axis(every, best, 1)
        chosen[rows, :width] = good

    def _entries(
        self, slots: Ints, similarity: NDArray[np.float32], places: NDArray[np.int64], chosen: Bools
    ) -> Entries:
        facts = self._facts.ravel().take(np.where(chosen, slots[:, None] * self.rules.capacity + places, 0))
        return Entries(
            item=facts["item"].astype(np.int64),
            similarity=np.where(chosen, similarity, np.float32(0)),
            quality=facts["quality"],
            recency=facts["recency"],
            rating=facts["rating"],
            valid=chosen,
        )

    def count(self, slots: Ints, found: Found, counted: Bools, now: float) -> None:
        """Count the retrievals of entries, until the user's next write stores them.

        Args:
            slots: (B,).
            found: result of `search`.
            counted: (B,) False for users whose retrievals are not counted.
            now: time in seconds.
        """
        row, column = np.nonzero(found.entries.valid & counted[:, None])
        at = slots[row] * self.rules.capacity + found.places[row, column]
        np.add.at(self._hits.reshape(-1), at, 1)
        self._hit_time.reshape(-1)[at] = now
        self._asked[slots[row]] = True

    def accesses(self, user: str) -> list[tuple[int, int, float]]:
        """Retrievals of a user's entries that are not in the record yet: (item, count, time of the last in seconds)."""
        slot = self._slot.get(user, EMPTY_SLOT)
        if not self._asked[slot]:
            return []
        places = np.flatnonzero(self._hits[slot])
        columns = (self._facts["item"][slot], self._hits[slot], self._hit_time[slot])
        return list(zip(*(column[places].tolist() for column in columns), strict=True))

    def _carry_over(self, user: str, record: UserRecord, accesses: list[tuple[int, int, float]]) -> None:
        """Keep the retrievals of entries that the new record still has; an item written since is another entry."""
        slot, size, fields = self._slot[user], record.size, record.banks.fields
        written = dict(zip(fields["item"][0, :size].tolist(), fields["time"][0, :size].tolist(), strict=True))
        place_of = {item: place for place, item in enumerate(self._facts["item"][slot, : self.size[slot]].tolist())}
        for item, count, last in accesses:
            if item in place_of and written[item] <= last:
                self._hits[slot, place_of[item]], self._hit_time[slot, place_of[item]] = count, last
                self._asked[slot] = True

    def sample(self, count: int, rng: np.random.Generator) -> tuple[list[str], NDArray[np.int64]]:
        """Up to `count` users with memories, chosen at random, and their slots."""
        filled = np.flatnonzero(self.size)
        slots = rng.choice(filled, min(count, len(filled)), replace=False)
        return [self._name[slot] for slot in slots.tolist()], slots

    def _claim(self, users: Sequence[str]) -> NDArray[np.int64]:
        """(B,) the users' slots, new ones for those who have none."""
        self._calls += 1
        return np.array([self._slot_of(user) for user in users], np.int64)

    def _slot_of(self, user: str) -> int:
        slot = self._slot.get(user)
        if slot is None:
            slot = self._free_slot()
            self._slot[user], self._name[slot], self._used[slot] = slot, user, self._calls
        return slot

    def _free_slot(self) -> int:
        if not self._free:
            self._evict(EVICT)
        return self._free.pop()

    def _evict(self, count: int) -> None:
        used = np.flatnonzero(self._used[EMPTY_SLOT + 1 :]) + EMPTY_SLOT + 1
        oldest = np.argpartition(self._used[used], count - 1)[:count]
        self.drop([self._name[slot] for slot in used[oldest].tolist()])

    def _empty(self, slots: Ints) -> None:
        self.index.drop(slots)
        self.size[slots], self.k[slots], self.entropy[slots] = 0, 0, rule.NEUTRAL
        self.state[slots], self.last[slots], self._facts[slots], self._hits[slots] = 0, 0, 0, 0
        for values in self._habits.values():
            values[slots] = 0
        if self._habits:
            self._occasions[slots] = 0


def last_of(records: Sequence[UserRecord]) -> NDArray[np.uint32]:
    """(B, LAST) the items that each user took last, newest first; 0 = none."""
    last = np.zeros((len(records), LAST), np.uint32)
    for row, record in enumerate(records):
        newest = record.log_item[: -LAST - 1 : -1]
        last[row, : len(newest)] = newest
    return last
