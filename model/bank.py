"""Memory banks as plain arrays: how memories are written, forgotten and chosen. No torch, no I/O.

`Banks` holds many users' banks side by side and writes one event to each of many users at once; training and
evaluation replay whole datasets through it, the memory service the few users of a request.
`UserRecord` is all that is remembered about one user (bank, log, seen items, event ids, state), `plan` decides
what a batch of events means for it, `apply` makes the next records. `select` is the choice of K memories.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import rules as rule
from model.config import RulesConfig
from model.rules import Bools, Floats, Ints

LOG_LIMIT = 512
"""Newest (item, time) pairs kept in a user's log."""
SEEN_LIMIT = 8192
"""Items that a user is known to have had, exact up to this many; beyond, the earliest are dropped."""
EVENT_ID_LIMIT = 1024
"""Recent event ids kept for recognising retries."""
KEY = np.dtype("<f2")
UNKNOWN_POSITION = -1
"""Log position of an event older than the log: its key is the state before any item."""

ENTRY_FIELDS: dict[str, np.dtype] = {
    "item": np.dtype("<u4"),
    "cell": np.dtype("<i4"),  # the entry's list in the collective index
    "frequency": np.dtype("<u4"),
    "access": np.dtype("<u4"),
    "rating": np.dtype("<f4"),  # NaN: none
    "time": np.dtype("<f8"),
    "last_access": np.dtype("<f8"),  # 0: never
}
"""Scalar fields of a memory entry; its key (d,) fp16 is kept beside them. Order and types are the record's layout."""


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
    """What memory answers to B queries: entropy (B,) float32, k (B,) own-scope K, bank_size (B,), and the entries."""

    entropy: NDArray[np.float32]
    k: NDArray[np.int64]
    bank_size: NDArray[np.int64]
    own: Entries
    collective: Entries

    def take(self, rows: Ints | Bools | slice) -> Retrieved:
        """The same for some of the queries."""
        return Retrieved(
            self.entropy[rows],
            self.k[rows],
            self.bank_size[rows],
            self.own.take(rows),
            self.collective.take(rows),
        )


