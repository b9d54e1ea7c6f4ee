"""What the worker of a bulk job needs: a model, a memory service, and patience with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from api.http.metrics import ApiMetrics
from api.http.problems import ApiProblem, MemoryUnavailable, ModelGone
from api.jobs.bulk import BulkError
from api.memory.port import Memory
from api.models.engine import Engine
from model.serving.recommender import Recommender

TIMEOUT_S = 60.0
TRIES, PAUSE_S = 10, 1.0
Reply = TypeVar("Reply")

loaded = lru_cache(maxsize=1)(Recommender.load)
"""Loads the model of a folder, once for all parts that a worker is called with."""


@asynccontextmanager
async def connected(run: Path, memory: Memory) -> AsyncIterator[Engine]:
    """The model of a folder together with a memory service, which is closed at the end.

    Raises:
        CheckpointError: the folder holds no usable model.
        BulkError: the memory service refuses a call.
    """
    engine = Engine(loaded(run), memory, ApiMetrics())
    try:
        yield engine
    except ApiProblem as problem:
        raise BulkError(problem.detail) from problem
    finally:
        await engine.close()


async def patiently(call: Callable[[], Awaitable[Reply]]) -> Reply:
    """Repeats a call while the memory service is busy or restarting. The call must be repeatable.

    Raises what the last try raises; ModelGone at once.
    """
    for _ in range(TRIES - 1):
        try:
            return await call()
        except ModelGone:
            raise
        except MemoryUnavailable:
            await asyncio.sleep(PAUSE_S)
    return await call()
