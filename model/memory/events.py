"""What a batch of events means for a user: which are new, and where they belong in the log. No torch, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from model.memory.record import UNKNOWN_POSITION, EncodeJob, UserRecord
from model.memory.rules import Bools, Floats, Ints

FEW = 4
"""Up to this many events are looked up in a record's arrays one by one."""


@dataclass(frozen=True)
class Event:
    """One interaction as written.

    index: its place in the caller's request. item: catalogue number. time: s; timed: whether the caller gave it.
    rating: NaN = none. event_id: 64-bit identity (0: none). basket: identity of the event's basket (0: none).
    """

    index: int
    item: int
    time: float
    rating: float = float("nan")
    event_id: int = 0
    timed: bool = True
    basket: int = 0


def event_identity(user_id: str, item_id: str, timestamp: float | None, event_id: str | None) -> int:
    """64-bit identity by which a retry of an event is recognised; 0 if it has neither id nor timestamp (s)."""
    if event_id is None and timestamp is None:
        return 0
    parts = ("id", event_id) if event_id is not None else ("at", item_id, repr(float(timestamp or 0.0)))
    return _hashed(user_id, *parts)


def basket_identity(user_id: str, basket_id: str | None) -> int:
    """64-bit identity of a user's basket; 0 if the id is None or empty."""
    return _hashed(user_id, "basket", basket_id) if basket_id else 0


def _hashed(*parts: str) -> int:
    """A 64-bit hash of several texts, never 0."""
    return int.from_bytes(blake2b("\x1f".join(parts).encode(), digest_size=8).digest(), "little") or 1


@dataclass(frozen=True)
class Plan:
    """What a batch of events means for a record.

    accepted: the events to write, in order of time; duplicates and forgotten: the `index` of those that are not.
    job: the states needed for their keys. log_item, log_time: the log that includes them.
    opens, ago: for each accepted event, whether the user did nothing else at its time before, and how many of the
    user's occasions in the log came after it. basket: identity of the basket at the newest time of the log (0: none).
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
    """Decide what a batch of events means for one user. Pure: the same record and events give the same plan.

    Events are taken in order of (time, arrival); events of a basket have the same time (`_in_order`). An event is a
    duplicate if its identity is known, or if it is timed and its (item, time) is in log or bank. Events up to
    `forgotten_until` (s) are refused: at that time the user asked to be forgotten.
    """
    accepted: list[Event] = []
    duplicates: list[int] = []
    forgotten = [event.index for event in events if event.time <= forgotten_until]
    known = _Known(record, len(events))
    for event in _in_order(record, [event for event in events if event.time > forgotten_until]):
        if event in known:
            duplicates.append(event.index)
        else:
            accepted.append(event)
            known.add(event)
    return _merge(record, accepted, sorted(duplicates), sorted(forgotten))


def _in_order(record: UserRecord, events: list[Event]) -> list[Event]:
    """Events in order of (time, arrival), where all events of a basket have the time of its first event: the newest
    time of the log if that is of the same basket, else the earliest in `events`. They count as timed, as an item counts
    once in a basket.
    """
    ordered = sorted(events, key=lambda event: (event.time, event.index)) if len(events) > 1 else events
    if not any(event.basket for event in ordered):
        return ordered
    first = {record.basket: float(record.log_time[-1])} if record.basket else {}
    for event in ordered:
        first.setdefault(event.basket, event.time)
    moved = [replace(event, time=first[event.basket], timed=True) if event.basket else event for event in ordered]
    return sorted(moved, key=lambda event: event.time)


class _Known:
    """The events that a record holds: by identity, or by (item, time) in its log or bank."""

    def __init__(self, record: UserRecord, lookups: int) -> None:
        self._record = record
        self._ids: set[int] = set()
        self._times: set[tuple[int, float]] = set()
        self._few = lookups <= FEW  # then a search of the arrays is faster than making sets
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
    now = time == event.time  # rarely true, and then mostly for the same item
    return bool(now.any()) and bool((now & (item == event.item)).any())


def _merge(record: UserRecord, accepted: list[Event], duplicates: list[int], forgotten: list[int]) -> Plan:
    """The plan for accepted events in order of time. A late event goes into the log after those of the same time."""
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
    """The basket at the newest time of a `log` that includes the accepted events; of several, the last to arrive."""
    if not accepted:
        return record.basket
    newest = [event.basket for event in accepted if event.basket and event.time == log[-1]]
    if newest:
        return newest[-1]
    return record.basket if len(record.log_time) and record.log_time[-1] == log[-1] else 0


def _occasions(log: Floats, time: Floats) -> tuple[Bools, Ints]:
    """`opens` and `ago` of a plan, for events at `time` (n,) that are added to a `log` of times; both in order."""
    opens = np.ones(len(time), bool)
    opens[1:] = time[1:] > time[:-1]
    if not len(log) or (len(time) and time[0] > log[-1]):
        return opens, np.zeros(len(time), np.int64)
    known = np.unique(log)
    later = np.searchsorted(known, time, side="right")
    return opens & ~np.isin(time, known), len(known) - later
