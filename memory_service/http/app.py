"""Routes of the memory service: msgpack in, msgpack out (`memory_service.protocol.structs`).

    POST /v1/retrieve, /v1/plan, /v1/write, /v1/rekey, /v1/quota
    GET, DELETE /v1/user?user_id=      a bank laid open; forget
    GET /v1/users?prefix=&limit=
    GET /v1/replicas                   which replicas are there
    GET /v1/catalogue?since=&revision=, POST /v1/catalogue
    GET, POST /v1/model                which models are loaded; want another one, or cut over to it
    GET /v1/walk?cursor=&limit=&first_slot=&last_slot=     users of some slots, step by step
    GET /v1/stale?version=&cursor=&limit=&first_slot=&last_slot=     those of other models
    GET /health/live, /health/ready, /metrics, /openapi.json

Errors are `Problem`: 400 no msgpack of the right shape, 401 without the token, 404, 405, 409 another model, 413 too
large, 422 columns that do not fit, 429 too many calls at once, 503 Redis out of reach, or the
deadline has passed. 429 and 503 carry `Retry-After`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from memory_service.http import routes
from memory_service.http.doorkeeper import RETRY_AFTER_S, Doorkeeper, problem
from memory_service.http.metrics import Metrics
from memory_service.http.openapi import document
from memory_service.index.collective import entries_that_fit
from memory_service.index.gpu import on_cuda
from memory_service.protocol.telemetry import NO_NATIVE_TELEMETRY
from memory_service.protocol.wire import BadRequest
from memory_service.service.merging import TooLate
from memory_service.service.models import ModelMismatch
from memory_service.service.recall import recall
from memory_service.service.service import MemoryService
from memory_service.settings import MemorySettings, reached_at
from memory_service.store.link import StoreUnavailable
from memory_service.store.record import RecordError
from memory_service.store.store import Store
from memory_service.tasks import end
from model.checkpoint import CheckpointError, load_checkpoint

log = logging.getLogger(__name__)
FOLLOW_S = 1.0
"""How often a process looks which model is wanted. A call that names a model unknown to it has it look at once."""
START_WAIT_S = 2.0
"""A small store is loaded before the first call; a large one while calls are answered, marked as degraded."""
STATUS: dict[type[Exception], tuple[int, str]] = {
    msgspec.MsgspecError: (400, "invalid_body"),
    UnicodeDecodeError: (400, "invalid_body"),  # what msgspec raises for text that is no UTF-8
    RequestValidationError: (422, "invalid_query"),
    CheckpointError: (422, "checkpoint_refused"),
    ModelMismatch: (409, "model_mismatch"),
    BadRequest: (422, "invalid_columns"),
    routes.TooLarge: (413, "body_too_large"),
    RecordError: (500, "damaged_record"),
    TooLate: (503, "deadline_exceeded"),
    StoreUnavailable: (503, "store_unavailable"),
}


def create_app(settings: MemorySettings, tracer: Any = None) -> FastAPI:
    """The application, whose spans `tracer` makes.

    Reads the checkpoint now, so that a missing one fails before any port is bound.

    Raises:
        CheckpointError: no usable checkpoint in `settings.run`.
        ValueError: no `redis_url`.
        DeviceError: no GPU where one is asked for.
    """
    if settings.redis_url is None:
        raise ValueError("redis_url is not set")
    checkpoint = load_checkpoint(settings.run, with_weights=False)
    idle_s = round((settings.idle_days or 0) * 86400)
    rules, timeout_s = checkpoint.config.rules, settings.redis_timeout_s
    store = Store(settings.redis_url, rules, timeout_s, idle_s, settings.redis_replicas)
    replicate = on_cuda() if settings.device == "cuda" else None
    collective = settings.collective_users if settings.collective else 0
    service = MemoryService(
        store,
        checkpoint,
        settings.resident_users,
        collective,
        replicate,
        settings.run.resolve(),
        settings.advertise or reached_at(settings),
        settings.patience_s,
        settings.collective_entries or entries_that_fit(checkpoint),
    )
    app = FastAPI(
        title="RAMRec memory service",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry=NO_NATIVE_TELEMETRY,
    )
    app.openapi = lambda: document(app, settings.token is not None)  # type: ignore[method-assign]
    app.state.service, app.state.metrics, app.state.settings = service, Metrics(), settings
    app.state.trouble = ""  # why it cannot start
    app.state.started, app.state.loaded = False, asyncio.Event()  # whether catalogue and collective scope are loaded
    for error, (status, code) in STATUS.items():
        app.add_exception_handler(error, _handler(status, code))
    app.add_exception_handler(HTTPException, _unrouted)
    routes.add(app)
    app.add_middleware(Doorkeeper, metrics=app.state.metrics, settings=settings, tracer=tracer)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    background = [asyncio.create_task(work(app), name=name) for name, work in BACKGROUND.items()]
    for task in background:
        task.add_done_callback(_report)
    with suppress(TimeoutError):
        await asyncio.wait_for(app.state.loaded.wait(), START_WAIT_S)  # calls may come from then on
    yield
    await end(background)
    await app.state.service.close()


def _report(task: asyncio.Task[None]) -> None:
    """Nobody waits for this task: what ends it must not go unseen."""
    if not task.cancelled() and task.exception() is not None:
        log.error("ended before its time: %s", task.get_name(), exc_info=task.exception())


async def _load(app: FastAPI) -> None:
    """Load what is in Redis, then compare with it now and then; tries again where Redis is not there."""
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
    """Look now and then which model Redis wants, from when everything is loaded."""
    await app.state.loaded.wait()
    while True:
        with suppress(StoreUnavailable):
            await app.state.service.models.follow()
        await asyncio.sleep(FOLLOW_S)


async def _measure(app: FastAPI) -> None:
    """Measure the recall of the collective scope now and then, from when everything is loaded."""
    every_s, rng, metrics = app.state.settings.recall_s, np.random.default_rng(), app.state.metrics
    await app.state.loaded.wait()
    while every_s > 0:
        if (found := await recall(app.state.service.serving, rng)) is not None:
            metrics.recall.set(found)
            metrics.measured_at.set_to_current_time()
        await asyncio.sleep(every_s)


BACKGROUND = {
    "loading records and comparing them with Redis": _load,
    "following the model that Redis names": _follow,
    "measuring the recall of the collective index": _measure,
}


def _handler(status: int, code: str) -> Callable[[Request, Any], Awaitable[Response]]:
    async def handle(request: Request, error: Any) -> Response:
        return problem(status, code, str(error))

    return handle


async def _unrouted(request: Request, error: Any) -> Response:
    """No such path, or a method that it does not have."""
    answer = problem(error.status_code, f"http_{error.status_code}", f"{request.method} {request.url.path}")
    if error.status_code == 405:  # the framework names the methods of one route, not all of this path
        scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "DELETE")}
        routes = request.app.routes
        has = [name for name, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in routes)]
        answer.headers["Allow"] = ", ".join(has)
    return answer
