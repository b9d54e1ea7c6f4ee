"""Memory banks as plain arrays: how memories are written, forgotten and retrieved. No torch, no I/O.

`Banks` holds the banks of many users side by side and writes one event for each of many users at once. Training and
evaluation replay whole datasets through it; the memory service loads the few users of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory import habits
from model.memory import rules as rule
from model.memory.retrieval import Entries, Retrieved, chosen_features, packed_items, select_own
from model.memory.rules import Bools, Floats, Ints

KEY = np.dtype("<f2")
NOT_SHARED = -1
"""Cell of an entry that is not in the collective scope."""

ENTRY_FIELDS: dict[str, np.dtype] = {
    "item": np.dtype("<u4"),
    "cell": np.dtype("<i4"),  # list of the collective index that holds the entry, see `collective.layout.cells`
    "frequency": np.dtype("<u4"),
    "access": np.dtype("<u4"),
    "rating": np.dtype("<f4"),  # NaN: none
    "time": np.dtype("<f8"),
    "last_access": np.dtype("<f8"),  # 0: never
    "first_time": np.dtype("<f8"),
    "occasion": np.dtype("<u4"),  # number of the user's occasion in which the item was last taken
    "sums": np.dtype(("<f4", (habits.SUMS,))),  # see `habits`
}
"""Fields of an entry; its key (d,) fp16 is stored separately. Order and types are the layout of records."""
HABIT_FIELDS = ("frequency", "first_time", "time", "occasion", "sums")
"""The fields that `habits.features` reads."""


class Banks:
    """Memory banks of U users as arrays: fields (U, C), key (U, C, d) fp16, size, pruned and occasions (U,).

    C = capacity + 1; the last slot is used only while an entry is written. Entries are in the order of insertion.
    pruned: how many entries were forgotten. occasions: at how many different times the user did something (`habits`).
    """

    def __init__(self, users: int, dim: int, rules: RulesConfig) -> None:
        self.rules = rules
        slots = rules.capacity + 1
        self.fields = {name: np.zeros((users, slots), kind) for name, kind in ENTRY_FIELDS.items()}
        self.key = np.zeros((users, slots, dim), KEY)
        self.size = np.zeros(users, np.int64)
        self.pruned = np.zeros(users, np.int64)
        self.occasions = np.zeros(users, np.int64)

    def __len__(self) -> int:
        return len(self.size)

    def valid(self, rows: Ints | slice = slice(None)) -> Bools:
        """(B, C) True where there is an entry."""
        return np.arange(self.key.shape[1]) < self.size[rows, None]

    def recency(self, rows: Ints | slice = slice(None)) -> NDArray[np.float32]:
        """(B, C), see `rules.age_recency`."""
        return rule.age_recency(self.fields["time"][rows], self.valid(rows), self.rules)

    def quality(self, rows: Ints | slice = slice(None)) -> NDArray[np.float32]:
        """(B, C), see `rules.quality`; meaningless where not valid."""
        fields = self.fields
        return rule.quality(
            fields["frequency"][rows],
            self.recency(rows),
            fields["access"][rows],
            fields["rating"][rows],
            self.rules,
        )

    def entropy(self, clusters: Ints, rows: Ints | slice = slice(None)) -> NDArray[np.float32]:
        """(B,) entropy of each bank, see `rules.entropy`. `clusters` maps items to item clusters (−1: none)."""
        return rule.entropy(self.quality(rows), self.entry_clusters(clusters, rows), self.rules.clusters)

    def entry_clusters(self, clusters: Ints, rows: Ints | slice = slice(None)) -> Ints:
        """(B, C) item cluster of each entry; −1 for padding and for items that the model does not know."""
        return np.where(self.valid(rows), clusters[self.fields["item"][rows]], -1)

    def write(
        self,
        rows: Ints,
        item: Ints,
        key: Floats,
        time: Floats,
        rating: Floats,
        cell: Ints | None = None,
        opens: Bools | None = None,
        ago: Ints | None = None,
    ) -> None:
        """Write one event for each of A different users.

        If the item has an entry, the entry counts up, blends its key (EMA) and takes the newest time and rating;
        otherwise a new entry is inserted. A bank that then exceeds its capacity is pruned.

        Args:
            rows: (A,) distinct users. item: (A,). key: (A, d) unit length. time: (A,) s. rating: (A,), NaN = none.
            cell: (A,) list of the collective index for the key, see `collective.layout.cells`; an existing entry keeps
                its cell. None: the entries are not shared.
            opens: (A,) whether the user did nothing else at this time before; None: True for all.
            ago: (A,) how many of the user's occasions came after the event (a late event); None: 0 for all.
        """
        occasion = self._count_occasions(rows, time, opens, ago)
        match = self.valid(rows) & (self.fields["item"][rows] == np.asarray(item)[:, None])
        known = match.any(axis=1)
        slot = np.where(known, match.argmax(axis=1), self.size[rows])
        old = {name: values[rows, slot] for name, values in self.fields.items()}
        new = _updated(old, known, item, time, rating, NOT_SHARED if cell is None else cell, occasion)
        fresh = key.astype(KEY)
        blended = fresh
        if self.rules.key_update == "ema":
            blended = rule.blend_keys(self.key[rows, slot], key, new["frequency"]).astype(KEY)
        for name, values in new.items():
            self.fields[name][rows, slot] = values
        self.key[rows, slot] = np.where(known[:, None], blended, fresh)
        self.size[rows] += ~known
        over = self.size[rows] > self.rules.capacity
        if over.any():
            self._prune(np.asarray(rows)[over], slot[over])

    def _count_occasions(self, rows: Ints, time: Floats, opens: Bools | None, ago: Ints | None) -> Ints:
        """Count the events among their users' occasions; returns the number (A,) of the occasion of each event."""
        opened = np.ones(len(rows), bool) if opens is None else np.asarray(opens, bool)
        back = np.zeros(len(rows), np.int64) if ago is None else ago
        between = opened & (back > 0)
        if between.any():  # a new occasion before known ones: the numbers of those after it grow by 1
            self.fields["occasion"][rows] += between[:, None] & (self.fields["time"][rows] > np.asarray(time)[:, None])
        self.occasions[rows] += opened
        return np.asarray(np.maximum(self.occasions[rows] - back, 0), np.int64)

    def _prune(self, rows: Ints, written: Ints) -> None:
        valid = self.valid(rows)
        protected = np.arange(valid.shape[1]) == written[:, None]
        weak = rule.weak_entries(self._worth(rows), valid, protected, self.rules)
        keep_first = np.argsort(weak | ~valid, axis=1, kind="stable")
        old = np.asarray(rows)[:, None], keep_first
        for values in (*self.fields.values(), self.key):
            values[rows] = values[old]
        gone = weak.sum(axis=1)
        self.size[rows] -= gone
        self.pruned[rows] += gone

    def _worth(self, rows: Ints) -> NDArray[np.float32]:
        """(B, C) the worth of entries under `rules.eviction`: the lowest is forgotten first."""
        match self.rules.eviction:
            case "quality":
                return self.quality(rows)
            case "first-in":
                return np.broadcast_to(np.arange(self.key.shape[1], dtype=np.float32), self.valid(rows).shape)
            case "random":
                return rule.scrambled(self.fields["item"][rows], self.fields["time"][rows])

    def rows(self, rows: Ints | slice) -> Banks:
        """Copies of some users' banks; of a slice, views."""
        return self._copied(lambda values: values[rows])

    def row(self, row: int) -> Banks:
        """A copy of one user's bank."""
        return self._copied(lambda values: values[row : row + 1].copy())

    def _copied(self, take: Callable[[NDArray[Any]], NDArray[Any]]) -> Banks:
        banks = Banks.__new__(Banks)  # without allocating empty arrays first: services do this for every written user
        banks.rules = self.rules
        banks.fields = {name: take(values) for name, values in self.fields.items()}
        banks.key, banks.size = take(self.key), take(self.size)
        banks.pruned, banks.occasions = take(self.pruned), take(self.occasions)
        return banks

    def fitted(self, rules: RulesConfig) -> Banks:
        """These banks in the layout of other rules; a bank beyond the new capacity keeps its best entries."""
        if rules.capacity == self.rules.capacity:
            return self
        fitted = Banks(len(self), self.key.shape[2], rules)
        worth = np.where(self.valid(), self.quality(), -np.inf)
        best = np.sort(np.argsort(-worth, axis=1, kind="stable")[:, : rules.capacity], axis=1)
        for name, values in self.fields.items():
            fitted.fields[name][:, : best.shape[1]] = values[np.arange(len(self))[:, None], best]
        fitted.key[:, : best.shape[1]] = np.take_along_axis(self.key, best[:, :, None], 1)
        fitted.size, fitted.pruned = np.minimum(self.size, rules.capacity), self.pruned.copy()
        fitted.occasions = self.occasions.copy()
        return fitted

    def touch(self, row: int, accesses: Sequence[tuple[int, int, float]]) -> None:
        """Add buffered retrievals (item, count, time of the last in s) to the access counts of one bank.

        Retrievals of forgotten items are skipped, and so are those older than the entry, which were of an earlier one.
        """
        if not accesses:
            return
        slots = {int(item): slot for slot, item in enumerate(self.fields["item"][row, : self.size[row]])}
        for item, count, last in accesses:
            slot = slots.get(item)
            if slot is not None and self.fields["time"][row, slot] <= last:
                self.fields["access"][row, slot] += count
                self.fields["last_access"][row, slot] = max(self.fields["last_access"][row, slot], last)

    def describe(self, rows: Ints, slots: Ints, chosen: Bools, similarity: Floats) -> Entries:
        """The entries in slots (B, K) of B users, with the features that fusion reads. chosen, similarity: (B, K)."""
        at = (np.asarray(rows)[:, None], slots)
        recency = np.take_along_axis(self.recency(rows), slots, 1)
        worth = np.take_along_axis(self.quality(rows), slots, 1)
        rating = rule.rating_term(self.fields["rating"][at], self.rules)

        def masked(values: NDArray[Any]) -> NDArray[Any]:
            return np.where(chosen, values, 0)

        return Entries(
            item=masked(self.fields["item"][at].astype(np.int64)),
            similarity=masked(similarity.astype(np.float32)),
            quality=masked(worth),
            recency=masked(recency),
            rating=masked(rating),
            valid=chosen,
        )

    def all_entries(self) -> Entries:
        """All entries of all banks in the order of their slots; similarity is 0."""
        slots = np.broadcast_to(np.arange(self.key.shape[1]), self.key.shape[:2])
        return self.describe(np.arange(len(self)), slots, self.valid(), np.zeros(slots.shape, np.float32))

    def habits(self, rows: Ints, now: Floats) -> NDArray[np.float32]:
        """(B, C, F) features of all entries of these users at the times `now` (B,) in s; see `habits.features`."""
        facts = {name: self.fields[name][rows] for name in HABIT_FIELDS}
        return habits.features(facts, self.valid(rows), self.occasions[rows], now, self.rules)

    def retrieve(
        self, rows: Ints, query: Floats, clusters: Ints, k: int | None = None, now: Floats | None = None
    ) -> Retrieved:
        """Retrieve from the own scope by exact search: entropy, adaptive K and the K best memories of each user.

        Args:
            rows: (B,) users; may repeat. query: (B, d) unit length. clusters: item clusters by item.
            k: a fixed K in place of the adaptive one. now: (B,) times of the requests in s; None: without habits.
        """
        diversity, size, valid = self.entropy(clusters, rows), self.size[rows], self.valid(rows)
        wanted = rule.own_k(diversity, size, self.rules) if k is None else np.minimum(k, size)
        similarity = np.einsum("bcd,bd->bc", self.key[rows].astype(np.float32), query.astype(np.float32))
        features = None if now is None else self.habits(rows, now)
        slots, chosen = select_own(similarity, features, valid, self.fields["time"][rows], wanted, self.rules)
        own = self.describe(rows, slots, chosen, np.take_along_axis(similarity, slots, 1))
        chosen_habits = chosen_features(features, slots, chosen)
        found = replace(Retrieved.nothing(diversity, size), k=wanted, own=own, habits=chosen_habits)
        if now is None:
            return found
        at_once = valid & (self.fields["time"][rows] == np.asarray(now)[:, None])
        return replace(found, present=packed_items(self.fields["item"][rows], at_once))


