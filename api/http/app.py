"""The REST API put together: what its parts share, and how long it lives."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import torch
from fastapi import FastAPI

from api.access.keys import KeyRing
from api.access.limits import Limits
from api.http import schemas as face
from api.http.direct import DirectCalls
from api.http.metrics import Metrics
from api.http.middleware import BodyLimit, Gate
from api.http.openapi import document, operation_id
from api.http.problems import MemoryUnavailable, install
from api.http.routes import direct, router
from api.ingest.ingest import Intake
from api.inspector import page as home
from api.memory.replicas import MemoryReplicas
from api.models.engine import Engine
from api.models.lifecycle import Models
from api.recommend.batching import MicroBatcher
from api.recommend.recommend import recommend
from api.settings import ApiSettings
from api.siblings import KEEP_S, Worker
from memory_service.protocol.telemetry import NO_NATIVE_TELEMETRY
from model.serving.recommender import Recommender

REFRESH_S = 5.0
"""How often changes that other processes made, to the catalogue or to what model serves, are looked for."""


def create_app(settings: ApiSettings, tracer: Any = None, worker: Worker | None = None) -> FastAPI:
    """The application, whose spans `tracer` makes; `worker`: this process among others behind the same port.

    Loads the model now, so that a broken checkpoint fails before any port is bound.

    Raises:
        CheckpointError: no usable checkpoint in `settings.run`. KeyFileError: no usable keys in `settings.keys`.
    """
    ring = KeyRing(settings.keys) if settings.keys is not None else None
    recommender = Recommender.load(settings.run)
    app = FastAPI(
        title="RAMRec",
        description="Recommendations that remember.",
        lifespan=_lifespan,
        generate_unique_id_function=operation_id,
        telemetry=NO_NATIVE_TELEMETRY,
    )
    app.openapi = lambda: document(app, guarded=ring is not None)  # type: ignore[method-assign]
    app.state.settings, app.state.recommender = settings, recommender
    app.state.leaving = False
    app.state.metrics = Metrics(settings.feedback_key.get_secret_value(), worker)
    app.include_router(direct)
    app.include_router(router)
    app.include_router(home.router)
    install(app)
    app.add_middleware(DirectCalls, router=direct)
    app.add_middleware(BodyLimit)
    app.add_middleware(Gate, metrics=app.state.metrics, ring=ring, timeout_s=settings.request_timeout_s, tracer=tracer)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: ApiSettings = app.state.settings
    torch.set_num_threads(settings.torch_threads)
    metrics: Metrics = app.state.metrics
    token = settings.memory_token.get_secret_value() if settings.memory_token else None
    memory = MemoryReplicas(settings.memory_url, settings.memory_timeout_s, token)
    engine = Engine(app.state.recommender, memory, metrics)
    models = Models(engine, settings.run, lambda serving: setattr(app.state, "engine", serving))
    batcher: MicroBatcher[face.RecommendRequest, face.RecommendResponse] = MicroBatcher(
        lambda requests: recommend(models, requests),
        settings.batch_size,
        settings.batch_wait_s,
        settings.queue_limit,
        metrics.waited,
        settings.patience_s,
        settings.batch_lanes,
        lambda request: memory.replica_of(request.user_id),
    )
    app.state.limits = Limits(memory.quota)
    app.state.models, app.state.batcher, app.state.intake = models, batcher, Intake(settings.ingest_limit)
    with suppress(MemoryUnavailable):
        await models.sync()  # before any request: what is hidden stays so from the first answer on
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(_refresh(models)), loop.create_task(_keep_figures(models, metrics))]
    with _reloading(models):
        yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await batcher.stop()
    await engine.close()


async def _refresh(models: Models) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        with suppress(MemoryUnavailable):
            await models.sync()


async def _keep_figures(models: Models, metrics: Metrics) -> None:
    """Tell the other workers what this one has counted, to the end."""
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
def _reloading(models: Models) -> Iterator[None]:
    """SIGHUP reads the configured checkpoint anew. Only a process's main thread hears signals."""
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
