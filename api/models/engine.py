"""What the use cases share: the model in its own thread, the memory client, and the catalogue in step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np

from api.catalogue.catalogue import CatalogueMirror
from api.catalogue.filters import Filter
from api.http.metrics import Metrics
from api.http.problems import MemoryUnavailable
from api.memory.client import MemoryClient
from api.memory.replicas import MemoryReplicas
from memory_service.protocol.structs import Job, RekeyRequest, StaleUser, UserRekey
from memory_service.protocol.telemetry import span
from model.memory.events import EncodeJob
from model.memory.rules import Floats
from model.serving.recommender import Recommender

RESTARTS = 3
"""How often the catalogue may change under a listing of all of it, beyond what the service remembers of changes."""
P = ParamSpec("P")
T = TypeVar("T")


class Engine:
    """Model, memory and catalogue. The model runs in one thread of its own, never on the event loop."""

    def __init__(
        self,
        recommender: Recommender,
        memory: MemoryClient | MemoryReplicas,
        metrics: Metrics,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.recommender, self.memory, self.metrics = recommender, memory, metrics
        self.catalogue = CatalogueMirror(recommender.index_of)
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="model")
        self.changing = asyncio.Lock()
        """Held from reading an item to writing what was made of it."""
        self._syncing, self._preparing = asyncio.Lock(), asyncio.Lock()

    @property
    def version(self) -> str:
        """The model's version."""
        return self.recommender.version

    def beside(self, recommender: Recommender) -> Engine:
        """The same for another model: it shares memory client, metrics, thread and lock."""
        other = Engine(recommender, self.memory, self.metrics, self._thread)
        other.changing = self.changing
        return other

    async def close(self) -> None:
        """Let the model finish and close the connections."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        await self.memory.close()

    async def compute(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a piece of the model's work in its thread."""
        with span(getattr(work, "__name__", "compute").strip("_")):
            return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *args, **kwargs))

    async def encode(self, jobs: Sequence[Job | EncodeJob]) -> list[tuple[Floats, Floats]]:
        """Keys and last state of each job; jobs from the wire speak of catalogue numbers, others of model indices."""
        ready = [self._translated(job) if isinstance(job, Job) else job for job in jobs]
        return await self.compute(self._encode, ready)

    def _encode(self, jobs: Sequence[EncodeJob]) -> list[tuple[Floats, Floats]]:
        begin = time.perf_counter()
        encoded = list(self.recommender.encode(jobs))
        self.metrics.stage("encode", begin)
        return encoded

    def _translated(self, job: Job) -> EncodeJob:
        wire = job.unpack()
        return EncodeJob(wire.start, self.catalogue.indices(wire.items.astype(np.int64)), wire.positions)

    async def rekey(self, stale: Sequence[StaleUser]) -> int:
        """Give records of another model the keys and states of this one; those that changed meanwhile are left alone.
        Returns how many.
        """
        encoded = await self.encode([user.job for user in stale])
        users = [
            UserRekey(user.user_id, user.version, keys.astype("<f4").tobytes(), state.astype("<f4").tobytes())
            for user, (keys, state) in zip(stale, encoded, strict=True)
        ]
        return len((await self.memory.rekey(RekeyRequest(self.recommender.version, users))).rekeyed)

    async def know(self, catalogue_size: int) -> None:
        """Make sure that catalogue numbers up to `catalogue_size` are known here."""
        if catalogue_size > self.catalogue.size:
            async with self._syncing:
                if catalogue_size > self.catalogue.size:  # nobody else fetched them while we waited
                    await self._fetch_catalogue()
                if catalogue_size > self.catalogue.size:
                    detail = f"memory service: {self.catalogue.size} items listed, {catalogue_size} told of"
                    raise MemoryUnavailable(detail)

    async def sync(self) -> None:
        """Fetch what is new in the catalogue and what changed in it."""
        async with self._syncing:
            await self._fetch_catalogue()

    async def prepare(self, wanted: Iterable[Filter]) -> None:
        """Find out what passes filters that nobody has asked with lately: not on the event loop, and not in the model's
        thread, where everybody would wait.
        """
        for one in wanted:
            if not self.catalogue.filters.is_ready(one):
                async with self._preparing:  # one at a time: who waited for the same finds it done
                    await asyncio.to_thread(self.catalogue.filters.mask, one)

    async def _fetch_catalogue(self) -> None:
        mirror, anew = self.catalogue, 0
        while True:
            reply = await self.memory.catalogue(mirror.size + 1, mirror.revision)
            if reply.changed is None or reply.catalogue_size < mirror.size:
                # more changed than is remembered, or it is another catalogue: all anew, beside the one in use
                mirror, anew = CatalogueMirror(self.recommender.index_of), anew + 1
                if anew > RESTARTS:
                    raise MemoryUnavailable("memory service: no listing of the catalogue comes to its end")
                continue
            mirror.take(reply)
            if mirror.size >= reply.catalogue_size or not reply.items:
                break
        self.catalogue = mirror
