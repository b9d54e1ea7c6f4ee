"""The application: routes, middleware and errors put together."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI

from api.access.keys import KeyRing
from api.http.fast_path import FastPathMiddleware
from api.http.lifespan import running
from api.http.metrics import ApiMetrics
from api.http.middleware import BodyLimitMiddleware, RequestMiddleware
from api.http.openapi import document, operation_id
from api.http.policy import RouteTable
from api.http.problems import install
from api.http.routes import items, model, recommend, users
from api.inspector import page as inspector
from api.settings import ApiSettings
from api.workers import Worker
from memory_service.protocol.call.envelope import Envelope
from memory_service.protocol.call.logs import AccessLog
from memory_service.protocol.call.tracing import NO_NATIVE_TELEMETRY
from model.network.tensors import find_device
from model.serving.recommender import Recommender

ROUTERS = (recommend.router, users.router, items.router, model.router, inspector.router)


def create_app(settings: ApiSettings, tracer: Any = None, worker: Worker | None = None) -> FastAPI:
    """The application. `tracer` makes its spans; `worker` is this process among several behind the same port.

    The model is loaded right away, so that a broken checkpoint fails before a port is bound.

    Raises:
        CheckpointError: `settings.run` holds no usable checkpoint. KeyFileError: `settings.keys` holds no usable keys.
        DeviceError: `settings.device` cannot be used.
    """
    ring = KeyRing(settings.keys) if settings.keys is not None else None
    recommender = Recommender.load(settings.run, find_device(settings.device))
    metrics = ApiMetrics(settings.feedback_key.get_secret_value(), worker)
    app = FastAPI(
        title="RAMRec",
        description="Recommendations that remember.",
        lifespan=lambda _: running(settings, recommender, metrics),
        generate_unique_id_function=operation_id,
        telemetry=NO_NATIVE_TELEMETRY,
    )
    app.openapi = lambda: document(app, ROUTERS, guarded=ring is not None)  # type: ignore[method-assign]
    for router in ROUTERS:
        app.include_router(router)
    install(app)
    own_pages = (app.openapi_url, app.docs_url, app.swagger_ui_oauth2_redirect_url, app.redoc_url)
    access_log = AccessLog(logging.getLogger("api.access"))
    app.add_middleware(FastPathMiddleware, router=recommend.router)
    app.add_middleware(BodyLimitMiddleware)
    app.add_middleware(
        RequestMiddleware,
        envelope=Envelope(metrics.requests, metrics.request_seconds, access_log, tracer),
        routes=RouteTable(ROUTERS, own_pages),
        ring=ring,
        timeout_s=settings.request_timeout_s,
    )
    return app
