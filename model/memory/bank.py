"""Memory banks as plain arrays: how memories are written, forgotten and chosen. No torch, no I/O.

`Banks` holds many users' banks side by side and writes one event to each of many users at once; training and
evaluation replay whole datasets through it, the memory service the few users of a request. `select` is the choice of
K memories. What else is remembered about a user, and what a batch of events means for it: `model.memory.events`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory import habits
from model.memory import rules as rule
from model.memory.rules import Bools, Floats, Ints

KEY = np.dtype("<f2")
TIE = 1.1e-6
"""Similarities further apart than this are not equal to 6 decimals."""
NOT_SHARED = -1
"""Cell of an entry that the collective scope leaves out."""

ENTRY_FIELDS: dict[str, np.dtype] = {
    "item": np.dtype("<u4"),
    "cell": np.dtype("<i4"),  # where the collective index files the entry, see `collective.cells`
    "frequency": np.dtype("<u4"),
    "access": np.dtype("<u4"),
    "rating": np.dtype("<f4"),  # NaN: none
    "time": np.dtype("<f8"),
    "last_access": np.dtype("<f8"),  # 0: never
    "first_time": np.dtype("<f8"),
    "occasion": np.dtype("<u4"),  # number of the user's occasion in which the item was taken last
    "sums": np.dtype(("<f4", (habits.SUMS,))),  # see `habits`
}
"""Fields of a memory entry; its key (d,) fp16 is kept beside them. Order and types are the record's layout."""
HABIT_FIELDS = ("frequency", "first_time", "time", "occasion", "sums")
"""What `habits.features` reads."""


@dataclass(frozen=True)
class Entries:
    """Memories retrieved for B queries, best first, padded to K columns.

    item (B, K) int64 (0 = padding), similarity / quality / recency / rating (B, K) float32 (rating in [0, 1]),
    valid (B, K) bool.
    """

    item: NDArray[np.int64]
    similarity: NDArray[np.float32]
    quality: NDArray[np.float32]
    recency: NDArray[np.float32]
    rating: NDArray[np.float32]
    valid: Bools

    COLUMNS = ("item", "similarity", "quality", "recency", "rating", "valid")

    @classmethod
    def empty(cls, rows: int, width: int = 0) -> Entries:
        """No memories for `rows` queries."""
        real = np.zeros((rows, width), np.float32)
        return cls(np.zeros((rows, width), np.int64), real, real, real, real, np.zeros((rows, width), bool))

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: Ints | Bools | slice) -> Entries:
        """The same for some of the queries."""
        return Entries(*(getattr(self, name)[rows] for name in self.COLUMNS))

    def first(self, k: Ints | int) -> Entries:
        """Only the best k memories of each query; k is (B,) or one number."""
        limit = np.broadcast_to(np.asarray(k), (len(self),))
        width = int(min(self.item.shape[1], limit.max(initial=0)))
        cut = {name: getattr(self, name)[:, :width] for name in self.COLUMNS}
        cut["valid"] = cut["valid"] & (np.arange(width) < limit[:, None])
        return Entries(**cut)


