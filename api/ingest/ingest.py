"""The use case behind `POST /memories`: validate, plan, encode, write, acknowledge.

Only what is in Redis is acknowledged. A write names the version that its keys were computed from; if another writer was
faster, it returns the present plan, which is encoded and written again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from api.http.problems import IngestionFull, MemoryUnavailable, ModelGone, WriteConflict
from api.http.schemas.fields import refused_time
from api.http.schemas.memories import IngestResponse, Interaction, Rejected
from api.models.engine import Engine
from api.models.lifecycle import MODEL_TRIES, LoadedModels
from memory_service.protocol.columns import Job
from memory_service.protocol.structs import (
    EventIn,
    PlanRequest,
    UserEvents,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteRequest,
)
from memory_service.protocol.vectors import Vectors
from model.config import EncoderConfig
from model.memory.rules import Floats

TRIES = 3
"""How often a user is written who is changed by others meanwhile."""
SLICE_TOKENS = 2000
"""Tokens that the model encodes at a time: about 15 ms, for which recommendations have to wait."""


class Intake:
    """Limits how many interactions are being written at a time."""

    def __init__(self, limit: int) -> None:
        self.limit, self.under_way = limit, 0

    @contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Wrap the writing of `count` interactions. Raises IngestionFull if there is no room for them.

        However many they are, there is room for them if no others are being written.
        """
        if self.under_way and self.under_way + count > self.limit:
            raise IngestionFull(f"{self.under_way} of at most {self.limit} interactions are being written")
        self.under_way += count
        try:
            yield
        finally:
            self.under_way -= count


async def ingest(models: LoadedModels, interactions: Sequence[Interaction]) -> IngestResponse:
    """Store interactions.

    Raises:
        MemoryUnavailable, WriteConflict: not all were stored; `committed` names the users whose were.
    """
    received_at = time.time()
    refusals = (_refusal(n, interaction, received_at) for n, interaction in enumerate(interactions))
    rejected = [refusal for refusal in refusals if refusal is not None]
    refused = {refusal.index for refusal in rejected}
    users = _by_user([(n, interaction) for n, interaction in enumerate(interactions) if n not in refused])
    written = await _write_all(models, users, received_at) if users else {}
    rejected += [_forgotten(index) for user in written.values() for index in user.forgotten]
    response = IngestResponse(
        accepted=sum(len(user.accepted) for user in written.values()),
        duplicates=sum(len(user.duplicates) for user in written.values()),
        rejected=sorted(rejected, key=lambda refusal: refusal.index),
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
    for index, taken in interactions:
        events = users.setdefault(taken.user_id, UserEvents(taken.user_id, [])).events
        events.append(EventIn(index, taken.item_id, taken.timestamp, taken.rating, taken.event_id, taken.basket_id))
    return users


async def _write_all(models: LoadedModels, users: dict[str, UserEvents], received_at: float) -> dict[str, UserWritten]:
    """Write with the keys of the wanted model; if another one is wanted meanwhile, write the rest with its keys."""
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
    """Write with the keys of one model. Users that were written are added to `written`."""
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
    detail = f"{len(plans)} users were written by others {TRIES} times in a row; they were not changed"
    raise WriteConflict(detail, committed=sorted(written))


async def _plans(engine: Engine, users: list[UserEvents], received_at: float) -> list[UserPlan]:
    """Plans for all users. Records of another model are rekeyed first."""
    request = PlanRequest(engine.version, received_at, users)
    reply = await engine.memory.plan(request)
    await engine.know(reply.catalogue_size)
    stale = [plan.stale for plan in reply.users if plan.stale is not None]
    if stale:
        await engine.rekey(stale)
        reply = await engine.memory.plan(request)
    return reply.users


async def _encode(engine: Engine, plans: list[UserPlan], users: dict[str, UserEvents]) -> list[UserWrite]:
    """The writes that carry out plans, with keys and last states."""
    encoded: list[tuple[Floats, Floats]] = []
    for jobs in _slices([plan.job for plan in plans], engine.recommender.config.encoder):
        encoded += await engine.encode(jobs)
    vectors = [Vectors(*made) for made in encoded]
    return [made.write_of(plan, users[plan.user_id].events) for made, plan in zip(vectors, plans, strict=True)]


def _slices(jobs: Sequence[Job], config: EncoderConfig) -> Iterator[list[Job]]:
    """Jobs in portions of about SLICE_TOKENS tokens, between which the model's thread is free for recommendations."""
    portion: list[Job] = []
    tokens = 0
    for job in jobs:
        unpacked = job.unpack()
        positions, items = len(unpacked.positions), len(unpacked.items)
        windows = 1 + positions // config.window_stride
        if portion and tokens + windows * min(items, config.window) > SLICE_TOKENS:
            yield portion
            portion, tokens = [], 0
        portion.append(job)
        tokens += windows * min(items, config.window)
    if portion:
        yield portion