def _updated(
    old: dict[str, NDArray[Any]],
    known: Bools,
    item: Ints,
    time: Floats,
    rating: Floats,
    cell: Ints | int,
    occasion: Ints,
) -> dict[str, NDArray[Any]]:
    """Fields of the entries after one event each, (A,). old: their fields before it, to be read where `known` (A,)."""
    late = known & (time < old["time"])
    keep_rating = known & (late | np.isnan(rating)) & ~np.isnan(old["rating"])
    again = habits.taken_again(old["sums"], old["time"], old["occasion"], time, occasion)
    return {
        "item": np.asarray(item),
        "cell": np.where(known & (old["cell"] >= 0), old["cell"], cell),
        "frequency": np.where(known, old["frequency"] + 1, 1),
        "access": np.where(known, old["access"], 0),
        "rating": np.where(keep_rating, old["rating"], rating),
        "time": np.where(late, old["time"], time),
        "last_access": np.where(known, old["last_access"], 0.0),
        "first_time": np.where(known, np.minimum(old["first_time"], time), time),
        "occasion": np.where(known, np.maximum(old["occasion"], occasion), occasion),
        "sums": np.where(known[:, None], again, habits.first_taken(time)),
    }


def stack_banks(banks: Sequence[Banks]) -> Banks:
    """Copies of several users' banks side by side. At least one; all of the same capacity and dimension."""
    stacked = Banks.__new__(Banks)
    stacked.rules = banks[0].rules
    stacked.fields = {name: np.concatenate([bank.fields[name] for bank in banks]) for name in ENTRY_FIELDS}
    stacked.key = np.concatenate([bank.key for bank in banks])
    stacked.size = np.concatenate([bank.size for bank in banks])
    stacked.pruned = np.concatenate([bank.pruned for bank in banks])
    stacked.occasions = np.concatenate([bank.occasions for bank in banks])
    return stacked
