"""Between the wire's structs (`structs`) and the service's arrays and records. No state, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.index.residents import Found, Residents
from memory_service.protocol.structs import (
    Columns,
    EventIn,
    Job,
    RetrieveReply,
    RetrieveRequest,
    StaleUser,
    UserPlan,
    UserWritten,
)
from memory_service.store.store import Tombstone
from model.memory.bank import Entries
from model.memory.events import EncodeJob, Event, Plan, UserRecord, basket_identity, event_identity, rekey_job
from model.memory.rules import Floats, Ints

UNIT = 1.01
"""No number of a vector of unit length exceeds it, however it was rounded."""
STATE = 65504.0
"""Far beyond any state's numbers, and far within what their squares may reach."""
TIME = 1e11
"""The latest time in seconds; from here on it would be milliseconds."""
RATING = 1e9
"""The largest rating, far inside what a memory entry (32 bits) can hold."""


class BadRequest(ValueError):  # noqa: N818 - answered with 422
    """Columns of a request do not fit together; says which."""


@dataclass(frozen=True)
class Prepared:
    """One user's events against their record as of now."""

    user_id: str
    record: UserRecord
    stone: Tombstone | None
    plan: Plan


def column(data: bytes, kind: str, count: int, name: str, limit: float = np.inf) -> NDArray[Any]:
    """Bytes as numbers. Raises BadRequest where they are not `count` finite ones of at most `limit` in size."""
    if len(data) != count * np.dtype(kind).itemsize:
        raise BadRequest(f"{name} has {len(data)} bytes, wanted {count} values of {np.dtype(kind).itemsize}")
    values = np.frombuffer(data, kind)
    if not np.isfinite(values).all():
        raise BadRequest(f"{name} holds a number that is not finite")
    if limit < np.inf and np.abs(values).max(initial=0) > limit:
        raise BadRequest(f"{name} holds a number beyond {limit}")
    return values


def rows(named: Sequence[int], count: int, name: str) -> list[int]:
    """Rows that a request names. Raises BadRequest where there is no such row."""
    for row in named:
        if not 0 <= row < count:
            raise BadRequest(f"{name} names row {row} of {count}")
    return list(named)


def queries(request: RetrieveRequest, own: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, d) of unit length: `own` (which is changed), or what the caller sent instead."""
    at = column(request.query_rows, "<u4", len(request.query_rows) // 4, "query_rows")
    given = column(request.queries, "<f4", len(at) * own.shape[1], "queries", UNIT)
    if len(at) and at.max() >= len(own):
        raise BadRequest(f"query_rows names row {at.max()} of {len(own)}")
    own[at] = given.reshape(len(at), own.shape[1])
    return own


def last(request: RetrieveRequest, own: NDArray[np.uint32]) -> NDArray[np.int64]:
    """(B, L) the items that were taken last: `own`, or what the caller sent instead."""
    at = np.frombuffer(request.query_rows, "<u4")
    taken = own.astype(np.int64)
    if request.last:
        given = column(request.last, "<u4", len(at) * own.shape[1], "last").reshape(len(at), -1)
        told = given.any(axis=1)
        taken[at[told]] = given[told]
    return taken


def asked_k(request: RetrieveRequest) -> NDArray[np.int64]:
    """(B,) K that the caller wants; 0 = adaptive."""
    count = len(request.users)
    if not request.k:
        return np.zeros(count, np.int64)
    return np.maximum(column(request.k, "<i4", count, "k").astype(np.int64), 0)


def asked_at(request: RetrieveRequest) -> NDArray[np.float64] | None:
    """(B,) times of the requests in seconds; None: habits are not asked about. Raises BadRequest."""
    return column(request.now, "<f8", len(request.users), "now", TIME) if request.now else None


def ignored(request: RetrieveRequest) -> dict[int, list[int]]:
    """Row → numbers of items that the user is taken not to have had."""
    rows(list(request.ignore), len(request.users), "ignore")
    return {row: items for row, items in request.ignore.items() if items}


def retrieve_reply(
    catalogue_size: int,
    degraded: bool,
    banks: Residents,
    slots: NDArray[np.int64],
    entropy: Floats,
    found: Found,
    collective_k: Ints,
    others: Entries,
) -> RetrieveReply:
    """What was found about the users in `slots` (B,)."""
    versions = banks.version[slots]
    seen = [banks.seen[slot] for slot in slots.tolist()]
    return RetrieveReply(
        catalogue_size=catalogue_size,
        degraded=degraded,
        known=(versions != 0).astype("u1").tobytes(),
        versions=versions.astype("<i8").tobytes(),
        entropy=entropy.astype("<f4").tobytes(),
        k=found.k.astype("<i4").tobytes(),
        collective_k=collective_k.astype("<i4").tobytes(),
        bank_size=banks.size[slots].astype("<i4").tobytes(),
        states=banks.state[slots].astype("<f4").tobytes(),
        own=Columns.pack(found.entries),
        collective=Columns.pack(others),
        seen_count=(np.array([len(one) for one in seen], "<i4") // 4).tobytes(),
        seen=b"".join(seen),
        stale=[],
        habits=found.habits[found.entries.valid].astype("<f4").tobytes(),
        present_count=(found.present > 0).sum(axis=1).astype("<i4").tobytes() if found.present.shape[1] else b"",
        present=found.present[found.present > 0].astype("<u4").tobytes(),
    )


def stale_user(user_id: str, record: UserRecord) -> StaleUser:
    """What brings a record to the present model."""
    return StaleUser(user_id, record.version, Job.pack(rekey_job(record)))


def state_job(record: UserRecord) -> Job:
    """What makes the state after everything in a record's log."""
    return Job.pack(EncodeJob(record.log_start, record.log_item, np.zeros(0, np.int64)))


def event(user_id: str, one: EventIn, number: int, received_at: float) -> Event:
    """An event of the wire as the memory sees it; `number` is its item's. Raises BadRequest for impossible numbers."""
    when = received_at if one.timestamp is None else one.timestamp
    if not abs(when) <= TIME or not abs(one.rating or 0) <= RATING:  # not so for NaN either
        raise BadRequest(f"event {one.index} of a user has the time {when} and the rating {one.rating}")
    return Event(
        index=one.index,
        item=number,
        time=when,
        rating=float("nan") if one.rating is None else one.rating,
        event_id=event_identity(user_id, one.item_id, one.timestamp, one.event_id),
        timed=one.timestamp is not None,
        basket=basket_identity(user_id, one.basket_id),
    )


def plan_out(one: Prepared, stale: bool) -> UserPlan:
    """A plan for the caller; `stale`: the record must be keyed anew first."""
    record, planned = one.record, one.plan
    return UserPlan(
        user_id=one.user_id,
        version=record.version,
        accepted=[event.index for event in planned.accepted],
        duplicates=list(planned.duplicates),
        forgotten=list(planned.forgotten),
        job=Job.pack(planned.job),
        stale=stale_user(one.user_id, record) if stale else None,
    )


def written_out(one: Prepared, record: UserRecord | None, retry: UserPlan | None) -> UserWritten:
    """The outcome of a write: the new record (None: nothing was to be written), or the plan to try again with."""
    planned = one.plan
    if retry is not None:
        return UserWritten(one.user_id, one.record.version, [], [], [], retry)
    return UserWritten(
        user_id=one.user_id,
        version=(record or one.record).version,
        accepted=[event.index for event in planned.accepted],
        duplicates=list(planned.duplicates),
        forgotten=list(planned.forgotten),
    )
