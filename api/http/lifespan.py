"""Starts what the routes share, keeps it up to date, and stops it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import torch

from api.access.limits import Limits
from api.http.metrics import ApiMetrics
from api.http.problems import MemoryUnavailable
from api.http.schemas.recommend import RecommendResponse
from api.http.services import Services
from api.ingest.ingest import Intake
from api.inspector.files import read_files
from api.memory.replicas import MemoryReplicas
from api.models.engine import Engine
from api.models.lifecycle import LoadedModels
from api.recommend.batching import MicroBatcher
from api.recommend.pipeline import answer
from api.recommend.request import TimedRequest
from api.settings import ApiSettings
from api.workers import KEEP_S
from model.serving.recommender import Recommender

REFRESH_S = 5.0
"""Interval at which changes by other processes, to the catalogue or to the serving model, are looked for."""


@asynccontextmanager
async def running(
    settings: ApiSettings, recommender: Recommender, metrics: ApiMetrics
) -> AsyncIterator[dict[str, Services]]:
    """The lifespan of the application; gives its state."""
    torch.set_num_threads(settings.torch_threads)
    services = make_services(settings, recommender, metrics)
    models = services.models
    with suppress(MemoryUnavailable):
        await models.sync()  # before the first request, so that hidden items stay hidden from the start
    tasks = [asyncio.create_task(_refresh(models)), asyncio.create_task(_share_metrics(models, metrics))]
    with _reloading_on_sighup(models):
        yield {"services": services}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await services.batcher.stop()
    await models.serving.close()


def make_services(settings: ApiSettings, recommender: Recommender, metrics: ApiMetrics) -> Services:
    """The services of one process. The memory service is not called yet."""
    token = settings.memory_token.get_secret_value() if settings.memory_token else None
    memory = MemoryReplicas(settings.memory_url, settings.memory_timeout_s, token)
    models = LoadedModels(Engine(recommender, memory, metrics), settings.run)
    batcher: MicroBatcher[TimedRequest, RecommendResponse] = MicroBatcher(
        partial(answer, models),
        settings.batch_size,
        settings.batch_wait_s,
        settings.queue_limit,
        metrics.waited,
        settings.patience_s,
        settings.batch_lanes,
        lambda timed: memory.replica_of(timed.request.user_id),
    )
    return Services(
        models=models,
        batcher=batcher,
        intake=Intake(settings.ingest_limit),
        limits=Limits(memory.quota),
        metrics=metrics,
        page=read_files(),
        stopping=threading.Event(),
    )


async def _refresh(models: LoadedModels) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        with suppress(MemoryUnavailable):
            await models.sync()


async def _share_metrics(models: LoadedModels, metrics: ApiMetrics) -> None:
    """Give the metrics of this process to the other workers, if any, until it ends."""
    worker = metrics.worker
    if worker is None:
        return
    try:
        while True:
            models.show(metrics)
            worker.keep(metrics.registry)
            await asyncio.sleep(KEEP_S)
    finally:
        worker.end(metrics.registry)


@contextmanager
def _reloading_on_sighup(models: LoadedModels) -> Iterator[None]:
    """On SIGHUP, read the configured checkpoint again. Only the main thread of a process can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    def reload() -> None:
        task = loop.create_task(models.reload_on_signal())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    yield
    loop.remove_signal_handler(signal.SIGHUP)
