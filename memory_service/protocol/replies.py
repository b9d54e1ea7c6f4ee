"""Checks of the memory service's replies: lengths match the request, numbers are within their ranges.

The api computes only with replies that pass; the checks of retrieval are in `answer`. Every check raises ValueError.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec
import numpy as np

from memory_service.protocol.bounds import POSITION_LIMIT
from memory_service.protocol.columns import Job
from memory_service.protocol.structs import (
    CatalogueReply,
    Item,
    PlanReply,
    PlanRequest,
    StaleUser,
    UserEvents,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import EntryOut, GoneOut, UserMemory


def demand(holds: bool, what: str) -> None:
    """Raises ValueError, which names `what` is wrong, unless it `holds`."""
    if not holds:
        raise ValueError(f"invalid reply: {what}")


def check_planned(reply: PlanReply, request: PlanRequest) -> None:
    """There is one plan for each user of the request, and its job can be encoded."""
    _check_plans(reply.users, [user.user_id for user in request.users], reply.catalogue_size)
    _check_events(reply.users, request.users)


def check_written(reply: WriteReply, request: WriteRequest) -> None:
    """There is one outcome for each user of the request."""
    demand([user.user_id for user in reply.users] == [user.user_id for user in request.users], "users")
    _check_events(reply.users, request.users)
    conflicts = [(user.retry, user.user_id) for user in reply.users if user.retry is not None]
    _check_plans([retry for retry, _ in conflicts], [name for _, name in conflicts], reply.catalogue_size)


def check_listed(reply: CatalogueReply, since: int) -> CatalogueReply:
    """The listing begins at item `since`. Returns it with plain JSON values: msgpack types beyond JSON become text or
    null.
    """
    changed = reply.changed or []
    demand(reply.since == since, "since")
    demand(all(0 < number < since for number, _ in changed), "changed")
    items, changed_items = _plain(reply.items), _plain([item for _, item in changed])
    numbers = [number for number, _ in changed]
    changes = None if reply.changed is None else list(zip(numbers, changed_items, strict=True))
    return msgspec.structs.replace(reply, items=items, changed=changes)


def check_inspected(reply: UserMemory, user_id: str) -> None:
    """The bank is that of the user, its items are in the catalogue, and its numbers are finite."""
    demand(reply.user_id == user_id, "user_id")
    items = (
        {entry.item for entry in reply.entries} | {gone.item for gone in reply.gone} | {item for item, _ in reply.log}
    )
    demand(all(0 < item <= reply.catalogue_size for item in items), "items")
    demand(bool(np.isfinite([number or 0.0 for number in _numbers(reply)]).all()), "numbers")


def check_stale(stale: Iterable[StaleUser], names: Collection[str], catalogue_size: int) -> None:
    """The stale users are among `names`, and their jobs can be encoded."""
    for user in stale:
        demand(user.user_id in names, "stale")
        check_job(user.job, catalogue_size)


def check_job(job: Job, catalogue_size: int) -> None:
    """The job's items are in the catalogue, and its positions are −1 or within its items."""
    demand(0 <= job.start <= POSITION_LIMIT and not len(job.items) % 4 and not len(job.positions) % 8, "job")
    unpacked = job.unpack()
    demand(int(unpacked.items.max(initial=0)) <= catalogue_size, "items")
    wanted = unpacked.positions[unpacked.positions != -1]
    demand(bool(((wanted >= job.start) & (wanted <= job.start + len(unpacked.items))).all()), "positions")


def _check_plans(plans: Sequence[UserPlan], names: Sequence[str], catalogue_size: int) -> None:
    demand([plan.user_id for plan in plans] == list(names), "users")
    for plan in plans:
        check_job(plan.job, catalogue_size)
        demand(len(plan.job.positions) == 8 * len(plan.accepted), "positions")
    check_stale([plan.stale for plan in plans if plan.stale is not None], names, catalogue_size)


def _check_events(outcomes: Sequence[UserPlan | UserWritten], users: Sequence[UserEvents | UserWrite]) -> None:
    """Each outcome names only events that were sent for its user."""
    for outcome, user in zip(outcomes, users, strict=True):
        sent = {event.index for event in user.events}
        demand(sent.issuperset([*outcome.accepted, *outcome.duplicates, *outcome.forgotten]), "events")


def _plain(items: list[Item]) -> list[Item]:
    try:
        return msgspec.json.decode(msgspec.json.encode(items), type=list[Item])
    except (TypeError, RecursionError) as error:
        raise ValueError(f"metadata: {error}") from error


def _numbers(reply: UserMemory) -> Iterator[float | None]:
    """All real numbers of an inspected bank."""
    yield from (reply.entropy, *reply.clusters.values(), *(time for _, time in reply.log))
    yield from (*(reply.standing or ()), reply.threshold)
    for entry in reply.entries:
        yield from _entry_numbers(entry)
    for gone in reply.gone:
        yield from (gone.quality, gone.time, *_part_numbers(gone))
    for how_many in (reply.own, reply.collective):
        if how_many is not None:
            yield from (how_many.base, how_many.growth)


def _entry_numbers(entry: EntryOut) -> Iterator[float | None]:
    yield from (entry.quality, entry.recency, entry.rating, entry.time, entry.last_access, entry.first_time)
    yield from (*(entry.place or ()), entry.mean_gap_s, entry.usual_hour, entry.usual_day, *_part_numbers(entry))


def _part_numbers(entry: EntryOut | GoneOut) -> tuple[float, ...]:
    return () if entry.parts is None else msgspec.structs.astuple(entry.parts)