def select(similarity: Floats, valid: Bools, time: Floats, k: Ints, threshold: float) -> tuple[Ints, Bools]:
    """Choose up to k memories of each row: the most similar, at or above the threshold.

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


class Banks:
    """Memory banks of U users as arrays: fields (U, C), keys (U, C, d) fp16, size (U,). C = capacity + 1.

    Slots are in the order of insertion; the slot beyond capacity is used only while an entry is being written.
    """

    def __init__(self, users: int, dim: int, rules: RulesConfig) -> None:
        self.rules = rules
        slots = rules.capacity + 1
        self.fields = {name: np.zeros((users, slots), kind) for name, kind in ENTRY_FIELDS.items()}
        self.key = np.zeros((users, slots, dim), KEY)
        self.size = np.zeros(users, np.int64)
        self.pruned = np.zeros(users, np.int64)

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
        self, rows: Ints, item: Ints, key: Floats, time: Floats, rating: Floats, cell: Ints | None = None
    ) -> None:
        """Remember one event for each of A different users.

        An item already in the bank counts up, blends its key (EMA) and keeps the newest rating and time; another is
        inserted. A bank then over capacity is pruned.

        Args:
            rows: (A,) distinct users. item: (A,). key: (A, d) unit length. time: (A,). rating: (A,), NaN = none.
            cell: (A,) collective list of the key, 0 where there is no collective index.
        """
        at = np.arange(len(rows))
        match = self.valid(rows) & (self.fields["item"][rows] == np.asarray(item)[:, None])
        known = match.any(axis=1)
        slot = np.where(known, match.argmax(axis=1), self.size[rows])
        old = {name: values[rows, slot] for name, values in self.fields.items()}
        frequency = np.where(known, old["frequency"] + 1, 1)
        late = known & (time < old["time"])
        keep_rating = known & (late | np.isnan(rating)) & ~np.isnan(old["rating"])
        fresh = key.astype(KEY)
        blended = rule.blend_keys(self.key[rows, slot], key, frequency).astype(KEY)
        new = {
            "item": item,
            "cell": 0 if cell is None else cell,
            "frequency": frequency,
            "access": np.where(known, old["access"], 0),
            "rating": np.where(keep_rating, old["rating"], rating),
            "time": np.where(late, old["time"], time),
            "last_access": np.where(known, old["last_access"], 0.0),
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
        weak = rule.weak_entries(self.quality(rows), valid, protected, self.rules)
        keep_first = np.argsort(weak | ~valid, axis=1, kind="stable")
        for values in self.fields.values():
            values[rows] = np.take_along_axis(values[rows], keep_first, 1)
        self.key[rows] = np.take_along_axis(self.key[rows], keep_first[:, :, None], 1)
        gone = weak.sum(axis=1)
        self.size[rows] -= gone
        self.pruned[rows] += gone

    def row(self, row: int) -> Banks:
        """One user's bank, as a copy of its own."""
        one = Banks(0, self.key.shape[2], self.rules)
        one.fields = {name: values[row : row + 1].copy() for name, values in self.fields.items()}
        one.key = self.key[row : row + 1].copy()
        one.size, one.pruned = self.size[row : row + 1].copy(), self.pruned[row : row + 1].copy()
        return one

    def fitted(self, rules: RulesConfig) -> Banks:
        """These banks laid out for other rules; of a bank beyond the new capacity the best entries stay."""
        if rules.capacity == self.rules.capacity:
            return self
        fitted = Banks(len(self), self.key.shape[2], rules)
        worth = np.where(self.valid(), self.quality(), -np.inf)
        best = np.sort(np.argsort(-worth, axis=1, kind="stable")[:, : rules.capacity], axis=1)
        for name, values in self.fields.items():
            fitted.fields[name][:, : best.shape[1]] = np.take_along_axis(values, best, 1)
        fitted.key[:, : best.shape[1]] = np.take_along_axis(self.key, best[:, :, None], 1)
        fitted.size, fitted.pruned = np.minimum(self.size, rules.capacity), self.pruned.copy()
        return fitted

    def touch(self, row: int, accesses: Iterable[tuple[int, int, float]]) -> None:
        """Merge buffered retrievals (item, count, time of the last) into one bank; items gone since are skipped."""
        slots = {int(item): slot for slot, item in enumerate(self.fields["item"][row, : self.size[row]])}
        for item, count, last in accesses:
            slot = slots.get(item)
            if slot is not None:
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

    def retrieve(self, rows: Ints, query: Floats, clusters: Ints, k: int | None = None) -> Retrieved:
        """Own-scope retrieval by exact search: entropy, adaptive K and the K best memories of each user.

        Args:
            rows: (B,) users; may repeat. query: (B, d) unit length. clusters: item number → cluster.
            k: a fixed K in place of the adaptive one.
        """
        diversity = self.entropy(clusters, rows)
        size = self.size[rows]
        wanted = rule.own_k(diversity, size, self.rules) if k is None else np.minimum(k, size)
        similarity = np.einsum("bcd,bd->bc", self.key[rows].astype(np.float32), query.astype(np.float32))
        slots, chosen = select(
            similarity, self.valid(rows), self.fields["time"][rows], wanted, self.rules.similarity_threshold
        )
        own = self.describe(rows, slots, chosen, np.take_along_axis(similarity, slots, 1))
        return Retrieved(diversity, wanted, size, own, Entries.empty(len(size)))


@dataclass(frozen=True)
class Event:
    """One interaction as the memory sees it.

    `item` is a catalogue number; `time` in seconds; `timed` says that the caller gave the time; `event_id` is the
    64-bit identity of the event (0: none); `index` is its place in the caller's request.
    """

    index: int
    item: int
    time: float
    rating: float = float("nan")
    event_id: int = 0
    timed: bool = True


