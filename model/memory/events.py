"""What is remembered about one user, and what a batch of events means for it. No torch, no I/O.

`UserRecord` is all that is remembered about one user (bank, log, seen items, event ids, state), `plan` decides what a
batch of events means for it, `apply` makes the next records, `rekey` moves a record to another model, `without` says
what it would be had the user not taken some items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory import habits
from model.memory.bank import NOT_SHARED, Banks, Entries, stack_banks
from model.memory.rules import Bools, Floats, Ints

LOG_LIMIT = 512
"""Newest (item, time) pairs kept in a user's log."""
SEEN_LIMIT = 8192
"""Items that a user is known to have had, exact up to this many; beyond, the earliest are dropped."""
EVENT_ID_LIMIT = 1024
"""Recent event ids kept for recognising retries."""
FEW = 4
"""Up to this many events are looked up in a record's arrays one by one."""
UNKNOWN_POSITION = -1
"""Log position of an event older than the log: its key is the state before any item."""


@dataclass(frozen=True)
class Event:
    """One interaction as the memory sees it.

    `item` is a catalogue number; `time` in seconds; `timed` says that the caller gave the time; `event_id` is the
    64-bit identity of the event (0: none), `basket` that of the basket that it was taken in (0: none); `index` is its
    place in the caller's request.
    """

    index: int
    item: int
    time: float
    rating: float = float("nan")
    event_id: int = 0
    timed: bool = True
    basket: int = 0


def event_identity(user_id: str, item_id: str, timestamp: float | None, event_id: str | None) -> int:
    """64-bit identity by which a retried event is recognised; 0 where there is neither id nor timestamp."""
    if event_id is None and timestamp is None:
        return 0
    parts = ("id", event_id) if event_id is not None else ("at", item_id, repr(float(timestamp or 0.0)))
    return _hashed(user_id, *parts)


def basket_identity(user_id: str, basket_id: str | None) -> int:
    """64-bit identity of a user's basket; 0 where there is no id, or an empty one."""
    return _hashed(user_id, "basket", basket_id) if basket_id else 0


def _hashed(*parts: str) -> int:
    """64 bits of several texts, never 0."""
    return int.from_bytes(blake2b("\x1f".join(parts).encode(), digest_size=8).digest(), "little") or 1


def _no_items() -> NDArray[np.uint32]:
    return np.zeros(0, "<u4")


