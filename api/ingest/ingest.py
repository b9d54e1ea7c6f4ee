"""The use case behind `POST /memories`: validate, plan, encode, write, acknowledge.

Only what is in Redis is acknowledged. A write carries the version that its keys were computed from; where another
writer was faster, the current plan comes back and is encoded again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from api.http.problems import IngestionFull, MemoryUnavailable, ModelGone, WriteConflict
from api.http.schemas import IngestResponse, Interaction, Rejected, refused_time
from api.models.engine import Engine
from api.models.lifecycle import MODEL_TRIES, Models
from memory_service.protocol.structs import (
    EventIn,
    Job,
    PlanRequest,
    UserEvents,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteRequest,
)
from model.config import EncoderConfig
from model.memory.rules import Floats

TRIES = 3
SLICE_TOKENS = 2000
"""What the model encodes in one go: about 15 ms, for which recommendations wait beside a backfill."""


class Intake:
    """Keeps the interactions that are being written within a limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.under_way = limit, 0

    @contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Around writing `count` interactions. Raises IngestionFull where they do not fit in beside the others."""
        if self.under_way and self.under_way + count > self.limit:
            raise IngestionFull(f"{self.under_way} interactions are being written, at most {self.limit} at once")
        self.under_way += count
        try:
            yield
        finally:
            self.under_way -= count


async def ingest(models: Models, interactions: Sequence[Interaction]) -> IngestResponse:
    """Keep interactions.

    Raises:
        MemoryUnavailable, WriteConflict: not everything was kept; `committed` names the users that were.
    """
    received_at = time.time()
    rejected = [one for one in (_refusal(n, i, received_at) for n, i in enumerate(interactions)) if one]
    refused = {one.index for one in rejected}
    users = _by_user([(n, i) for n, i in enumerate(interactions) if n not in refused])
    written = await _write_all(models, users, received_at) if users else {}
    rejected += [_forgotten(index) for user in written.values() for index in user.forgotten]
    response = IngestResponse(
        accepted=sum(len(user.accepted) for user in written.values()),
        duplicates=sum(len(user.duplicates) for user in written.values()),
        rejected=sorted(rejected, key=lambda one: one.index),
        versions={name: user.version for name, user in written.items()},
    )
    for outcome, count in (
        ("accepted", response.accepted),
        ("duplicate", response.duplicates),
        ("rejected", len(response.rejected)),
    ):
        models.wanted.metrics.interactions.labels(outcome).inc(count)
    accepted = (interactions[index] for user in written.values() for index in user.accepted)
    models.wanted.metrics.feedback.taken(accepted)
    return response


def _refusal(index: int, interaction: Interaction, now: float) -> Rejected | None:
    refusal = None if interaction.timestamp is None else refused_time(interaction.timestamp, now)
    return Rejected(index=index, code=refusal[0], detail=refusal[1]) if refusal else None


def _forgotten(index: int) -> Rejected:
    return Rejected(index=index, code="forgotten", detail="the user was forgotten after this event")


def _by_user(interactions: Sequence[tuple[int, Interaction]]) -> dict[str, UserEvents]:
    users: dict[str, UserEvents] = {}
    for index, one in interactions:
        events = users.setdefault(one.user_id, UserEvents(one.user_id, [])).events
        events.append(EventIn(index, one.item_id, one.timestamp, one.rating, one.event_id, one.basket_id))
    return users


async def _write_all(models: Models, users: dict[str, UserEvents], received_at: float) -> dict[str, UserWritten]:
    """Write for the wanted model; where another is wanted by now, what is left for that one."""
    written: dict[str, UserWritten] = {}
    try:
        for left in reversed(range(MODEL_TRIES)):
            try:
                rest = {name: user for name, user in users.items() if name not in written}
                await _write(models.wanted, rest, received_at, written)
                break
            except ModelGone:
                if not left:
                    raise
                await models.follow()
    except MemoryUnavailable as error:
        raise type(error)(error.detail, committed=sorted(written)) from error
    return written


async def _write(
    engine: Engine, users: dict[str, UserEvents], received_at: float, written: dict[str, UserWritten]
) -> None:
    """Write with the keys of one model; whoever is done is put into `written`."""
    plans = await _plans(engine, list(users.values()), received_at)
    for _ in range(TRIES):
        writes = await _encode(engine, plans, users)
        reply = await engine.memory.write(WriteRequest(engine.version, received_at, writes))
        await engine.know(reply.catalogue_size)
        written.update({user.user_id: user for user in reply.users if user.retry is None})
        plans = [user.retry for user in reply.users if user.retry is not None]
        if not plans:
            return
        if any(plan.stale for plan in plans):
            plans = await _plans(engine, [users[plan.user_id] for plan in plans], received_at)
    detail = f"{len(plans)} users were written by others {TRIES} times in a row; nothing of theirs was kept"
    raise WriteConflict(detail, committed=sorted(written))


async def _plans(engine: Engine, users: list[UserEvents], received_at: float) -> list[UserPlan]:
    """Plans for all users; records of another model are keyed anew first."""
    request = PlanRequest(engine.version, received_at, users)
    reply = await engine.memory.plan(request)
    await engine.know(reply.catalogue_size)
    stale = [plan.stale for plan in reply.users if plan.stale is not None]
    if stale:
        await engine.rekey(stale)
        reply = await engine.memory.plan(request)
    return reply.users


async def _encode(engine: Engine, plans: list[UserPlan], users: dict[str, UserEvents]) -> list[UserWrite]:
    """The writes that the plans ask for, with keys and last states."""
    encoded: list[tuple[Floats, Floats]] = []
    for jobs in _slices([plan.job for plan in plans], engine.recommender.config.encoder):
        encoded += await engine.encode(jobs)
    return [
        UserWrite(
            user_id=plan.user_id,
            version=plan.version,
            events=users[plan.user_id].events,
            keys=keys.astype("<f4").tobytes(),
            state=state.astype("<f4").tobytes(),
        )
        for plan, (keys, state) in zip(plans, encoded, strict=True)
    ]


def _slices(jobs: Sequence[Job], config: EncoderConfig) -> Iterator[list[Job]]:
    """Jobs in portions after each of which the model's thread is free for recommendations."""
    portion: list[Job] = []
    tokens = 0
    for job in jobs:
        positions, items = len(job.positions) // 8, len(job.items) // 4
        windows = 1 + positions // config.window_stride
        if portion and tokens + windows * min(items, config.window) > SLICE_TOKENS:
            yield portion
            portion, tokens = [], 0
        portion.append(job)
        tokens += windows * min(items, config.window)
    if portion:
        yield portion