@dataclass(frozen=True)
class Retrieved:
    """What memory answers to B queries: entropy (B,) float32, k (B,) own-scope K, bank_size (B,), the entries of both
    scopes, collective_k (B,), habits (B, K, F) float32, the features of the own entries (`habits.features`), and
    present (B, P) int64, the items that the user takes at the very time of the request (a basket; 0 = padding). F and P
    are 0 where the model does not look at them.
    """

    entropy: NDArray[np.float32]
    k: NDArray[np.int64]
    bank_size: NDArray[np.int64]
    own: Entries
    collective: Entries
    collective_k: NDArray[np.int64]
    habits: NDArray[np.float32]
    present: NDArray[np.int64]

    @classmethod
    def nothing(cls, entropy: NDArray[np.float32], bank_size: NDArray[np.int64] | None = None) -> Retrieved:
        """No memories for users of these entropies (B,)."""
        none, zero = Entries.empty(len(entropy)), np.zeros(len(entropy), np.int64)
        size = zero.copy() if bank_size is None else bank_size
        no_habits, nobody = np.zeros((len(entropy), 0, 0), np.float32), np.zeros((len(entropy), 0), np.int64)
        return cls(entropy, zero, size, none, none, zero.copy(), no_habits, nobody)

    def take(self, rows: Ints | Bools | slice) -> Retrieved:
        """The same for some of the queries."""
        return Retrieved(
            self.entropy[rows],
            self.k[rows],
            self.bank_size[rows],
            self.own.take(rows),
            self.collective.take(rows),
            self.collective_k[rows],
            self.habits[rows],
            self.present[rows],
        )

    def first(self, k: NDArray[np.int64], collective_k: NDArray[np.int64]) -> Retrieved:
        """Only the best memories of each scope; k and collective_k (B,)."""
        own = self.own.first(k)
        return replace(
            self,
            k=k,
            own=own,
            collective=self.collective.first(collective_k),
            collective_k=collective_k,
            habits=self.habits[:, : own.item.shape[1]],
        )


def chosen_memories(
    similarity: Floats, told: NDArray[np.float32] | None, valid: Bools, time: Floats, k: Ints, rules: RulesConfig
) -> tuple[Ints, Bools]:
    """The own memories that are retrieved, as of `select`: by activation where the model has learned it and their
    features `told` (B, C, F) are at hand, else by similarity to the state.
    """
    if told is None or not rules.activation:
        return select(similarity, valid, time, k, rules.similarity_threshold)
    return select(habits.activation(told, similarity, rules), valid, time, k, -np.inf)


def packed(items: Ints, chosen: Bools) -> NDArray[np.int64]:
    """The chosen items of each row (B, C), first to last, padded with 0 to the longest row: (B, P)."""
    width = int(chosen.sum(axis=1).max(initial=0))
    order = np.argsort(~chosen, axis=1, kind="stable")[:, :width]
    return np.where(np.take_along_axis(chosen, order, 1), np.take_along_axis(items, order, 1), 0).astype(np.int64)


def told_of(told: NDArray[np.float32] | None, slots: Ints, chosen: Bools) -> NDArray[np.float32]:
    """The features (B, K, F) of the chosen slots (B, K), of those of all slots (B, C, F); F is 0 without any."""
    if told is None:
        return np.zeros((*slots.shape, 0), np.float32)
    return np.where(chosen[..., None], told[np.arange(len(slots))[:, None], slots], np.float32(0))


def select(similarity: Floats, valid: Bools, time: Floats, k: Ints, threshold: float) -> tuple[Ints, Bools]:
    """Choose up to k memories of each row: the most similar (or most active), at or above the threshold.

    Similarities are compared to 6 decimals, so that two machines choose alike; of equals the newer memory comes
    first, then the later slot.

    Args:
        similarity, valid, time: (B, C).
        k: (B,).

    Returns:
        slots (B, K) and valid (B, K), K = max(k) (at most C). Invalid places hold slot 0.
    """
    width = int(min(similarity.shape[1], np.max(k, initial=0)))
    usable = valid & (similarity >= threshold)
    newest_first = np.argsort(np.where(valid, time, -np.inf), axis=1, kind="stable")[:, ::-1]
    rounded = np.where(usable, np.round(similarity.astype(np.float64), 6), -np.inf)
    order = np.argsort(-np.take_along_axis(rounded, newest_first, 1), axis=1, kind="stable")[:, :width]
    slots = np.take_along_axis(newest_first, order, 1)
    chosen = np.take_along_axis(usable, slots, 1) & (np.arange(width) < np.asarray(k)[:, None])
    return np.where(chosen, slots, 0), chosen


def tied(similarity: NDArray[np.float32], valid: Bools) -> NDArray[np.int64]:
    """Rows in which neighbours are equal to 6 decimals, so that the order found is not yet the order chosen.

    similarity (B, K): best first. valid (B, K): what was found at all.
    """
    close = (similarity[:, :-1] - similarity[:, 1:] < TIE) & valid[:, 1:]
    rows = np.flatnonzero(close.any(axis=1))  # few: only these are rounded
    rounded = np.round(similarity[rows].astype(np.float64), 6)
    equal = (rounded[:, :-1] == rounded[:, 1:]) & valid[rows, 1:]
    return np.asarray(rows[equal.any(axis=1)], np.int64)


