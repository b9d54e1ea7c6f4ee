"""What the service does besides answering: it loads what is in Redis, follows the model that Redis names, and measures
the recall of the collective index.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import numpy as np
from fastapi import FastAPI

from memory_service.http.problems import RETRY_AFTER_S
from memory_service.service.recall import recall
from memory_service.store.redis.errors import StoreUnavailable
from memory_service.tasks import cancel_and_wait
from model.checkpoint import CheckpointError

FOLLOW_S = 1.0
"""How often a process looks which model is wanted; a call that names an unknown model makes it look at once."""
START_WAIT_S = 2.0
"""How long a start waits until everything is loaded. A large store is loaded while calls are answered, as degraded."""
log = logging.getLogger(__name__)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the background tasks as long as the application runs."""
    tasks = [asyncio.create_task(work(app), name=name) for name, work in TASKS.items()]
    for task in tasks:
        task.add_done_callback(_report)
    with suppress(TimeoutError):
        await asyncio.wait_for(app.state.loaded.wait(), START_WAIT_S)
    yield
    await cancel_and_wait(tasks)
    await app.state.service.close()


def _report(task: asyncio.Task[None]) -> None:
    """Log the error that ended a task, as nobody waits for it."""
    if not task.cancelled() and task.exception() is not None:
        log.error("a background task has failed: %s", task.get_name(), exc_info=task.exception())


async def _load(app: FastAPI) -> None:
    """Load what is in Redis, then compare with it from time to time; try again if Redis is out of reach."""
    service, settings = app.state.service, app.state.settings
    while True:
        try:
            await (service.compare() if app.state.started else service.start())
            app.state.started = True
            app.state.loaded.set()
            await asyncio.sleep(settings.compare_s)
        except StoreUnavailable:
            await asyncio.sleep(RETRY_AFTER_S)
        except CheckpointError as error:
            app.state.trouble = str(error)
            log.error("not ready: %s", error)
            await asyncio.sleep(RETRY_AFTER_S)


async def _follow(app: FastAPI) -> None:
    """Load the models that Redis names, once everything is loaded."""
    await app.state.loaded.wait()
    while True:
        with suppress(StoreUnavailable):
            await app.state.service.models.follow()
        await asyncio.sleep(FOLLOW_S)


async def _measure(app: FastAPI) -> None:
    """Measure the recall of the collective index from time to time, once everything is loaded."""
    interval_s, rng, metrics = app.state.settings.recall_s, np.random.default_rng(), app.state.metrics
    await app.state.loaded.wait()
    while interval_s > 0:
        if (found := await recall(app.state.service.serving, rng)) is not None:
            metrics.recall.set(found)
            metrics.measured_at.set_to_current_time()
        await asyncio.sleep(interval_s)


TASKS = {
    "loading records and comparing them with Redis": _load,
    "following the model that Redis names": _follow,
    "measuring the recall of the collective index": _measure,
}
