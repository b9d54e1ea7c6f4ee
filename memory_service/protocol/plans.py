"""Events, plans and encode jobs: from the structs of a request to the memory's own types, and back. Pure."""

from __future__ import annotations

import numpy as np

from memory_service.protocol.bounds import RATING_LIMIT, TIME_LIMIT_S
from memory_service.protocol.columns import BadRequest, Job
from memory_service.protocol.structs import EventIn, StaleUser, UserPlan, UserWritten
from model.memory.changes import rekey_job
from model.memory.events import Event, Plan, basket_identity, event_identity
from model.memory.record import EncodeJob, UserRecord


def event_of(user_id: str, sent: EventIn, item: int, received_at: float) -> Event:
    """The event as the memory knows it; `item` is its catalogue number. Raises BadRequest for a time (s) or rating
    beyond the bounds.
    """
    time = received_at if sent.timestamp is None else sent.timestamp
    if not abs(time) <= TIME_LIMIT_S or not abs(sent.rating or 0) <= RATING_LIMIT:  # also catches NaN
        raise BadRequest(f"event {sent.index} of a user has the time {time} and the rating {sent.rating}")
    return Event(
        index=sent.index,
        item=item,
        time=time,
        rating=float("nan") if sent.rating is None else sent.rating,
        event_id=event_identity(user_id, sent.item_id, sent.timestamp, sent.event_id),
        timed=sent.timestamp is not None,
        basket=basket_identity(user_id, sent.basket_id),
    )


def plan_out(user_id: str, record: UserRecord, plan: Plan, token: str, *, is_stale: bool) -> UserPlan:
    """The plan made from a user's record. `is_stale`: the record must be rekeyed first."""
    return UserPlan(
        user_id=user_id,
        version=record.version,
        accepted=[event.index for event in plan.accepted],
        duplicates=list(plan.duplicates),
        forgotten=list(plan.forgotten),
        job=Job.pack(plan.job),
        stale=stale_user(user_id, record) if is_stale else None,
        token=token,
    )


def written_out(user_id: str, version: int, plan: Plan) -> UserWritten:
    """The outcome of a write by its plan; `version`: of the record after it."""
    return UserWritten(
        user_id=user_id,
        version=version,
        accepted=[event.index for event in plan.accepted],
        duplicates=list(plan.duplicates),
        forgotten=list(plan.forgotten),
    )


def refused_out(user_id: str, version: int, retry: UserPlan) -> UserWritten:
    """The outcome of a write whose record had changed since the plan; `retry`: the current plan."""
    return UserWritten(user_id, version, accepted=[], duplicates=[], forgotten=[], retry=retry)


def stale_user(user_id: str, record: UserRecord) -> StaleUser:
    """What the encoder must compute to rekey a record."""
    return StaleUser(user_id, record.version, Job.pack(rekey_job(record)))


def state_job(record: UserRecord) -> Job:
    """What the encoder must compute to make the state after everything in a record's log."""
    return Job.pack(EncodeJob(record.log_start, record.log_item, np.zeros(0, np.int64)))