class Banks:
    """Memory banks of U users as arrays: fields (U, C), keys (U, C, d) fp16, size (U,). C = capacity + 1.

    occasions (U,): at how many different times the user did something, see `habits`. Slots are in the order of
    insertion; the slot beyond capacity is used only while an entry is being written.
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
        """(B, C) True where an entry is."""
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
        """(B,) diversity of each bank. `clusters` maps item numbers to item clusters (−1: none)."""
        return rule.entropy(self.quality(rows), self.entry_clusters(clusters, rows), self.rules.clusters)

    def entry_clusters(self, clusters: Ints, rows: Ints | slice = slice(None)) -> Ints:
        """(B, C) item cluster of each entry, −1 for padding and items that the model does not know."""
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
        """Remember one event for each of A different users.

        An item already in the bank counts up, blends its key (EMA) and keeps the newest rating and time; another is
        inserted. A bank then over capacity is pruned.

        Args:
            rows: (A,) distinct users. item: (A,). key: (A, d) unit length. time: (A,). rating: (A,), NaN = none.
            cell: (A,) where the collective index files the key, see `collective.cells`; one that is blended
                stays where it was. None: nowhere.
            opens: (A,) whether the user did nothing else at this time so far; None: so it is.
            ago: (A,) how many of the user's occasions came after it (a late event); None: none did.
        """
        at = np.arange(len(rows))
        opened = np.ones(len(rows), bool) if opens is None else np.asarray(opens, bool)
        back = np.zeros(len(rows), np.int64) if ago is None else ago
        between = opened & (back > 0)
        if between.any():  # an occasion among those that were: all that came after it is of the next one
            self.fields["occasion"][rows] += between[:, None] & (self.fields["time"][rows] > np.asarray(time)[:, None])
        match = self.valid(rows) & (self.fields["item"][rows] == np.asarray(item)[:, None])
        known = match.any(axis=1)
        slot = np.where(known, match.argmax(axis=1), self.size[rows])
        old = {name: values[rows, slot] for name, values in self.fields.items()}
        frequency = np.where(known, old["frequency"] + 1, 1)
        late = known & (time < old["time"])
        keep_rating = known & (late | np.isnan(rating)) & ~np.isnan(old["rating"])
        self.occasions[rows] += opened
        occasion = np.maximum(self.occasions[rows] - back, 0)
        again = habits.taken_again(old["sums"], old["time"], old["occasion"], time, occasion)
        fresh = key.astype(KEY)
        blended = fresh
        if self.rules.key_update == "ema":
            blended = rule.blend_keys(self.key[rows, slot], key, frequency).astype(KEY)
        new = {
            "item": item,
            "cell": np.where(known & (old["cell"] >= 0), old["cell"], NOT_SHARED if cell is None else cell),
            "frequency": frequency,
            "access": np.where(known, old["access"], 0),
            "rating": np.where(keep_rating, old["rating"], rating),
            "time": np.where(late, old["time"], time),
            "last_access": np.where(known, old["last_access"], 0.0),
            "first_time": np.where(known, np.minimum(old["first_time"], time), time),
            "occasion": np.where(known, np.maximum(old["occasion"], occasion), occasion),
            "sums": np.where(known[:, None], again, habits.first_taken(time)),
        }
        for name, values in new.items():
            self.fields[name][rows, slot] = values
        self.key[rows, slot] = np.where(known[:, None], blended, fresh)
        self.size[rows] += ~known
        over = self.size[rows] > self.rules.capacity
        if over.any():
            self._prune(np.asarray(rows)[over], slot[at[over]])

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
        """(B, C) what eviction goes by: the lowest is forgotten first."""
        match self.rules.eviction:
            case "quality":
                return self.quality(rows)
            case "first-in":
                return np.broadcast_to(np.arange(self.key.shape[1], dtype=np.float32), self.valid(rows).shape)
            case "random":
                return rule.scrambled(self.fields["item"][rows], self.fields["time"][rows])

    def rows(self, rows: Ints) -> Banks:
        """Some users' banks, as copies of their own."""
        return self._taken(lambda values: values[rows])

    def row(self, row: int) -> Banks:
        """One user's bank, as a copy of its own."""
        return self._taken(lambda values: values[row : row + 1].copy())

    def _taken(self, take: Callable[[NDArray[Any]], NDArray[Any]]) -> Banks:
        some = Banks.__new__(Banks)  # without making empty arrays first: a service does this for every user it writes
        some.rules = self.rules
        some.fields = {name: take(values) for name, values in self.fields.items()}
        some.key, some.size = take(self.key), take(self.size)
        some.pruned, some.occasions = take(self.pruned), take(self.occasions)
        return some

    def fitted(self, rules: RulesConfig) -> Banks:
        """These banks laid out for other rules; of a bank beyond the new capacity the best entries stay."""
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
        """Merge buffered retrievals (item, count, time of the last) into one bank.

        Skipped are items that are gone, and entries newer than the retrieval: those are not what was retrieved.
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
        """The entries at (B, K) slots of B users, with the features that fusion reads."""
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

    def everything(self) -> Entries:
        """All entries of all banks in order of their slots; similarity is 0."""
        slots = np.broadcast_to(np.arange(self.key.shape[1]), self.key.shape[:2])
        return self.describe(np.arange(len(self)), slots, self.valid(), np.zeros(slots.shape, np.float32))

    def habits(self, rows: Ints, now: Floats) -> NDArray[np.float32]:
        """(B, C, F) what all entries of these users tell at the times `now` (B,); see `habits.features`."""
        facts = {name: self.fields[name][rows] for name in HABIT_FIELDS}
        return habits.features(facts, self.valid(rows), self.occasions[rows], now, self.rules)

    def retrieve(
        self, rows: Ints, query: Floats, clusters: Ints, k: int | None = None, now: Floats | None = None
    ) -> Retrieved:
        """Own-scope retrieval by exact search: entropy, adaptive K and the K best memories of each user.

        Args:
            rows: (B,) users; may repeat. query: (B, d) unit length. clusters: item number → cluster.
            k: a fixed K in place of the adaptive one. now: (B,) times of the requests; None: habits are not looked at.
        """
        diversity = self.entropy(clusters, rows)
        size = self.size[rows]
        wanted = rule.own_k(diversity, size, self.rules) if k is None else np.minimum(k, size)
        similarity = np.einsum("bcd,bd->bc", self.key[rows].astype(np.float32), query.astype(np.float32))
        told = None if now is None else self.habits(rows, now)
        slots, chosen = chosen_memories(
            similarity, told, self.valid(rows), self.fields["time"][rows], wanted, self.rules
        )
        own = self.describe(rows, slots, chosen, np.take_along_axis(similarity, slots, 1))
        found = replace(Retrieved.nothing(diversity, size), k=wanted, own=own, habits=told_of(told, slots, chosen))
        if now is None:
            return found
        at_once = self.valid(rows) & (self.fields["time"][rows] == np.asarray(now)[:, None])
        return replace(found, present=packed(self.fields["item"][rows], at_once))


def stack_banks(banks: Sequence[Banks]) -> Banks:
    """Copies of several users' banks side by side. At least one; all of one capacity and dimension."""
    stacked = Banks.__new__(Banks)
    stacked.rules = banks[0].rules
    stacked.fields = {name: np.concatenate([one.fields[name] for one in banks]) for name in ENTRY_FIELDS}
    stacked.key = np.concatenate([one.key for one in banks])
    stacked.size = np.concatenate([one.size for one in banks])
    stacked.pruned = np.concatenate([one.pruned for one in banks])
    stacked.occasions = np.concatenate([one.occasions for one in banks])
    return stacked