def event_identity(user_id: str, item_id: str, timestamp: float | None, event_id: str | None) -> int:
    """64-bit identity by which a retried event is recognised; 0 where there is neither id nor timestamp."""
    if event_id is None and timestamp is None:
        return 0
    parts = ("id", event_id) if event_id is not None else ("at", item_id, repr(float(timestamp or 0.0)))
    text = "\x1f".join((user_id, *(part or "" for part in parts)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _no_items() -> NDArray[np.uint32]:
    return np.zeros(0, "<u4")


@dataclass(frozen=True)
class UserRecord:
    """All that is remembered about one user. `banks` holds exactly this user's bank (one row).

    `version` counts the writes, `events` all events ever accepted; log_item / log_time the newest `LOG_LIMIT` of
    them in order of time; `seen` every item the user had; `state` (d,) float32 the encoder's state after all
    events, made by model `model_version`; `share` whether the bank serves the collective scope.
    """

    banks: Banks
    version: int = 0
    model_version: str = ""
    events: int = 0
    share: bool = True
    log_item: NDArray[np.uint32] = field(default_factory=_no_items)
    log_time: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0, "<f8"))
    seen: NDArray[np.uint32] = field(default_factory=_no_items)
    event_ids: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, "<u8"))
    state: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, "<f4"))

    @classmethod
    def new(cls, dim: int, rules: RulesConfig) -> UserRecord:
        """A user of whom nothing is known."""
        return cls(Banks(1, dim, rules), state=np.zeros(dim, "<f4"))

    @property
    def size(self) -> int:
        """Entries in the bank."""
        return int(self.banks.size[0])

    @property
    def log_start(self) -> int:
        """Absolute position of the first event in the log."""
        return self.events - len(self.log_item)


@dataclass(frozen=True)
class EncodeJob:
    """States that are wanted of a user's sequence.

    `items` is the known tail of the sequence, beginning at absolute position `start`. Wanted: the state before
    each of `positions` (absolute; −1 means the state before any item), and the state after the last item.
    """

    start: int
    items: Ints
    positions: Ints


@dataclass(frozen=True)
class Plan:
    """What a batch of events means for a record: the events to write in order of time, and what happens to the rest.

    `job` says which keys they need; `log_item` / `log_time` are the log with them merged in.
    """

    accepted: tuple[Event, ...]
    duplicates: tuple[int, ...]
    forgotten: tuple[int, ...]
    job: EncodeJob
    log_item: NDArray[np.uint32]
    log_time: NDArray[np.float64]


def plan(record: UserRecord, events: Sequence[Event], forgotten_until: float = -np.inf) -> Plan:
    """Sort out a batch of events for one user. Pure: the same record and events give the same plan.

    Events are taken in order of (time, arrival). Known event ids, and any timed event whose (item, time) stands in
    log or bank, are duplicates; events up to `forgotten_until` are refused (the user asked to be forgotten).
    """
    accepted, duplicates, forgotten = [], [], []
    known_ids = set(record.event_ids.tolist())
    known_times = _known_times(record)
    for event in sorted(events, key=lambda one: (one.time, one.index)):
        if event.time <= forgotten_until:
            forgotten.append(event.index)
        elif event.event_id in known_ids or (event.timed and (event.item, event.time) in known_times):
            duplicates.append(event.index)
        else:
            accepted.append(event)
            known_times.add((event.item, event.time))
            known_ids.update({event.event_id} - {0})
    return _merge(record, accepted, sorted(duplicates), sorted(forgotten))


def _known_times(record: UserRecord) -> set[tuple[int, float]]:
    known = set(zip(record.log_item.tolist(), record.log_time.tolist(), strict=True))
    fields, size = record.banks.fields, record.size
    return known | set(zip(fields["item"][0, :size].tolist(), fields["time"][0, :size].tolist(), strict=True))


def _merge(record: UserRecord, accepted: list[Event], duplicates: list[int], forgotten: list[int]) -> Plan:
    truncated = record.log_start > 0
    oldest = record.log_time[0] if truncated else -np.inf
    too_old = [event.time < oldest for event in accepted]
    inside = [event for event, old in zip(accepted, too_old, strict=True) if not old]
    time = np.concatenate([record.log_time, [event.time for event in inside]])
    item = np.concatenate([record.log_item, np.array([event.item for event in inside], "<u4")])
    order = np.argsort(time, kind="stable")  # a late event goes behind those of the same time
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    start = record.log_start + sum(too_old)
    places = iter(start + place[len(record.log_item) :])
    positions = [UNKNOWN_POSITION if old else int(next(places)) for old in too_old]
    job = EncodeJob(start, item[order], np.array(positions, np.int64))
    return Plan(tuple(accepted), tuple(duplicates), tuple(forgotten), job, item[order], time[order])


