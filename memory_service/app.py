"""Routes of the memory service: msgpack in, msgpack out (`memory_service.schemas`).

    POST /v1/retrieve, /v1/plan, /v1/write, /v1/rekey
    GET, DELETE /v1/user?user_id=      a bank laid open; forget
    GET /v1/users?prefix=&limit=
    GET /v1/catalogue?since=, POST /v1/catalogue
    GET /health/live, /health/ready, /metrics

Errors are `Problem`: 400 no msgpack of the right shape, 404, 409 another model, 413 too large, 422 columns that do not
fit, 503 Redis out of reach.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from memory_service.metrics import Metrics
from memory_service.record import RecordError
from memory_service.schemas import (
    CONTENT_TYPE,
    PlanRequest,
    Problem,
    RegisterRequest,
    RekeyRequest,
    RetrieveRequest,
    Users,
    WriteRequest,
)
from memory_service.service import MemoryService, ModelMismatch
from memory_service.settings import MemorySettings
from memory_service.store import Store, StoreUnavailable
from memory_service.wire import BadRequest
from model.checkpoint import load_checkpoint

RETRY_AFTER_S = 1
START_WAIT_S = 2.0
"""A small store is loaded before the first call; a large one while calls are answered, marked as degraded."""
STATUS: dict[type[Exception], tuple[int, str]] = {
    msgspec.MsgspecError: (400, "invalid_body"),
    UnicodeDecodeError: (400, "invalid_body"),  # what msgspec raises for text that is no UTF-8
    RequestValidationError: (422, "invalid_query"),
    ModelMismatch: (409, "model_mismatch"),
    BadRequest: (422, "invalid_columns"),
    RecordError: (500, "damaged_record"),
    StoreUnavailable: (503, "store_unavailable"),
}
Body = TypeVar("Body", bound=msgspec.Struct)


def create_app(settings: MemorySettings) -> FastAPI:
    """The application. Reads the checkpoint now, so that a missing one fails before any port is bound.

    Raises:
        CheckpointError: no usable checkpoint in `settings.run`.
        ValueError: no `redis_url`.
    """
    if settings.redis_url is None:
        raise ValueError("redis_url is not set")
    checkpoint = load_checkpoint(settings.run, with_weights=False)
    store = Store(settings.redis_url, checkpoint.config.rules, settings.redis_timeout_s)
    service = MemoryService(store, checkpoint, settings.resident_users, settings.collective)
    app = FastAPI(title="RAMRec memory service", lifespan=_lifespan, openapi_url=None)
    app.state.service, app.state.metrics, app.state.settings = service, Metrics(), settings
    app.state.started = False  # whether catalogue and collective scope are loaded
    for error, (status, code) in STATUS.items():
        app.add_exception_handler(error, _handler(status, code))
    _add_calls(app, service, app.state.metrics)
    _add_probes(app)
    app.middleware("http")(_measured)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    loading = asyncio.create_task(_load(app))
    await asyncio.wait([loading], timeout=START_WAIT_S)  # calls may come from then on
    yield
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    await app.state.service.close()


async def _load(app: FastAPI) -> None:
    """Load what is in Redis; tries again where Redis is not there yet."""
    while not app.state.started:
        try:
            await app.state.service.start()
            app.state.started = True
        except StoreUnavailable:
            await asyncio.sleep(RETRY_AFTER_S)


def _add_calls(app: FastAPI, service: MemoryService, metrics: Metrics) -> None:
    @app.post("/v1/retrieve")
    async def retrieve(request: Request) -> Response:
        asked = await _body(request, RetrieveRequest)
        reply = await service.retrieve(asked)
        metrics.users.inc(len(asked.users))
        for diversity, k in zip(np.frombuffer(reply.entropy, "<f4"), np.frombuffer(reply.k, "<i4"), strict=True):
            metrics.entropy.observe(float(diversity))
            metrics.k.observe(int(k))
        return _answer(reply)

    @app.post("/v1/plan")
    async def plan(request: Request) -> Response:
        return _answer(await service.plan(await _body(request, PlanRequest)))

    @app.post("/v1/write")
    async def write(request: Request) -> Response:
        reply = await service.write(await _body(request, WriteRequest))
        metrics.events.inc(sum(len(user.accepted) for user in reply.users))
        return _answer(reply)

    @app.post("/v1/rekey")
    async def rekey(request: Request) -> Response:
        return _answer(await service.rekey(await _body(request, RekeyRequest)))

    @app.get("/v1/user")
    async def inspect(user_id: str) -> Response:
        found = await service.inspect(user_id)
        return _answer(found) if found else _problem(404, "user_not_found", "nothing is known about this user")

    @app.delete("/v1/user")
    async def forget(user_id: str) -> Response:
        return _answer(await service.forget(user_id))

    @app.get("/v1/users")
    async def users(prefix: str = "", limit: int = 100) -> Response:
        return _answer(Users(await service.store.users(prefix, max(1, min(limit, 1000)))))

    @app.get("/v1/catalogue")
    async def catalogue(since: int = 1) -> Response:
        return _answer(await service.catalogue.listing(max(1, since)))

    @app.post("/v1/catalogue")
    async def register(request: Request) -> Response:
        return _answer(await service.catalogue.register(await _body(request, RegisterRequest)))


def _add_probes(app: FastAPI) -> None:
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        about = {"model_version": app.state.service.model_version}
        try:
            await app.state.service.store.ping()
        except StoreUnavailable as error:
            app.state.metrics.redis_up.set(0)
            return JSONResponse({"status": "redis is out of reach", "detail": str(error), **about}, 503)
        app.state.metrics.redis_up.set(1)
        if app.state.started:
            return JSONResponse({"status": "ready", **about})
        collective = app.state.service.collective
        loaded = f", {collective.users} users so far" if collective is not None else ""
        return JSONResponse({"status": f"loading from redis{loaded}", **about}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        service = app.state.service
        app.state.metrics.resident.set(service.resident_users)
        app.state.metrics.collective.set(len(service.collective or ()))
        return Response(generate_latest(app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _measured(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    begin = time.perf_counter()
    response = await call_next(request)
    metrics, route = request.app.state.metrics, request.scope.get("route")
    path = getattr(route, "path", "unknown")
    metrics.seconds.labels(path).observe(time.perf_counter() - begin)
    metrics.requests.labels(path, response.status_code).inc()
    return response


async def _body(request: Request, kind: type[Body]) -> Body:
    limit = request.app.state.settings.body_limit_bytes
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
    return msgspec.msgpack.decode(data, type=kind)


class TooLarge(ValueError):  # noqa: N818 - answered with 413
    """The body exceeds the limit."""


STATUS[TooLarge] = (413, "body_too_large")


def _handler(status: int, code: str) -> Callable[[Request, Any], Awaitable[Response]]:
    async def handle(request: Request, error: Any) -> Response:
        return _problem(status, code, str(error))

    return handle


def _problem(status: int, code: str, detail: str) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    content = msgspec.msgpack.encode(Problem(code, detail))
    return Response(content, status, headers, media_type=CONTENT_TYPE)


def _answer(reply: msgspec.Struct) -> Response:
    return Response(msgspec.msgpack.encode(reply), media_type=CONTENT_TYPE)
