"""An engine: a model in a thread of its own, the memory service, and a mirror of the item catalogue."""

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
from api.http.metrics import ApiMetrics
from api.http.problems import MemoryUnavailable
from api.memory.port import Memory
from memory_service.protocol.call.tracing import span
from memory_service.protocol.columns import Job
from memory_service.protocol.structs import RekeyRequest, StaleUser
from memory_service.protocol.vectors import Vectors
from model.memory.ids import CatalogueNumbers
from model.memory.record import EncodeJob
from model.memory.rules import Floats
from model.serving.recommender import Recommender

RESTARTS = 3
"""How often a listing of the whole catalogue may start again because too much changed while it was read."""
P = ParamSpec("P")
T = TypeVar("T")


class Engine:
    """A model, the memory service and the catalogue. The model runs in the thread `thread`, never on the event loop."""

    def __init__(
        self,
        recommender: Recommender,
        memory: Memory,
        metrics: ApiMetrics,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.recommender, self.memory, self.metrics = recommender, memory, metrics
        self.catalogue = CatalogueMirror(recommender.index_of)
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="model")
        self.changing = asyncio.Lock()
        """Held while an item is read, changed and written."""
        self._syncing, self._preparing = asyncio.Lock(), asyncio.Lock()

    @property
    def version(self) -> str:
        """The version of the model."""
        return self.recommender.version

    def beside(self, recommender: Recommender) -> Engine:
        """An engine of another model that shares memory service, metrics, thread and lock with this one."""
        other = Engine(recommender, self.memory, self.metrics, self._thread)
        other.changing = self.changing
        return other

    async def close(self) -> None:
        """Wait for the model to finish, and close the connections."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        await self.memory.close()

    async def compute(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in the model's thread."""
        with span(getattr(work, "__name__", "compute").strip("_")):
            return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *args, **kwargs))

    async def encode(self, jobs: Sequence[Job | EncodeJob]) -> list[tuple[Floats, Floats]]:
        """Keys (n, width) and last state (width,) by job; a `Job` has catalogue numbers, an `EncodeJob` indices."""
        ready = [self._translated(job) if isinstance(job, Job) else job for job in jobs]
        return await self.compute(self._encode, ready)

    def _encode(self, jobs: Sequence[EncodeJob]) -> list[tuple[Floats, Floats]]:
        begin = time.perf_counter()
        encoded = list(self.recommender.encode(jobs))
        self.metrics.stage("encode", begin)
        return encoded

    def _translated(self, job: Job) -> EncodeJob:
        wire = job.unpack()
        items = self.catalogue.indices(CatalogueNumbers(wire.items.astype(np.int64)))
        return EncodeJob(wire.start, items, wire.positions)

    async def rekey(self, stale: Sequence[StaleUser]) -> int:
        """Give records of another model the keys and states of this one, except for records that have changed since.

        Returns how many records were written.
        """
        encoded = await self.encode([user.job for user in stale])
        users = [Vectors(*made).rekey_of(user) for user, made in zip(stale, encoded, strict=True)]
        return len((await self.memory.rekey(RekeyRequest(self.recommender.version, users))).rekeyed)

    async def know(self, catalogue_size: int) -> None:
        """Fetch the items with catalogue numbers up to `catalogue_size`, unless they are known already."""
        if catalogue_size > self.catalogue.size:
            async with self._syncing:
                if catalogue_size > self.catalogue.size:  # another task may have fetched them meanwhile
                    await self._fetch_catalogue()
                if catalogue_size > self.catalogue.size:
                    detail = f"it lists {self.catalogue.size} items, but uses numbers up to {catalogue_size}"
                    raise MemoryUnavailable(f"memory service: {detail}")

    async def sync(self) -> None:
        """Fetch new and changed items of the catalogue."""
        async with self._syncing:
            await self._fetch_catalogue()

    async def prepare(self, wanted: Iterable[Filter]) -> None:
        """Compute the masks of filters that were not used lately, in a thread of their own: on the event loop or in the
        model's thread, all requests would wait for them.
        """
        for condition in wanted:
            if not self.catalogue.filters.is_ready(condition):
                async with self._preparing:  # one at a time: requests that wait for the same mask find it ready
                    await asyncio.to_thread(self.catalogue.filters.mask, condition)

    async def _fetch_catalogue(self) -> None:
        mirror, restarts = self.catalogue, 0
        while True:
            reply = await self.memory.catalogue(mirror.size + 1, mirror.revision)
            if reply.changed is None or reply.catalogue_size < mirror.size:
                # too much changed to be listed, or it is another catalogue: read it all, beside the mirror in use
                mirror, restarts = CatalogueMirror(self.recommender.index_of), restarts + 1
                if restarts > RESTARTS:
                    raise MemoryUnavailable("memory service: the catalogue changes faster than it can be listed")
                continue
            mirror.take(reply)
            if mirror.size >= reply.catalogue_size or not reply.items:
                break
        self.catalogue = mirror
