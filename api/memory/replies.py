"""Whether a reply of the memory service can be one: the columns fit the question and each other, numbers are in their
ranges. What passes can be computed with; everything else is refused at the door, before anything is made of it.

Every check raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from memory_service.protocol.structs import (
    CatalogueReply,
    Columns,
    Item,
    Job,
    PlanReply,
    PlanRequest,
    RetrieveReply,
    RetrieveRequest,
    StaleUser,
    UserEvents,
    UserMemory,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteReply,
    WriteRequest,
)
from model.memory.habits import FEATURES

MOST_ENTRIES = 1000
"""Entries retrieved for one user: at most what a bank can hold."""
MOST_K = 100
"""Entries wanted for one user: what configs and requests may ask for."""
LARGEST = 65504.0
"""Size of any number of a vector or feature; larger ones, and NaN, would make the scores NaN."""
FAR = 2**53


def check_retrieved(reply: RetrieveReply, request: RetrieveRequest) -> None:
    """Columns of the length of the request, items of the catalogue, finite numbers."""
    rows, own, others = len(request.users), reply.own, reply.collective
    narrow = (reply.entropy, reply.k, reply.collective_k, reply.bank_size, reply.seen_count, own.count, others.count)
    _demand(len(reply.known) == rows, "known")
    _demand(len(reply.versions) == 8 * rows and all(len(one) == 4 * rows for one in narrow), "rows")
    counts = np.frombuffer(b"".join(narrow[1:]), "<i4").reshape(-1, rows)
    _demand(counts.min() >= 0 and counts[-2:].max() <= MOST_ENTRIES and counts[:2].max() <= MOST_K, "counts")
    _demand(len(reply.seen) == 4 * int(counts[3].sum()), "seen")
    for columns, total in zip((own, others), counts[-2:].sum(axis=1).tolist(), strict=True):
        _demand(all(len(one) == 4 * total for one in _reals(columns, columns.item)), "entries")
    items = np.frombuffer(own.item + others.item + reply.seen, "<u4")
    _demand(not len(items) or (items.min() > 0 and items.max() <= reply.catalogue_size), "items")
    reals = np.frombuffer(b"".join((reply.entropy, reply.states, *_reals(own), *_reals(others))), "<f4")
    _demand(bool(np.abs(reals).max() <= LARGEST), "numbers")  # NaN is not
    _check_habits(reply, rows)
    _check_stale(reply.stale, request.users, reply.catalogue_size)
    for row, job in reply.without.items():
        _demand(0 <= row < rows, "without")
        _check_job(job, reply.catalogue_size)


def _check_habits(reply: RetrieveReply, rows: int) -> None:
    """All own entries tell as much as there is to tell, or none does; what is present is of the catalogue."""
    _demand(len(reply.habits) in (0, len(FEATURES) * len(reply.own.item)), "habits")
    _demand(bool(np.abs(np.frombuffer(reply.habits, "<f4")).max(initial=0) <= LARGEST), "habits")
    _demand(len(reply.present_count) in (0, 4 * rows), "present")
    count, items = np.frombuffer(reply.present_count, "<i4"), np.frombuffer(reply.present, "<u4")
    _demand(bool(((count >= 0) & (count <= MOST_ENTRIES)).all()) and int(count.sum()) == len(items), "present")
    _demand(not len(items) or (items.min() > 0 and items.max() <= reply.catalogue_size), "items")


def _reals(columns: Columns, *more: bytes) -> tuple[bytes, ...]:
    return (columns.similarity, columns.quality, columns.recency, columns.rating, *more)


def check_planned(reply: PlanReply, request: PlanRequest) -> None:
    """A plan for every user asked about, whose job can be encoded."""
    _check_plans(reply.users, [user.user_id for user in request.users], reply.catalogue_size)
    _check_events(reply.users, request.users)


def check_written(reply: WriteReply, request: WriteRequest) -> None:
    """An outcome for every user written."""
    _demand([one.user_id for one in reply.users] == [one.user_id for one in request.users], "users")
    _check_events(reply.users, request.users)
    again = [one.retry for one in reply.users if one.retry is not None]
    _check_plans(again, [one.user_id for one in reply.users if one.retry is not None], reply.catalogue_size)


def check_listed(reply: CatalogueReply, since: int) -> CatalogueReply:
    """The listing asked for, in plain values: what msgpack can say beyond JSON becomes text or null."""
    changed = reply.changed or []
    _demand(reply.since == since, "since")
    _demand(all(0 < number < since for number, _ in changed), "changed")
    try:
        items = msgspec.json.decode(msgspec.json.encode(reply.items), type=list[Item])
        told = msgspec.json.decode(msgspec.json.encode([item for _, item in changed]), type=list[Item])
    except (TypeError, RecursionError) as error:
        raise ValueError(f"metadata: {error}") from error
    numbers = [number for number, _ in changed]
    changes = None if reply.changed is None else list(zip(numbers, told, strict=True))
    return msgspec.structs.replace(reply, items=items, changed=changes)


def check_inspected(reply: UserMemory, user_id: str) -> None:
    """The bank of this user, with items of the catalogue and finite numbers."""
    _demand(reply.user_id == user_id, "user_id")
    items = [entry.item for entry in reply.entries] + [one.item for one in reply.gone] + [item for item, _ in reply.log]
    _demand(all(0 < item <= reply.catalogue_size for item in items), "items")
    numbers = [reply.entropy, *reply.clusters.values(), *(when for _, when in reply.log)]
    numbers += [*(reply.standing or ()), reply.threshold or 0.0]
    for entry in reply.entries:
        numbers += [
            entry.quality,
            entry.recency,
            entry.rating or 0.0,
            entry.time,
            entry.last_access,
            *(entry.place or ()),
            entry.first_time,
            *(one or 0.0 for one in (entry.mean_gap_s, entry.usual_hour, entry.usual_day)),
        ]
    for one in reply.gone:
        numbers += [one.quality, one.time]
    for parts in [entry.parts for entry in reply.entries] + [one.parts for one in reply.gone]:
        numbers += [] if parts is None else msgspec.structs.astuple(parts)
    for how in (reply.own, reply.collective):
        numbers += [how.base, how.growth] if how is not None else []
    _demand(bool(np.isfinite(numbers).all()), "numbers")


def _check_plans(plans: Sequence[UserPlan], names: Sequence[str], catalogue_size: int) -> None:
    _demand([plan.user_id for plan in plans] == list(names), "users")
    for plan in plans:
        _check_job(plan.job, catalogue_size)
        _demand(len(plan.job.positions) == 8 * len(plan.accepted), "positions")
    _check_stale([plan.stale for plan in plans if plan.stale is not None], names, catalogue_size)


def _check_events(told: Sequence[UserPlan | UserWritten], asked: Sequence[UserEvents | UserWrite]) -> None:
    """Outcomes of the events that each user was asked about, and of no others."""
    for one, user in zip(told, asked, strict=True):
        events = {event.index for event in user.events}
        _demand(events.issuperset([*one.accepted, *one.duplicates, *one.forgotten]), "events")


def _check_stale(stale: Iterable[StaleUser], names: Sequence[str], catalogue_size: int) -> None:
    for user in stale:
        _demand(user.user_id in names, "stale")
        _check_job(user.job, catalogue_size)


def _check_job(job: Job, catalogue_size: int) -> None:
    """States are wanted of items that are there, at or before the beginning or within them."""
    _demand(0 <= job.start <= FAR and not len(job.items) % 4 and not len(job.positions) % 8, "job")
    wire = job.unpack()
    _demand(int(wire.items.max(initial=0)) <= catalogue_size, "items")
    wanted = wire.positions[wire.positions != -1]
    inside = (wanted >= job.start) & (wanted <= job.start + len(wire.items))
    _demand(bool(inside.all()), "positions")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} of a reply cannot be")
