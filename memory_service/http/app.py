"""The application; `routes` and `probes` list its paths, `problems` its errors."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI

from memory_service.http import probes, routes
from memory_service.http.background import lifespan
from memory_service.http.metrics import Metrics
from memory_service.http.middleware import AuthMiddleware
from memory_service.http.openapi import document
from memory_service.http.problems import handle_errors
from memory_service.protocol.call.envelope import Envelope
from memory_service.protocol.call.logs import AccessLog
from memory_service.protocol.call.tracing import NO_NATIVE_TELEMETRY
from memory_service.service.service import MemoryService
from memory_service.settings import MemorySettings
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint


def create_app(settings: MemorySettings, tracer: Any = None) -> FastAPI:
    """The application; `tracer` makes its spans. The checkpoint is read at once, so that a missing one fails before a
    port is bound.

    Raises:
        CheckpointError: there is no usable checkpoint in `settings.run`.
        GpuError: the settings ask for a GPU, and there is none.
        ValueError: `redis_url` is not set.
    """
    if settings.redis_url is None:
        raise ValueError("redis_url is not set")
    app = FastAPI(
        title="RAMRec memory service", lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=NO_NATIVE_TELEMETRY
    )
    app.openapi = lambda: document(app, settings.token is not None)  # type: ignore[method-assign]
    metrics = Metrics()
    app.state.service, app.state.metrics, app.state.settings = _service(settings), metrics, settings
    app.state.trouble = ""  # why it cannot start
    app.state.started, app.state.loaded = False, asyncio.Event()  # whether catalogue and collective index are loaded
    handle_errors(app)
    routes.add(app)
    probes.add(app)
    log = AccessLog(logging.getLogger("memory_service.access"))
    envelope = Envelope(metrics.requests, metrics.seconds, log, tracer)
    app.add_middleware(AuthMiddleware, envelope=envelope, settings=settings)
    return app


def _service(settings: MemorySettings) -> MemoryService:
    checkpoint = load_checkpoint(settings.run, with_weights=False)
    idle_s = round((settings.idle_days or 0) * 86400)
    url, timeout_s = settings.redis_url or "", settings.redis_timeout_s
    store = Store(url, checkpoint.config.rules, timeout_s, idle_s, settings.redis_replicas)
    return MemoryService(settings, store, checkpoint)
