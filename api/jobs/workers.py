"""What a worker of a bulk job works with: the model of a folder, a memory service, and patience."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from api.http.metrics import Metrics
from api.http.problems import ApiProblem, MemoryUnavailable, ModelGone
from api.jobs.bulk import BulkError
from api.memory.replicas import MemoryReplicas
from api.models.engine import Engine
from model.serving.recommender import Recommender

TIMEOUT_S = 60.0
TRIES, PAUSE_S = 10, 1.0
Reply = TypeVar("Reply")

loaded = lru_cache(maxsize=1)(Recommender.load)
"""The model in a folder; a worker is called with several parts."""


@asynccontextmanager
async def connected(run: Path, memory: MemoryReplicas) -> AsyncIterator[Engine]:
    """The model of a folder beside the memory service. Raises CheckpointError, BulkError for what a service refuses."""
    engine = Engine(loaded(run), memory, Metrics())
    try:
        yield engine
    except ApiProblem as problem:
        raise BulkError(problem.detail) from problem
    finally:
        await engine.close()


async def patiently(call: Callable[[], Awaitable[Reply]]) -> Reply:
    """Wait where the service is busy or restarts: everything asked here may be asked again."""
    for left in reversed(range(TRIES)):
        try:
            return await call()
        except ModelGone:
            raise
        except MemoryUnavailable:
            if not left:
                raise
            await asyncio.sleep(PAUSE_S)
    raise AssertionError
