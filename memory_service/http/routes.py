"""What the memory service answers, route by route (`memory_service.http.app` lists them)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from memory_service.http.doorkeeper import problem
from memory_service.http.metrics import Metrics
from memory_service.protocol.slots import SLOTS
from memory_service.protocol.structs import (
    CONTENT_TYPE,
    Forgotten,
    ModelRequest,
    PlanRequest,
    QuotaRequest,
    RegisterRequest,
    RekeyRequest,
    ReplicasReply,
    RetrieveRequest,
    UserPage,
    Users,
    WriteRequest,
)
from memory_service.protocol.telemetry import CALL
from memory_service.service.merging import TooLate
from memory_service.service.service import MemoryService
from memory_service.store.link import StoreUnavailable

Body = TypeVar("Body", bound=msgspec.Struct)
FAR = 2**53
"""Beyond any catalogue number, revision and cursor, and within what Redis can count."""


class TooLarge(ValueError):  # noqa: N818 - answered with 413
    """The body exceeds the limit."""


def add(app: FastAPI) -> None:
    """Give the application its routes. Their functions stand by themselves and ask the request for the service:
    FastAPI remembers functions for good, and what they hold with them.
    """
    for call in (retrieve, plan, write, rekey, quota):  # plain routes: these take bytes, there is nothing to inject
        app.add_route(f"/v1/{call.__name__}", call, methods=["POST"])
    app.get("/v1/user")(inspect)
    app.delete("/v1/user")(forget)
    app.get("/v1/users")(users)
    app.get("/v1/replicas")(replicas)
    app.get("/v1/catalogue")(catalogue)
    app.post("/v1/catalogue")(register)
    app.get("/v1/model")(model)
    app.post("/v1/model")(change_model)
    app.get("/v1/walk")(walk)
    app.get("/v1/stale")(stale)
    app.get("/health/live")(live)
    app.get("/health/ready")(ready)
    app.get("/metrics")(metrics)


async def retrieve(request: Request) -> Response:
    """Memories of a batch of users."""
    asked = await _body(request, RetrieveRequest)
    reply = await _service(request).retrieve(asked)
    seen: Metrics = request.app.state.metrics
    seen.users.inc(len(asked.users))
    seen.entropy.observe(np.frombuffer(reply.entropy, "<f4"))
    seen.k.observe(np.frombuffer(reply.k, "<i4"))
    seen.collective_k.observe(np.frombuffer(reply.collective_k, "<i4"))
    seen.bank_size.observe(np.frombuffer(reply.bank_size, "<i4"))
    return _answer(reply)


async def plan(request: Request) -> Response:
    """What events would mean."""
    return _answer(await _service(request).plan(await _body(request, PlanRequest)))


async def write(request: Request) -> Response:
    """Write planned events."""
    reply = await _service(request).write(await _body(request, WriteRequest))
    done: Metrics = request.app.state.metrics
    done.events.inc(sum(len(user.accepted) for user in reply.users))
    done.conflicts.inc(sum(user.retry is not None for user in reply.users))
    return _answer(reply)


async def rekey(request: Request) -> Response:
    """Give records the keys of another model."""
    return _answer(await _service(request).rekey(await _body(request, RekeyRequest)))


async def quota(request: Request) -> Response:
    """A share of what an API key may ask a second."""
    return _answer(await _service(request).quota(await _body(request, QuotaRequest)))


async def inspect(user_id: str, request: Request) -> Response:
    """A bank laid open."""
    found = await _service(request).inspect(user_id)
    return _answer(found) if found else problem(404, "user_not_found", "nothing is known about this user")


async def forget(user_id: str, request: Request, here: bool = False) -> Response:
    """Forget a user; `here`: another replica has done so, and this one lets go."""
    if here:
        _service(request).let_go(user_id)
        return _answer(Forgotten(False))
    return _answer(await _service(request).forget(user_id))


async def replicas(request: Request) -> Response:
    """Which replicas are there."""
    presence = _service(request).presence
    return _answer(ReplicasReply(presence.url, await presence.look()))


async def users(request: Request, prefix: str = "", limit: int = 100) -> Response:
    """User ids with a prefix."""
    return _answer(Users(await _service(request).store.users(prefix, max(1, min(limit, 1000)))))


async def catalogue(request: Request, since: int = 1, revision: int = 0) -> Response:
    """Items from a number on, or changed since a revision."""
    listing = _service(request).catalogue.listing
    return _answer(await listing(max(1, min(since, FAR)), max(-FAR, min(revision, FAR))))


async def register(request: Request) -> Response:
    """Register or change items."""
    return _answer(await _service(request).catalogue.register(await _body(request, RegisterRequest)))


async def model(request: Request) -> Response:
    """Which model serves, and which one is wanted."""
    return _answer(_service(request).model())


async def change_model(request: Request) -> Response:
    """Want another model, or cut over to it."""
    asked, service = await _body(request, ModelRequest), _service(request)
    if asked.cut_over:
        await service.models.cut_over(asked.version)
    else:
        await service.models.want(asked.version, Path(asked.run))
    return _answer(service.model())


async def walk(
    request: Request, cursor: int = 0, limit: int = 1000, first_slot: int = 0, last_slot: int = SLOTS - 1
) -> Response:
    """Users of some slots, page by page."""
    store, slots = _service(request).store, _slots(first_slot, last_slot)
    return _answer(UserPage(*await store.walk(max(0, min(cursor, FAR)), max(1, min(limit, 10_000)), slots)))


async def stale(
    request: Request,
    version: str,
    cursor: int = 0,
    limit: int = 200,
    first_slot: int = 0,
    last_slot: int = SLOTS - 1,
) -> Response:
    """Users who are not of a model yet."""
    cursor, limit, slots = max(0, min(cursor, FAR)), max(1, min(limit, 1000)), _slots(first_slot, last_slot)
    return _answer(await _service(request).stale(version, cursor, limit, slots))


def _slots(first: int, last: int) -> range:
    return range(max(0, min(first, SLOTS)), max(0, min(last + 1, SLOTS)))


async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


async def ready(request: Request) -> JSONResponse:
    """Redis answers, and everything in it is loaded."""
    service, state = _service(request), request.app.state
    # A wrong token does not come this far; without one a caller sees here that its calls would be refused.
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
    service, shown = _service(request), request.app.state.metrics
    up = await _redis_answers(service, shown)
    shown.redis_up.set(up)
    shown.ready.set(up and request.app.state.started)
    shown.resident.set(service.resident_users)
    collective = service.serving.collective
    shown.collective.set(len(collective or ()))
    shown.collective_users.set(collective.users if collective is not None else 0)
    shown.pruned.value = service.pruned
    shown.primaries_lost.set(service.store.link.lost)
    shown.unreplicated.value = service.store.link.unreplicated
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


def _service(request: Request) -> MemoryService:
    service: MemoryService = request.app.state.service
    return service


def _transition(service: MemoryService) -> dict[str, Any]:
    """How far the wanted model is, where it is not the one that serves, and what stands in its way."""
    wanted, about = service.models.wanted, {"trouble": service.models.trouble} if service.models.trouble else {}
    if wanted is service.serving or wanted.collective is None or service.serving.collective is None:
        return about
    users = {"users": service.serving.collective.known, "moved": wanted.collective.users}
    return about | {"wanted": wanted.model_version, **users}


async def _body(request: Request, kind: type[Body]) -> Body:
    limit = request.app.state.settings.body_limit_bytes
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
    call = CALL.get()
    if call is not None and call.left_s <= 0:
        raise TooLate("the deadline passed while the body came in")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except RecursionError as error:
        raise msgspec.DecodeError("nested too deeply") from error


def _answer(reply: msgspec.Struct) -> Response:
    return Response(msgspec.msgpack.encode(reply), media_type=CONTENT_TYPE)
