"""The routes of the memory service. Bodies and replies: `memory_service.protocol.structs`; probes: `.probes`.

POST /v1/retrieve, /v1/plan, /v1/write, /v1/rekey, /v1/quota
GET, DELETE /v1/user?user_id=      all that is known about a user; forget the user
GET /v1/users?prefix=&limit=       user ids
GET /v1/replicas                   the memory replicas that are present
GET /v1/catalogue?since=&revision=, POST /v1/catalogue
GET, POST /v1/model                the loaded models; want another one, or let it serve
GET /v1/walk?cursor=&limit=&first_slot=&last_slot=               users of some hash slots, page by page
GET /v1/stale?version=&cursor=&limit=&first_slot=&last_slot=     those of other models
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from memory_service.http.metrics import Metrics
from memory_service.http.problems import TooLarge, problem
from memory_service.protocol.bounds import POSITION_LIMIT
from memory_service.protocol.call.context import CALL
from memory_service.protocol.hash_slots import SLOTS
from memory_service.protocol.question import Question
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
from memory_service.service.merging import TooLate
from memory_service.service.service import MemoryService

Body = TypeVar("Body", bound=msgspec.Struct)


def add(app: FastAPI) -> None:
    """Add the routes to the application. Their functions get the service from the request, as FastAPI never drops
    functions, nor what they hold.
    """
    for call in (retrieve, plan, write, rekey, quota):  # plain routes: their bodies are read here, not by FastAPI
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


async def retrieve(request: Request) -> Response:
    """Memories of a batch of users."""
    question = Question.unpacked(await _body(request, RetrieveRequest))
    answer = await _service(request).retrieve(question)
    found, metrics = answer.retrieved, _metrics(request)
    metrics.users.inc(len(question.users))
    metrics.entropy.observe(found.entropy)
    metrics.k.observe(found.k)
    metrics.collective_k.observe(found.collective_k)
    metrics.bank_size.observe(found.bank_size)
    return _reply(answer.packed())


async def plan(request: Request) -> Response:
    """What events would mean; nothing is changed."""
    return _reply(await _service(request).plan(await _body(request, PlanRequest)))


async def write(request: Request) -> Response:
    """Write planned events."""
    reply = await _service(request).write(await _body(request, WriteRequest))
    metrics = _metrics(request)
    metrics.events.inc(sum(len(user.accepted) for user in reply.users))
    metrics.conflicts.inc(sum(user.retry is not None for user in reply.users))
    return _reply(reply)


async def rekey(request: Request) -> Response:
    """Give records the keys of another model."""
    return _reply(await _service(request).rekey(await _body(request, RekeyRequest)))


async def quota(request: Request) -> Response:
    """Requests that an API key may make in a second, granted in portions."""
    return _reply(await _service(request).quota(await _body(request, QuotaRequest)))


async def inspect(user_id: str, request: Request) -> Response:
    """All that is known about a user."""
    found = await _service(request).inspect(user_id)
    return _reply(found) if found else problem(404, "user_not_found", "nothing is known about this user")


async def forget(user_id: str, request: Request, here: bool = False) -> Response:
    """Forget a user; `here`: another memory replica has forgotten them, and this one drops them from memory."""
    if here:
        _service(request).drop(user_id)
        return _reply(Forgotten(False))
    return _reply(await _service(request).forget(user_id))


async def replicas(request: Request) -> Response:
    """The memory replicas that are present."""
    presence = _service(request).presence
    return _reply(ReplicasReply(presence.url, await presence.look()))


async def users(request: Request, prefix: str = "", limit: int = 100) -> Response:
    """User ids that begin with a prefix."""
    return _reply(Users(await _service(request).store.users(prefix, max(1, min(limit, 1000)))))


async def catalogue(request: Request, since: int = 1, revision: int = 0) -> Response:
    """Items from a number on, and earlier ones that changed after a revision."""
    since, revision = max(1, min(since, POSITION_LIMIT)), max(-POSITION_LIMIT, min(revision, POSITION_LIMIT))
    return _reply(await _service(request).catalogue.listing(since, revision))


async def register(request: Request) -> Response:
    """Register or change items."""
    return _reply(await _service(request).catalogue.register(await _body(request, RegisterRequest)))


async def model(request: Request) -> Response:
    """The serving and the wanted model."""
    return _reply(_service(request).model())


async def change_model(request: Request) -> Response:
    """Make a model the wanted one, or let the wanted model serve."""
    asked, service = await _body(request, ModelRequest), _service(request)
    if asked.cut_over:
        await service.models.cut_over(asked.version)
    else:
        await service.models.want(asked.version, Path(asked.run))
    return _reply(service.model())


async def walk(
    request: Request, cursor: int = 0, limit: int = 1000, first_slot: int = 0, last_slot: int = SLOTS - 1
) -> Response:
    """Users of some hash slots, page by page."""
    store, slots = _service(request).store, _slots(first_slot, last_slot)
    return _reply(UserPage(*await store.walk(max(0, min(cursor, POSITION_LIMIT)), max(1, min(limit, 10_000)), slots)))


async def stale(
    request: Request,
    version: str,
    cursor: int = 0,
    limit: int = 200,
    first_slot: int = 0,
    last_slot: int = SLOTS - 1,
) -> Response:
    """Users whose records are not of the wanted model, page by page."""
    cursor, limit, slots = max(0, min(cursor, POSITION_LIMIT)), max(1, min(limit, 1000)), _slots(first_slot, last_slot)
    return _reply(await _service(request).stale(version, cursor, limit, slots))


def _slots(first: int, last: int) -> range:
    return range(max(0, min(first, SLOTS)), max(0, min(last + 1, SLOTS)))


def _service(request: Request) -> MemoryService:
    service: MemoryService = request.app.state.service
    return service


def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


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


def _reply(reply: msgspec.Struct) -> Response:
    return Response(msgspec.msgpack.encode(reply), media_type=CONTENT_TYPE)
