"""Banks in memory, ready to be asked: all that retrieval needs of a user, by slot, in arrays.

What follows from a record alone (entropy, K, qualities) is computed once, when the record is put here, so that a
retrieval only gathers and searches. Entries stand in order of time, newest first: of equally similar memories the one
in the earlier place is chosen, as `model.memory.bank.select` would. Arrays are as long as the limit says; the operating
system backs only what is used. No I/O; one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from memory_service.index.gpu import Replicate, ReplicatedOwnIndex
from memory_service.index.own import OwnIndex
from model.config import RulesConfig
from model.memory import habits
from model.memory import rules as rule
from model.memory.bank import ENTRY_FIELDS, HABIT_FIELDS, Entries, chosen_memories, packed, select, tied, told_of
from model.memory.collective import LAST
from model.memory.events import Stacked, UserRecord
from model.memory.rules import Bools, Ints

NOBODY = 0
"""The slot of users who are not here: an empty bank, version 0, no state."""
SPARE = 4096
"""Slots beyond the limit: the users of calls under way, whose banks must all be here at once."""
EVICT = 64
"""Banks, or this part of the limit, that go at once where room is wanted: looking for the least used takes a while."""
FACTS = np.dtype([("item", "<u4"), ("quality", "<f4"), ("recency", "<f4"), ("rating", "<f4")])


@dataclass(frozen=True)
class Wish:
    """What B users are asked for.

    slots (B,); queries (B, d) of unit length; k (B,): 0 = adaptive; now (B,): the times of the requests in seconds,
    none: habits are not looked at.
    """

    slots: Ints
    queries: NDArray[np.float32]
    k: Ints
    now: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Found:
    """Memories of B users: entries (B, K), their places in the bank (B, K), what K was (B,), and as of
    `model.memory.bank.Retrieved` habits (B, K, F) and present (B, P); F and P are 0 where habits were not looked at.
    """

    entries: Entries
    places: NDArray[np.int64]
    k: NDArray[np.int64]
    habits: NDArray[np.float32]
    present: NDArray[np.int64]


class Residents:
    """Banks of at most `limit` users between calls, the least recently used going first.

    What entries know about coming back is kept only for a model that retrieves by it (`rules.activation`).
    """

    def __init__(
        self, limit: int, dim: int, rules: RulesConfig, model_version: str, replicate: Replicate | None = None
    ) -> None:
        slots, places = limit + SPARE + 1, rules.capacity
        self.limit, self.rules, self.model_version = limit, rules, model_version
        self.index = ReplicatedOwnIndex(dim, slots, places, replicate) if replicate else OwnIndex(dim, slots, places)
        self.version, self._checksum = np.zeros(slots, np.int64), np.zeros(slots, np.uint32)
        self.stale = np.zeros(slots, bool)
        self.model_of: dict[int, str] = {}
        """Model version of the stale records, by slot."""
        self.size = np.zeros(slots, np.int32)
        self.entropy = np.zeros(slots, np.float32)
        self.k = np.zeros(slots, np.int32)
        self.state = np.zeros((slots, dim), np.float32)
        self.last = np.zeros((slots, LAST), np.uint32)
        """What was taken last, the newest first; 0 = nothing."""
        self._facts = np.zeros((slots, places), FACTS)
        known = HABIT_FIELDS if rules.activation else ()
        self._habits = {name: np.zeros((slots, places), ENTRY_FIELDS[name]) for name in known}
        self._occasions = np.zeros(slots if known else 0, np.int64)
        self.seen: list[bytes] = [b""] * slots
        self._hits = np.zeros((slots, places), np.uint32)
        self._hit_time = np.zeros((slots, places), np.float64)
        self._asked = np.zeros(slots, bool)
        self._used = np.zeros(slots, np.int64)
        self._slot: dict[str, int] = {}
        self._name: list[str] = [""] * slots
        self._free = list(range(slots - 1, NOBODY, -1))
        self._calls = 0
        self.entropy[NOBODY] = rule.NEUTRAL

    def __len__(self) -> int:
        return len(self._slot)

    def find(self, users: Sequence[str]) -> NDArray[np.int64]:
        """(B,) slots of users, NOBODY for those who are not here; they count as used just now."""
        slots = self.slots(users)
        self._calls += 1
        self._used[slots] = self._calls
        return slots

    def slots(self, users: Sequence[str]) -> NDArray[np.int64]:
        """(B,) slots of users, NOBODY for those who are not here."""
        return np.fromiter(map(self._slot.get, users, repeat(NOBODY)), np.int64, len(users))

    def stamps(self, slots: Ints) -> list[int]:
        """`UserRecord.stamp` of the records in these slots; 0 for NOBODY."""
        both = zip(self.version[slots].tolist(), self._checksum[slots].tolist(), strict=True)
        return [version << 32 | checksum for version, checksum in both]

    def make_room(self) -> None:
        """Let the least recently used go until the limit is kept."""
        excess = len(self._slot) - self.limit
        if excess > 0:
            self._evict(min(excess + self.limit // EVICT, len(self._slot)))

    def put(self, users: Sequence[str], records: Sequence[UserRecord], clusters: Ints) -> None:
        """Make these the users' banks (at most SPARE), whatever model they are of; others may have to go. Retrievals
        that no record holds yet are kept.

        `clusters` maps item numbers to item clusters.
        """
        uncounted = {user: accesses for user in users if (accesses := self.accesses(user))}
        here = [record.model_version == self.model_version for record in records]
        fresh = [n for n, is_fresh in enumerate(here) if is_fresh]
        if fresh:
            self.put_fresh([users[n] for n in fresh], Stacked.of([records[n] for n in fresh]), clusters)
        for n in (n for n, is_fresh in enumerate(here) if not is_fresh):  # keys of another model answer nothing
            slots = self._described([users[n]], [records[n]])
            self._empty(slots)
            self.stale[slots], self.model_of[int(slots[0])] = True, records[n].model_version
        for user, record in zip(users, records, strict=True):
            if user in uncounted:
                self._carry_over(user, record, uncounted[user])

    def put_fresh(self, users: Sequence[str], stacked: Stacked, clusters: Ints) -> None:
        """Make these the users' banks; all are of our model. Retrievals counted so far are in the records."""
        slots, banks, facts = self._described(users, stacked.records), stacked.banks, stacked.entries
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

    def _described(self, users: Sequence[str], records: Sequence[UserRecord]) -> NDArray[np.int64]:
        """Slots for the users, with what every record says, and no retrievals counted."""
        self._calls += 1
        slots = np.array([self._claim(user) for user in users], np.int64)
        self.version[slots] = [record.version for record in records]
        self._checksum[slots] = [record.checksum for record in records]
        self.stale[slots] = False
        self._hits[slots], self._asked[slots] = 0, False
        for slot, record in zip(slots.tolist(), records, strict=True):
            self.seen[slot] = record.seen.astype("<u4", copy=False).tobytes()
        return slots

    def drop(self, users: Sequence[str]) -> None:
        """Take users out; fine where they are not here."""
        there = [user for user in users if user in self._slot]
        slots = np.array([self._slot.pop(user) for user in there], np.int64)
        self._empty(slots)
        self.version[slots], self._checksum[slots], self.stale[slots], self._used[slots] = 0, 0, False, 0
        for slot in slots.tolist():
            self._name[slot], self.seen[slot] = "", b""
            self.model_of.pop(slot, None)
        self._free.extend(slots.tolist())

    @contextmanager
    def visited(self, records: Mapping[str, UserRecord], clusters: Ints) -> Iterator[None]:
        """Around an answer: banks (of our model) that are here only meanwhile. Nothing may be awaited."""
        if records:
            self.put_fresh(list(records), Stacked.of(list(records.values())), clusters)
        try:
            yield
        finally:
            self.drop(list(records))

    def search(self, wish: Wish) -> Found:
        """The memories that B users are asked for: the most similar, or where the model has learned it and the times of
        the requests are at hand, the most active. Exact; ties to 6 decimals go to the newer memory.

        Retrieved memories are not counted: see `count`.
        """
        wanted = np.where(wish.k > 0, wish.k, self.k[wish.slots]).astype(np.int64)
        wanted = np.minimum(wanted, self.size[wish.slots])
        if self._habits and wish.now is not None:
            return self._by_activation(wish, wish.now, wanted)
        width = int(wanted.max(initial=0))
        similarity, places = self.index.search(wish.slots, wish.queries, min(width + 1, self.rules.capacity))
        chosen = (places >= 0) & (similarity >= np.float32(self.rules.similarity_threshold))
        chosen &= np.arange(places.shape[1]) < wanted[:, None]
        careful = tied(similarity, places >= 0)
        if len(careful):
            self._choose(wish, careful, wanted, similarity, places, chosen)
        places, chosen = places[:, :width], chosen[:, :width]
        entries = self._entries(wish.slots, similarity[:, :width], places, chosen)
        return Found(entries, places, wanted, told_of(None, places, chosen), np.zeros((len(places), 0), np.int64))

    def _by_activation(self, wish: Wish, now: NDArray[np.float64], wanted: NDArray[np.int64]) -> Found:
        """As `model.memory.bank.Banks.retrieve` chooses, among all entries."""
        slots, size = wish.slots, self.size[wish.slots]
        width = int(size.max(initial=0))
        at = np.arange(width)
        valid = at < size[:, None]
        facts = {name: values[slots, :width] for name, values in self._habits.items()}
        told = habits.features(facts, valid, self._occasions[slots], now, self.rules)
        every = np.where(valid, self.index.similarities(slots, wish.queries)[:, :width], np.float32(0))
        newest_first = np.broadcast_to(-at, valid.shape).astype(np.float64)
        best, chosen = chosen_memories(every, told, valid, newest_first, wanted, self.rules)
        places = best.astype(np.int64, copy=False)
        entries = self._entries(slots, np.take_along_axis(every, places, 1), places, chosen)
        at_once = valid & (facts["time"] == now[:, None])
        present = packed(self._facts["item"][slots, :width], at_once)
        return Found(entries, places, wanted, told_of(told, places, chosen), present)

    def _choose(
        self,
        wish: Wish,
        rows: Ints,
        wanted: Ints,
        similarity: NDArray[np.float32],
        places: NDArray[np.int64],
        chosen: Bools,
    ) -> None:
        """Choose anew, among all entries; changes the given arrays in these rows."""
        slots, at = wish.slots[rows], np.arange(self.rules.capacity)
        usable = at < self.size[slots][:, None]
        every = self.index.similarities(slots, wish.queries[rows])
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
        """Remember which entries of slots (B,) were retrieved at `now` (seconds), until the user's next write.

        counted (B,): False where nothing is to be remembered.
        """
        row, column = np.nonzero(found.entries.valid & counted[:, None])
        at = slots[row] * self.rules.capacity + found.places[row, column]
        np.add.at(self._hits.reshape(-1), at, 1)
        self._hit_time.reshape(-1)[at] = now
        self._asked[slots[row]] = True

    def accesses(self, user: str) -> list[tuple[int, int, float]]:
        """Retrievals of a user's entries that are not in the record yet: (item, count, time of the last)."""
        slot = self._slot.get(user, NOBODY)
        if not self._asked[slot]:
            return []
        places = np.flatnonzero(self._hits[slot])
        columns = (self._facts["item"][slot], self._hits[slot], self._hit_time[slot])
        return list(zip(*(column[places].tolist() for column in columns), strict=True))

    def _carry_over(self, user: str, record: UserRecord, accesses: list[tuple[int, int, float]]) -> None:
        """Retrievals of entries that are in the new record too: those written since are others."""
        slot, size, fields = self._slot[user], record.size, record.banks.fields
        written = dict(zip(fields["item"][0, :size].tolist(), fields["time"][0, :size].tolist(), strict=True))
        place_of = {item: place for place, item in enumerate(self._facts["item"][slot, : self.size[slot]].tolist())}
        for item, count, last in accesses:
            if item in place_of and written[item] <= last:
                self._hits[slot, place_of[item]], self._hit_time[slot, place_of[item]] = count, last
                self._asked[slot] = True

    def sample(self, count: int, rng: np.random.Generator) -> tuple[list[str], NDArray[np.int64]]:
        """Up to `count` users with memories, chosen at random, and their slots."""
        there = np.flatnonzero(self.size)
        slots = rng.choice(there, min(count, len(there)), replace=False)
        return [self._name[slot] for slot in slots.tolist()], slots

    def _claim(self, user: str) -> int:
        slot = self._slot.get(user)
        if slot is None:
            if not self._free:
                self._evict(EVICT)
            slot = self._slot[user] = self._free.pop()
            self._name[slot], self._used[slot] = user, self._calls
        return slot

    def _evict(self, count: int) -> None:
        there = np.flatnonzero(self._used[NOBODY + 1 :]) + NOBODY + 1
        oldest = np.argpartition(self._used[there], count - 1)[:count]
        self.drop([self._name[slot] for slot in there[oldest].tolist()])

    def _empty(self, slots: Ints) -> None:
        self.index.drop(slots)
        self.size[slots], self.k[slots], self.entropy[slots] = 0, 0, rule.NEUTRAL
        self.state[slots], self.last[slots], self._facts[slots], self._hits[slots] = 0, 0, 0, 0
        for values in self._habits.values():
            values[slots] = 0
        if self._habits:
            self._occasions[slots] = 0


def last_of(records: Sequence[UserRecord]) -> NDArray[np.uint32]:
    """(B, LAST) what each user took last, the newest first; 0 = nothing."""
    last = np.zeros((len(records), LAST), np.uint32)
    for row, record in enumerate(records):
        newest = record.log_item[: -LAST - 1 : -1]
        last[row, : len(newest)] = newest
    return last
