"""What `POST /recommend` computes, without the api: for comparison with servers that add only HTTP and batching."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from api.http.metrics import ApiMetrics
from api.memory.client import MemoryClient
from api.memory.in_process import InProcessMemory
from api.memory.port import Memory
from api.models.engine import Engine
from api.models.lifecycle import LoadedModels
from memory_service.http.app import create_app
from memory_service.service.service import MemoryService
from memory_service.settings import MemorySettings
from model.serving.recommender import Recommender


async def with_memory_inside(run: Path, redis_url: str) -> LoadedModels:
    """Model, banks and collective index in this process, loaded from Redis and compared with it at every retrieval."""
    service: MemoryService = create_app(MemorySettings(run=run, redis_url=redis_url)).state.service
    await service.start()
    return await _ready(run, InProcessMemory(service))


async def with_memory_service(run: Path, memory_url: str) -> LoadedModels:
    """The model in this process, and the memory service over HTTP, as the api uses it."""
    return await _ready(run, MemoryClient(memory_url, timeout_s=5))


async def _ready(run: Path, memory: Memory) -> LoadedModels:
    engine = Engine(Recommender.load(run), memory, ApiMetrics())
    await engine.sync()
    return LoadedModels(engine, run)
