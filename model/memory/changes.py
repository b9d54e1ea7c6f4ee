"""Changes of records: write a planned batch, leave items out, take over another model's keys. No torch, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory import habits
from model.memory.bank import NOT_SHARED, Banks, stack_banks
from model.memory.events import Plan
from model.memory.record import EVENT_ID_LIMIT, LOG_LIMIT, SEEN_LIMIT, UNKNOWN_POSITION, EncodeJob, UserRecord
from model.memory.retrieval import Entries
from model.memory.rules import Floats, Ints


@dataclass(frozen=True)
class Change:
    """A planned batch of one user, with all that is needed to apply it.

    keys (n, d): of unit length, one for each accepted event. state (d,): after the last event. cells (n,): lists of the
    collective index for the keys. accesses: buffered retrievals, see `Banks.touch`. first_version: a new record's
    version follows this one, as the versions of a forgotten user go on. model_version: of the model that made the keys
    ("": as before).
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
    """Records of several users, and their banks side by side (`banks`, one row each)."""

    records: list[UserRecord]
    banks: Banks

    @classmethod
    def of(cls, records: Sequence[UserRecord]) -> Stacked:
        """At least one record; all of the same model."""
        return cls(list(records), stack_banks([record.banks for record in records]))

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def entries(self) -> Entries:
        """All entries in the order of their slots, with the features that fusion reads."""
        return self.banks.all_entries()

    def take(self, rows: Sequence[int]) -> Stacked:
        """The records of some rows; itself if these are all."""
        if len(rows) == len(self):
            return self
        return Stacked([self.records[row] for row in rows], self.banks.rows(np.asarray(rows, np.int64)))


def apply(changes: Sequence[Change]) -> list[UserRecord]:
    """The records after their planned batches, of distinct users; the given records are not changed."""
    return apply_stacked(changes).records if changes else []


def apply_stacked(changes: Sequence[Change]) -> Stacked:
    """`apply` to at least one change, keeping the banks side by side. It writes the first events of all users at
    once, then the second ones, and so on.
    """
    banks = stack_banks([change.record.banks for change in changes])
    for row, change in enumerate(changes):
        banks.touch(row, change.accesses)
    count = np.array([len(change.plan.accepted) for change in changes])
    for nth in range(int(count.max())):
        rows = np.flatnonzero(count > nth)
        active = [changes[row] for row in rows.tolist()]
        events = [change.plan.accepted[nth] for change in active]
        banks.write(
            rows,
            np.array([event.item for event in events]),
            np.stack([change.keys[nth] for change in active]),
            np.array([event.time for event in events]),
            np.array([event.rating for event in events]),
            np.array([change.cells[nth] for change in active]),
            np.array([change.plan.opens[nth] for change in active]),
            np.array([change.plan.ago[nth] for change in active]),
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
    """The record as if the user had not taken these items (catalogue numbers): without them in bank and log. Its state
    is zeros, to be encoded from the log. Returns the record itself if bank and log hold none of the items.

    Other keys, `seen` and the number of occasions stay as they are; pruned entries do not come back.
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
    """A record without habits (of an older format) with the habits that follow from its log.

    For each item its newest events count, as many as its frequency says: earlier ones belonged to an entry that was
    pruned. An entry without an event in the log counts as one event at its time, before all occasions of the log.
    The number of occasions is the number of different times in the log.
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
    """Sums (n, SUMS) of one event each at `time` (n,), faded by the given occasions and seconds (n,)."""
    sums = habits.first_taken(time).astype(np.float64)
    halved = (occasions[:, None] / habits.OCCASION_HALF_LIVES, seconds[:, None] / habits.DAY_S / habits.DAY_HALF_LIVES)
    half_lives = np.concatenate(halved, axis=1)
    sums[:, : half_lives.shape[1]] *= np.exp2(-np.maximum(half_lives, 0.0))
    return sums


def rekey_job(record: UserRecord) -> EncodeJob:
    """The states from which another model computes the keys of a record: where each entry's item was last logged."""
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
    """The record with keys (size, d) and state (d,) of another model. cells (size,): see `Change`; rules: the other
    model's, of the same capacity; None: as before. Everything else stays.
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
