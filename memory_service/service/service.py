"""The use cases of the memory service: retrieve, plan, write, rekey, forget, inspect; and its start and end.

A memory replica is a cache of Redis, and there may be any number of them. Before every answer the residents are
compared with Redis (`freshness`); memories of other users are kept in step by what Redis tells of changes
(`store.feed`, `loading`). Everything runs on one event loop, and nothing awaits between a search and the use of what it
found.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from memory_service.index.collective import entries_that_fit
from memory_service.index.gpu import gpu_copier
from memory_service.protocol.answer import Answer
from memory_service.protocol.bounds import USERS_PER_CALL
from memory_service.protocol.columns import BadRequest
from memory_service.protocol.hash_slots import ALL_SLOTS
from memory_service.protocol.question import Question
from memory_service.protocol.structs import (
    Forgotten,
    ModelReply,
    PlanReply,
    PlanRequest,
    QuotaReply,
    QuotaRequest,
    RekeyReply,
    RekeyRequest,
    StalePage,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import UserMemory
from memory_service.protocol.vectors import Vectors
from memory_service.service.catalogue import Catalogue
from memory_service.service.freshness import CachedUsers, Freshness
from memory_service.service.inspection import user_memory
from memory_service.service.loading import CollectiveLoader
from memory_service.service.models import Models
from memory_service.service.outage import Outage
from memory_service.service.recent import RecentRecords
from memory_service.service.retrieval import Retrieval, stale_users
from memory_service.service.space import Space
from memory_service.service.writing import Commits, ToPlan, ToWrite, WritePath
from memory_service.settings import MemorySettings, reached_at
from memory_service.store.feed import Feed
from memory_service.store.presence import Presence
from memory_service.store.store import Store
from memory_service.tasks import cancel_and_wait
from model.checkpoint import Checkpoint

LISTEN_S = 5.0
"""How long a start waits until changes in Redis are listened to."""
log = logging.getLogger(__name__)


class MemoryService:
    """All banks in one Redis.

    Raises:
        GpuError: the settings ask for a GPU, and there is none.
    """

    def __init__(self, settings: MemorySettings, store: Store, checkpoint: Checkpoint) -> None:
        entries = settings.collective_entries or entries_that_fit(checkpoint)
        sized = settings.model_copy(update={"collective_entries": entries})
        copier = gpu_copier() if settings.device == "cuda" else None
        self.store = store
        self.catalogue = Catalogue(store)
        self._outage = Outage(store.ping)
        space_of = partial(Space, catalogue=self.catalogue, settings=sized, copier=copier)
        run = settings.run.resolve()
        self.models = Models(store, self._outage, self.catalogue, checkpoint, run, space_of, self._complete)
        self._loader = CollectiveLoader(store, self.catalogue, self.models)
        self._cached = CachedUsers(self.models, RecentRecords())
        self._freshness = Freshness(store, self._outage, self.catalogue, self._cached)
        self._commits = Commits(store, self._outage, self.models, self._cached)
        self._writes = WritePath(store, self.catalogue, self.models, self._freshness, self._cached, self._commits)
        self.presence = Presence(store, settings.advertise or reached_at(settings), settings.patience_s, self.compare)
        self._retrieval = Retrieval(store, self._outage, self.catalogue, self.models, self._freshness, self.presence)
        self._feed = Feed(store.redis, self._loader.look_at, self._missed)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def serving(self) -> Space:
        """The space of the serving model."""
        return self.models.serving

    @property
    def model_version(self) -> str:
        """The serving model."""
        return self.serving.model_version

    @property
    def resident_users(self) -> int:
        """Number of banks in memory."""
        return sum(len(space.residents) for space in self.models.spaces.values())

    @property
    def pruned(self) -> int:
        """Entries that were pruned by writes of this process."""
        return self._commits.pruned

    # ---------------------------------------------------------------------------------------- lifecycle

    async def start(self) -> None:
        """Load models, catalogue and collective index; may be called again after a failure.

        Raises:
            StoreUnavailable: Redis is out of reach.
            CheckpointError: the serving model that Redis names cannot be loaded.
        """
        await self.models.start()
        if not self._tasks:  # announce, then listen, then load: so that no change is missed
            await self.presence.beat()
            self._tasks = [_watched(self._feed.run()), _watched(self.presence.run())]
        with suppress(TimeoutError):  # a Redis that cannot be listened to: `compare` from time to time must do
            await asyncio.wait_for(self._feed.listening.wait(), LISTEN_S)
        await self.compare()
        self._loader.fills_residents = False
        self.presence.is_ready = True
        await self.presence.beat()

    async def compare(self) -> None:
        """Bring the collective indexes to what Redis has (`CollectiveLoader.compare`). Raises StoreUnavailable."""
        lapses = self.presence.lapses
        await self._loader.compare()
        self.presence.caught_up(lapses)

    async def leave(self, linger_s: float) -> None:
        """Let other memory replicas take over before this process ends."""
        await self.presence.leave(linger_s)

    async def close(self) -> None:
        """End the background tasks and close all connections to Redis."""
        await cancel_and_wait(self._tasks)
        await self._outage.close()
        await self.store.close()

    async def check_store(self) -> None:
        """Check that Redis answers. Raises StoreUnavailable."""
        await self._outage.check()

    async def _complete(self, space: Space) -> None:
        await self._loader.complete(space)

    async def _missed(self) -> None:
        if self.presence.is_ready:
            await self.compare()

    # ------------------------------------------------------------------------------- retrieve and write

    async def retrieve(self, question: Question) -> Answer:
        """Entropy, K, memories, state and seen items of a batch of users (`Retrieval.answer`)."""
        _check_users(question.users)
        return await self._retrieval.answer(question)

    async def plan(self, request: PlanRequest) -> PlanReply:
        """What events would mean, and which states writing them needs. Nothing is changed. Raises as `write` does."""
        space = await self.models.wanted_space(request.model_version)
        _check_distinct([user.user_id for user in request.users])
        at = request.received_at
        parts = [ToPlan(user_id=one.user_id, events=one.events, space=space, received_at=at) for one in request.users]
        planned = await self._writes.plan(parts)
        return PlanReply(self.catalogue.size, planned)

    async def write(self, request: WriteRequest) -> WriteReply:
        """Write planned events with their keys, atomically per user, if nobody wrote in between.

        Raises:
            ModelMismatch, BadRequest, RecordError: nothing was written.
            StoreUnavailable: it is not known what was written; repeating the events is harmless (event identities).
        """
        space = await self.models.space(request.model_version)
        _check_distinct([user.user_id for user in request.users])
        parts = [
            ToWrite(
                user_id=user.user_id,
                events=user.events,
                space=space,
                received_at=request.received_at,
                token=user.token,
                version=user.version,
                vectors=Vectors.unpacked(user),
            )
            for user in request.users
        ]
        written = await self._writes.write(parts)
        return WriteReply(self.catalogue.size, written)

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Give stale records the keys and states of the wanted model. Redis is asked first which one that is: a process
        that is behind must not move users back.
        """
        await self.models.follow_if_up()
        space = await self.models.wanted_space(request.model_version)
        _check_distinct([user.user_id for user in request.users])
        return RekeyReply(await self._writes.rekey(space, request))

    async def forget(self, user_id: str) -> Forgotten:
        """Delete everything about a user. A tombstone keeps late retries from bringing the user back."""
        with self._outage.guard():
            existed = await self.store.forget(user_id, time.time())
            replicas = await self.presence.look()  # after the deletion: a replica that joins later reads Redis as it is
        self.drop(user_id)
        return Forgotten(existed, [url for url in replicas if url != self.presence.url])

    def drop(self, user_id: str) -> None:
        """Hold nothing of a user whom another memory replica has forgotten."""
        self._cached.drop([user_id])

    # ------------------------------------------------------------------------------------------ inspect

    async def inspect(self, user_id: str) -> UserMemory | None:
        """All that is known about a user; None: nothing. Raises StoreUnavailable and RecordError."""
        record = (await self._freshness.read({user_id: self.serving}))[user_id].record
        if record.version == 0:
            return None
        space = self.models.spaces.get(record.model_version)
        clusters, plane = (self.serving.clusters, None) if space is None else (space.clusters, space.plane)
        return user_memory(user_id, record, clusters, plane)

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """A page of the users of some hash slots whose records are not of the wanted model, which `version` must be."""
        space = await self.models.wanted_space(version)
        with self._outage.guard():
            cursor, users = await self.store.walk(cursor, limit, slots)
            models = await self.store.models(users)
            others = [user for user, model in zip(users, models, strict=True) if model != version]
            records = await self.store.load_readable(others)
            await self.catalogue.cover(records.values())
        return StalePage(cursor, len(users), self.catalogue.size, stale_users(space, records))

    def model(self) -> ModelReply:
        """Which models are loaded here, and what for."""
        serving, wanted = self.serving, self.models.wanted
        return ModelReply(
            serving=serving.model_version,
            wanted=wanted.model_version,
            serving_run=self.models.run_of[serving.model_version],
            wanted_run=self.models.run_of[wanted.model_version],
            users=serving.collective.known if serving.collective is not None else 0,
            moved=wanted.collective.users if wanted.collective is not None else 0,
            trouble=self.models.trouble,
        )

    async def quota(self, request: QuotaRequest) -> QuotaReply:
        """Grant requests of an API key. Raises StoreUnavailable."""
        with self._outage.guard():
            return QuotaReply(await self.store.grant(request.key, request.second, request.limit, request.want))


def _check_users(users: Collection[str]) -> None:
    if len(users) > USERS_PER_CALL:
        raise BadRequest(f"{len(users)} users in one call, at most {USERS_PER_CALL}")


def _check_distinct(users: Collection[str]) -> None:
    _check_users(users)
    if len(set(users)) < len(users):
        raise BadRequest("a user is named twice")


def _watched(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A background task; an error that ends it is logged."""

    def report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("the memory service is no longer kept in step with Redis", exc_info=task.exception())

    task = asyncio.create_task(work)
    task.add_done_callback(report)
    return task
