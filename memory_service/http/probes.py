"""Probes: GET /health/live and /health/ready (JSON) for orchestration, GET /metrics for Prometheus."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from memory_service.http.metrics import Metrics
from memory_service.service.service import MemoryService
from memory_service.store.redis.errors import StoreUnavailable


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
    app.get("/health/live")(live)
    app.get("/health/ready")(ready)
    app.get("/metrics")(metrics)


async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


async def ready(request: Request) -> JSONResponse:
    """Redis answers, and everything in it is loaded."""
    state = request.app.state
    service: MemoryService = state.service
    # A wrong token is refused before; a caller without one learns here that its other calls would be refused.
    authorized = state.settings.token is None or "authorization" in request.headers
    about = {"model_version": service.model_version, "authorized": authorized}
    try:
        await service.check_store()
    except StoreUnavailable as error:
        return JSONResponse({"status": "redis is out of reach", "detail": str(error), **about}, 503)
    if state.started:
        return JSONResponse({"status": "ready", **about, **_transition(service)})
    collective = service.serving.collective
    loaded = f", {collective.users} users so far" if collective is not None else ""
    return JSONResponse({"status": state.trouble or f"loading from redis{loaded}", **about}, 503)


async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    service: MemoryService = request.app.state.service
    shown: Metrics = request.app.state.metrics
    up = await _redis_answers(service, shown)
    shown.redis_up.set(up)
    shown.ready.set(up and request.app.state.started)
    shown.resident.set(service.resident_users)
    collective = service.serving.collective
    shown.collective.set(len(collective or ()))
    shown.collective_users.set(collective.users if collective is not None else 0)
    shown.pruned.value = service.pruned
    shown.primaries_lost.set(service.store.redis.lost)
    shown.unreplicated.value = service.store.redis.unreplicated
    shown.replicas.set(len(service.presence.replicas))
    shown.lapses.value = service.presence.lapses
    shown.model.clear()
    shown.model.labels("serving", service.model_version).set(1)
    shown.model.labels("wanted", service.models.wanted.model_version).set(1)
    shown.model_trouble.set(bool(service.models.trouble or request.app.state.trouble))
    return Response(generate_latest(shown.registry), media_type=CONTENT_TYPE_LATEST)


async def _redis_answers(service: MemoryService, shown: Metrics) -> bool:
    begin = time.perf_counter()
    try:
        await service.check_store()
    except StoreUnavailable:
        return False
    shown.redis_seconds.set(time.perf_counter() - begin)
    return True


def _transition(service: MemoryService) -> dict[str, Any]:
    """How many users are on the wanted model, if it does not serve yet, and why it cannot be loaded, if it cannot."""
    wanted, about = service.models.wanted, {"trouble": service.models.trouble} if service.models.trouble else {}
    if wanted is service.serving or wanted.collective is None or service.serving.collective is None:
        return about
    users = {"users": service.serving.collective.known, "moved": wanted.collective.users}
    return about | {"wanted": wanted.model_version, **users}