@dataclass(frozen=True)
class UserRecord:
    """All that is remembered about one user. `banks` holds exactly this user's bank (one row).

    `version` counts the writes, `events` all events ever accepted; log_item / log_time the newest `LOG_LIMIT` of
    them in order of time; `seen` every item the user had; `state` (d,) float32 the encoder's state after all
    events, made by model `model_version`; `share` whether the bank serves the collective scope; `checksum` that of the
    stored bytes (0: not stored yet); `basket` the identity of the basket that the newest time of the log is of (0: of
    none).
    """

    banks: Banks
    version: int = 0
    model_version: str = ""
    events: int = 0
    share: bool = True
    checksum: int = 0
    log_item: NDArray[np.uint32] = field(default_factory=_no_items)
    log_time: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0, "<f8"))
    seen: NDArray[np.uint32] = field(default_factory=_no_items)
    event_ids: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, "<u8"))
    state: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, "<f4"))
    basket: int = 0

    @classmethod
    def new(cls, dim: int, rules: RulesConfig) -> UserRecord:
        """A user of whom nothing is known."""
        return cls(Banks(1, dim, rules), state=np.zeros(dim, "<f4"))

    @property
    def size(self) -> int:
        """Entries in the bank."""
        return int(self.banks.size[0])

    @property
    def stamp(self) -> int:
        """Version and checksum in one number: two stored records with one stamp are one and the same. A version alone
        comes again where a store lost its last second, or forgot that it forgot. 0: nothing is known.
        """
        return self.version << 32 | self.checksum

    @property
    def newest_item(self) -> int:
        """The largest item number that occurs."""
        if len(self.seen) < SEEN_LIMIT:  # nothing was dropped: bank and log name none but these
            return int(self.seen.max(initial=0))
        columns = (self.banks.fields["item"], self.log_item, self.seen)
        return max(int(column.max(initial=0)) for column in columns)

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

    `job` says which keys they need; `log_item` / `log_time` are the log with them merged in. For each accepted event,
    `opens`: whether the user did nothing else at its time so far; `ago`: how many of the user's occasions, as far as
    the log reaches, came after it. `basket`: that of the newest time of the log.
    """

    accepted: tuple[Event, ...]
    duplicates: tuple[int, ...]
    forgotten: tuple[int, ...]
    job: EncodeJob
    log_item: NDArray[np.uint32]
    log_time: NDArray[np.float64]
    opens: Bools
    ago: Ints
    basket: int


def plan(record: UserRecord, events: Sequence[Event], forgotten_until: float = -np.inf) -> Plan:
    """Sort out a batch of events for one user. Pure: the same record and events give the same plan.

    Events are taken in order of (time, arrival), those of a basket at once (`_at_once`). Known event ids, and any timed
    event whose (item, time) stands in log or bank, are duplicates; events up to `forgotten_until` are refused (the user
    asked to be forgotten).
    """
    accepted: list[Event] = []
    duplicates: list[int] = []
    forgotten = [event.index for event in events if event.time <= forgotten_until]
    known = _Known(record, len(events))
    for event in _at_once(record, [event for event in events if event.time > forgotten_until]):
        if event in known:
            duplicates.append(event.index)
        else:
            accepted.append(event)
            known.add(event)
    return _merge(record, accepted, sorted(duplicates), sorted(forgotten))


def _at_once(record: UserRecord, events: list[Event]) -> list[Event]:
    """Events in order of (time, arrival) once those of a basket have the time of its first: the newest of the log,
    where that is of this basket, else the earliest among `events`. An item counts once in a basket, so these are timed.
    """
    ordered = sorted(events, key=lambda one: (one.time, one.index)) if len(events) > 1 else events
    if not any(event.basket for event in ordered):
        return ordered
    first = {record.basket: float(record.log_time[-1])} if record.basket else {}
    for event in ordered:
        first.setdefault(event.basket, event.time)
    moved = [replace(one, time=first[one.basket], timed=True) if one.basket else one for one in ordered]
    return sorted(moved, key=lambda one: one.time)


class _Known:
    """Which events a record has: by id, or by (item, time) in its log or bank."""

    def __init__(self, record: UserRecord, lookups: int) -> None:
        self._record = record
        self._ids: set[int] = set()
        self._times: set[tuple[int, float]] = set()
        self._few = lookups <= FEW  # then looking through the arrays is faster than making sets of them
        if not self._few:
            self._ids.update(record.event_ids.tolist())
            for item, time in self._timed():
                self._times.update(zip(item.tolist(), time.tolist(), strict=True))

    def __contains__(self, event: Event) -> bool:
        if event.event_id in self._ids or (event.timed and (event.item, event.time) in self._times):
            return True
        if not self._few:
            return False
        if event.event_id and bool((self._record.event_ids == event.event_id).any()):
            return True
        return event.timed and any(_occurs(event, item, time) for item, time in self._timed())

    def add(self, event: Event) -> None:
        self._times.add((event.item, event.time))
        self._ids.update({event.event_id} - {0})

    def _timed(self) -> tuple[tuple[Ints, Floats], ...]:
        fields, size = self._record.banks.fields, self._record.size
        bank = (fields["item"][0, :size], fields["time"][0, :size])
        return (self._record.log_item, self._record.log_time), bank


def _occurs(event: Event, item: Ints, time: Floats) -> bool:
    now = time == event.time  # rarely the case, and then seldom of another item
    return bool(now.any()) and bool((now & (item == event.item)).any())


def _merge(record: UserRecord, accepted: list[Event], duplicates: list[int], forgotten: list[int]) -> Plan:
    """The log with the accepted events (in order of time) in their places, a late one behind those of the same time."""
    log, start, count = record.log_time, record.log_start, len(accepted)
    oldest = float(log[0]) if start > 0 else -np.inf
    old = sum(event.time < oldest for event in accepted)
    inside = accepted[old:]
    time = np.concatenate([log, np.array([event.time for event in inside], "<f8")])
    item = np.concatenate([record.log_item, np.array([event.item for event in inside], "<u4")])
    positions = np.arange(start + len(log), start + len(log) + count)
    if old or (inside and len(log) and inside[0].time < log[-1]):
        order = np.argsort(time, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        time, item = time[order], item[order]
        positions[:old], positions[old:] = UNKNOWN_POSITION, start + old + rank[len(log) :]
    job = EncodeJob(start + old, item, positions)
    opens, ago = _occasions(log, np.array([event.time for event in accepted], "<f8"))
    basket = _newest_basket(record, accepted, time)
    return Plan(tuple(accepted), tuple(duplicates), tuple(forgotten), job, item, time, opens, ago, basket)


def _newest_basket(record: UserRecord, accepted: list[Event], log: Floats) -> int:
    """The basket of the newest time of a `log` that has the accepted events in it; of several, the last to come."""
    if not accepted:
        return record.basket
    here = [event.basket for event in accepted if event.basket and event.time == log[-1]]
    stays = len(record.log_time) and record.log_time[-1] == log[-1]
    return here[-1] if here else record.basket if stays else 0


def _occasions(log: Floats, time: Floats) -> tuple[Bools, Ints]:
    """`opens` and `ago` of a plan: of events at `time` (n,) that come to a `log` of times, both in order."""
    opens = np.ones(len(time), bool)
    opens[1:] = time[1:] > time[:-1]
    if not len(log) or (len(time) and time[0] > log[-1]):
        return opens, np.zeros(len(time), np.int64)
    known = np.unique(log)
    later = np.searchsorted(known, time, side="right")
    return opens & ~np.isin(time, known), len(known) - later


@dataclass(frozen=True)
class Change:
    """A planned batch of one user with all it needs to be applied.

    keys (n, d) unit length, one for each accepted event; state (d,) after the last event; cells (n,) collective
    lists of the keys; accesses: buffered retrievals, see `Banks.touch`; first_version: a new record's version
    follows this one (a forgotten user's versions go on); model_version: whose keys these are ("": as before).
    """

    record: UserRecord
    plan: Plan
    keys: Floats
    state: Floats
    cells: Ints
    accesses: Sequence[tuple[int, int, float]] = ()
    first_version: int = 0
    model_version: str = ""


@dataclass(frozen=True)
class Stacked:
    """Records of several users, and their banks side by side (in `banks`, a row each)."""

    records: list[UserRecord]
    banks: Banks

    @classmethod
    def of(cls, records: Sequence[UserRecord]) -> Stacked:
        """At least one record; all of one model."""
        return cls(list(records), stack_banks([record.banks for record in records]))

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def entries(self) -> Entries:
        """All entries in order of their slots, with the features that fusion reads."""
        return self.banks.everything()

    def take(self, rows: Sequence[int]) -> Stacked:
        """Some of them (itself, where that is all)."""
        if len(rows) == len(self):
            return self
        return Stacked([self.records[row] for row in rows], self.banks.rows(np.asarray(rows, np.int64)))


def apply(changes: Sequence[Change]) -> list[UserRecord]:
    """The records after their planned batches; the given ones are left as they were. Users must be distinct."""
    return apply_stacked(changes).records if changes else []


def apply_stacked(changes: Sequence[Change]) -> Stacked:
    """`apply` (to at least one change) that keeps the banks side by side. All users' events are written side by side:
    the first of each, then the second of each, and so on.
    """
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
            np.array([change.plan.opens[nth] for change in now]),
            np.array([change.plan.ago[nth] for change in now]),
        )
    return Stacked([_next_record(change, banks.row(row)) for row, change in enumerate(changes)], banks)


def _next_record(change: Change, banks: Banks) -> UserRecord:
    record, accepted = change.record, change.plan.accepted
    new_ids = np.array([event.event_id for event in accepted if event.event_id], "<u8")
    taken = np.array([event.item for event in accepted], "<u4")
    return UserRecord(
        banks=banks,
        version=max(record.version, change.first_version) + 1,
        model_version=change.model_version or record.model_version,
        events=record.events + len(accepted),
        share=record.share,
        log_item=change.plan.log_item[-LOG_LIMIT:],
        log_time=change.plan.log_time[-LOG_LIMIT:],
        seen=_remember(record.seen, taken)[-SEEN_LIMIT:],
        event_ids=np.concatenate([record.event_ids, new_ids])[-EVENT_ID_LIMIT:],
        state=np.asarray(change.state, "<f4"),
        basket=change.plan.basket,
    )


def _remember(seen: NDArray[np.uint32], taken: NDArray[np.uint32]) -> NDArray[np.uint32]:
    if len(taken) == 1:
        return seen if bool((seen == taken[0]).any()) else np.concatenate([seen, taken])
    new = taken[~np.isin(taken, seen)]
    first = np.sort(np.unique(new, return_index=True)[1])
    return np.concatenate([seen, new[first]])


def without(record: UserRecord, items: Sequence[int]) -> UserRecord:
    """The record as if the user had not taken these items (numbers): they are in neither bank nor log, and the state is
    to be made anew from the log (zeros until then). Itself where bank and log have none of them.

    As with a late event, other keys stay as they were written, and what was pruned does not come back. `seen` stays,
    too: it says what the user really had; so does the number of occasions.
    """
    kept = np.flatnonzero(~np.isin(record.banks.fields["item"][0, : record.size], items))
    logged = ~np.isin(record.log_item, items)
    if len(kept) == record.size and logged.all():
        return record
    banks = record.banks.row(0)
    for values in (*banks.fields.values(), banks.key):
        values[0, : len(kept)] = values[0, kept]
    banks.size[0] = len(kept)
    return replace(
        record,
        banks=banks,
        events=record.events - int((~logged).sum()),
        log_item=record.log_item[logged],
        log_time=record.log_time[logged],
        state=np.zeros_like(record.state),
    )


def with_habits(record: UserRecord) -> UserRecord:
    """A record from before habits were kept with those that its log tells of, as if they had been kept from the log's
    beginning on.

    Of an item the newest events count, as many as its frequency says: earlier ones were forgotten with an entry that
    was pruned. Where the log has no event of an entry, it is taken to have happened once, at its time, before all
    occasions of the log. There are as many occasions as the log has different times.
    """
    banks, size = record.banks.row(0), record.size
    entries = {name: values[0, :size] for name, values in banks.fields.items()}
    same = record.log_item[:, None] == entries["item"]
    event, slot = np.nonzero(same & (same[::-1].cumsum(axis=0)[::-1] <= entries["frequency"]))
    moments, occasion = np.unique(record.log_time, return_inverse=True)
    time, occasion = record.log_time[event], occasion[event] + 1
    entries["first_time"][:], entries["occasion"][:] = entries["time"], 0
    entries["first_time"][slot[::-1]], entries["occasion"][slot] = time[::-1], occasion  # of several, the last stays
    sums = habits.first_taken(entries["time"]).astype(np.float64)
    sums[slot] = 0.0
    np.add.at(sums, slot, _faded(time, entries["occasion"][slot] - occasion, entries["time"][slot] - time))
    entries["sums"][:] = sums
    banks.occasions[0] = len(moments)
    return replace(record, banks=banks)


def _faded(time: Floats, occasions: Ints, seconds: Floats) -> NDArray[np.float64]:
    """Sums (n, SUMS) of one event each, at `time` (n,), so many occasions and seconds later."""
    told = habits.first_taken(time).astype(np.float64)
    halved = (occasions[:, None] / habits.OCCASION_HALF_LIVES, seconds[:, None] / habits.DAY_S / habits.DAY_HALF_LIVES)
    times = np.concatenate(halved, axis=1)
    told[:, : times.shape[1]] *= np.exp2(-np.maximum(times, 0.0))
    return told


def rekey_job(record: UserRecord) -> EncodeJob:
    """Which states make all keys of a record anew, for another model: where each entry's item was last logged."""
    last = {int(item): place for place, item in enumerate(record.log_item)}
    items = record.banks.fields["item"][0, : record.size].tolist()
    positions = [record.log_start + last[item] if item in last else UNKNOWN_POSITION for item in items]
    return EncodeJob(record.log_start, record.log_item, np.array(positions, np.int64))


def rekey(
    record: UserRecord,
    model_version: str,
    keys: Floats,
    state: Floats,
    cells: Ints | None = None,
    rules: RulesConfig | None = None,
) -> UserRecord:
    """The record with keys (size, d) and state (d,) of another model, under its rules (of the same capacity; none: as
    before); everything else stays.
    """
    old = record.banks.row(0)
    fitted = Banks(1, keys.shape[1], rules or old.rules)
    fitted.fields, fitted.size, fitted.pruned, fitted.occasions = old.fields, old.size, old.pruned, old.occasions
    fitted.key[0, : record.size] = keys
    fitted.fields["cell"][0, : record.size] = NOT_SHARED if cells is None else cells
    return replace(
        record,
        banks=fitted,
        version=record.version + 1,
        checksum=0,
        model_version=model_version,
        state=np.asarray(state, "<f4"),
    )