@dataclass(frozen=True)
class Change:
    """A planned batch of one user with all it needs to be applied.

    keys (n, d) unit length, one for each accepted event; state (d,) after the last event; cells (n,) collective
    lists of the keys; accesses: buffered retrievals, see `Banks.touch`; first_version: a new record's version
    follows this one (a forgotten user's versions go on).
    """

    record: UserRecord
    plan: Plan
    keys: Floats
    state: Floats
    cells: Ints
    accesses: Sequence[tuple[int, int, float]] = ()
    first_version: int = 0


def apply(changes: Sequence[Change]) -> list[UserRecord]:
    """The records after their planned batches; the given ones are left as they were. All users' events are written
    side by side: the first of each, then the second of each, and so on. Users must be distinct.
    """
    if not changes:
        return []
    banks = stack_banks([change.record.banks for change in changes])
    for row, change in enumerate(changes):
        banks.touch(row, change.accesses)
    count = np.array([len(change.plan.accepted) for change in changes])
    for nth in range(int(count.max())):
        rows = np.flatnonzero(count > nth)
        now = [changes[row] for row in rows.tolist()]
        events = [change.plan.accepted[nth] for change in now]
        banks.write(
            rows,
            np.array([event.item for event in events]),
            np.stack([change.keys[nth] for change in now]),
            np.array([event.time for event in events]),
            np.array([event.rating for event in events]),
            np.array([change.cells[nth] for change in now]),
        )
    return [_next_record(change, banks.row(row)) for row, change in enumerate(changes)]


def _next_record(change: Change, banks: Banks) -> UserRecord:
    record, accepted = change.record, change.plan.accepted
    new_ids = np.array([event.event_id for event in accepted if event.event_id], "<u8")
    taken = np.array([event.item for event in accepted], "<u4")
    return replace(
        record,
        banks=banks,
        version=max(record.version, change.first_version) + 1,
        events=record.events + len(accepted),
        log_item=change.plan.log_item[-LOG_LIMIT:],
        log_time=change.plan.log_time[-LOG_LIMIT:],
        seen=_remember(record.seen, taken)[-SEEN_LIMIT:],
        event_ids=np.concatenate([record.event_ids, new_ids])[-EVENT_ID_LIMIT:],
        state=np.asarray(change.state, "<f4"),
    )


def _remember(seen: NDArray[np.uint32], taken: NDArray[np.uint32]) -> NDArray[np.uint32]:
    new = taken[~np.isin(taken, seen)]
    first = np.sort(np.unique(new, return_index=True)[1])
    return np.concatenate([seen, new[first]])


def stack_banks(banks: Sequence[Banks]) -> Banks:
    """Copies of several users' banks side by side. At least one; all of one capacity and dimension."""
    stacked = Banks(0, banks[0].key.shape[2], banks[0].rules)
    stacked.fields = {name: np.concatenate([one.fields[name] for one in banks]) for name in ENTRY_FIELDS}
    stacked.key = np.concatenate([one.key for one in banks])
    stacked.size = np.concatenate([one.size for one in banks])
    stacked.pruned = np.concatenate([one.pruned for one in banks])
    return stacked


def rekey_job(record: UserRecord) -> EncodeJob:
    """Which states make all keys of a record anew, for another model: where each entry's item was last logged."""
    last = {int(item): place for place, item in enumerate(record.log_item)}
    items = record.banks.fields["item"][0, : record.size].tolist()
    positions = [record.log_start + last[item] if item in last else UNKNOWN_POSITION for item in items]
    return EncodeJob(record.log_start, record.log_item, np.array(positions, np.int64))


def rekey(record: UserRecord, model_version: str, keys: Floats, state: Floats, cells: Ints | None = None) -> UserRecord:
    """The record with keys (size, d) and state (d,) of another model; everything else stays."""
    old = record.banks.row(0)
    fitted = Banks(1, keys.shape[1], old.rules)
    fitted.fields, fitted.size, fitted.pruned = old.fields, old.size, old.pruned
    fitted.key[0, : record.size] = keys
    fitted.fields["cell"][0, : record.size] = 0 if cells is None else cells
    return replace(
        record,
        banks=fitted,
        version=record.version + 1,
        model_version=model_version,
        state=np.asarray(state, "<f4"),
    )
