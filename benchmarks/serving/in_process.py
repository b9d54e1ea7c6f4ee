"""What `POST /recommend` does, without our api around it: for comparison with whoever brings only HTTP and batches."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from api.http.metrics import Metrics
from api.memory.client import MemoryClient, Remembered, unpack
from api.models.engine import Engine
from api.models.lifecycle import Models
from memory_service.http.app import create_app
from memory_service.protocol.structs import CatalogueReply, RetrieveRequest
from memory_service.service.service import MemoryService
from memory_service.settings import MemorySettings
from model.serving.recommender import Recommender


class InProcess(MemoryClient):
    """Memory asked without HTTP; only for what recommending needs."""

    def __init__(self, service: MemoryService) -> None:
        self.service = service

    async def close(self) -> None:
        await self.service.close()

    async def retrieve(self, request: RetrieveRequest) -> Remembered:
        return unpack(await self.service.retrieve(request))

    async def catalogue(self, since: int, revision: int) -> CatalogueReply:
        return await self.service.catalogue.listing(since, revision)


async def with_memory_inside(run: Path, redis_url: str) -> Models:
    """Model, banks and collective index in this process, filled from Redis and compared with it at every retrieval."""
    service: MemoryService = create_app(MemorySettings(run=run, redis_url=redis_url)).state.service
    await service.start()
    return await _ready(run, InProcess(service))


async def with_memory_service(run: Path, memory_url: str) -> Models:
    """The model in this process, memory where our api has it, too."""
    return await _ready(run, MemoryClient(memory_url, timeout_s=5))


async def _ready(run: Path, memory: MemoryClient) -> Models:
    engine = Engine(Recommender.load(run), memory, Metrics())
    await engine.sync()
    return Models(engine, run)
