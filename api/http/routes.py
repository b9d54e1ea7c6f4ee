"""Routes of the REST API."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path as FilePath
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Body, Path, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import api.http.paths  # noqa: F401 - the convertor `id`
from api.catalogue.catalogue import title_of
from api.http import schemas as face
from api.http.examples import (
    FULL,
    INVALID,
    INVALID_BODY,
    INVALID_ID,
    INVALID_RELOAD,
    LATE,
    NO_ITEM,
    NO_USER,
    NOT_KEPT,
    REFUSED,
    UNAVAILABLE,
)
from api.http.openapi import failures
from api.http.problems import InvalidRequest, MemoryUnavailable, NotFound
from api.ingest.ingest import ingest
from api.models.engine import Engine
from api.models.lifecycle import Models
from api.recommend.recommend import SCOPES, received
from memory_service.protocol.structs import Item, QualityParts, RegisterRequest, UserMemory

UserId = Annotated[
    face.Identifier,
    Path(description="The caller's user id, percent-encoded.", openapi_examples={"user": {"value": "196"}}),
]
ItemId = Annotated[
    face.Identifier,
    Path(description="The caller's item id, percent-encoded.", openapi_examples={"item": {"value": "50"}}),
]
Reload = Annotated[
    face.ReloadRequest | None, Body(openapi_examples={"another": {"value": {"run": "/runs/ml-100k-new"}}})
]
Limit = Annotated[int, Query(ge=1, le=1000, description="The most that is listed.", examples=[10])]
Prefix = Annotated[
    str, Query(max_length=face.ID_LIMIT_BYTES, description="What the ids begin with; empty: all.", examples=["19"])
]
Search = Annotated[
    str,
    Query(max_length=face.ID_LIMIT_BYTES, description="Part of an id or of metadata; empty: all.", examples=["war"]),
]
Ids = Annotated[
    list[face.Identifier] | None,
    Query(alias="id", max_length=face.ITEMS_LIMIT, description="Items asked for by their ids.", examples=[["50"]]),
]

router = APIRouter()
direct = APIRouter()
"""Calls that `api.http.direct` answers."""


# ------------------------------------------------------------------------------------------- recommend


@direct.post("/recommend", tags=["recommend"], responses=failures(*INVALID_BODY, FULL, LATE))
async def recommend_one(body: face.RecommendRequest, request: Request) -> face.RecommendResponse:
    """The top-N for a user, a sequence of items, both, or nobody in particular."""
    received([body])
    if body.filter:
        await request.app.state.models.prepare([body.filter])
    answer: face.RecommendResponse = (await request.app.state.batcher.submit([body], request.is_disconnected))[0]
    return answer


@direct.post("/recommend/batch", tags=["recommend"], responses=failures(*INVALID_BODY, FULL, LATE))
async def recommend_batch(body: face.RecommendBatchRequest, request: Request) -> face.RecommendBatchResponse:
    """The same for up to 256 requests."""
    received(body.requests)
    await request.app.state.models.prepare([one.filter for one in body.requests if one.filter])
    return {"results": await request.app.state.batcher.submit(body.requests, request.is_disconnected)}


# -------------------------------------------------------------------------------------------- memories


@router.post("/memories", tags=["memory"], responses=failures(*INVALID_BODY, *NOT_KEPT))
async def remember(body: face.IngestRequest, request: Request) -> face.IngestResponse:
    """Keep interactions. What is acknowledged is durable and seen by the next recommendation."""
    with request.app.state.intake.admitted(len(body.interactions)):
        return await ingest(request.app.state.models, body.interactions)


@router.get("/users/{user_id:id}/memory", tags=["memory"], responses=failures(NO_USER, INVALID_ID, UNAVAILABLE))
async def user_memory(user_id: UserId, request: Request) -> face.UserMemoryResponse:
    """A user's memory bank, with qualities, entropy, clusters and K."""
    engine: Engine = request.app.state.engine
    found = await engine.memory.inspect(user_id)
    if found is None:
        raise NotFound("nothing is known about this user", "user_not_found")
    await engine.know(found.catalogue_size)
    return _bank(engine, found)


def _bank(engine: Engine, found: UserMemory) -> face.UserMemoryResponse:
    name = engine.catalogue.item_id
    entries = [
        face.MemoryEntry(
            item_id=name(entry.item),
            quality=entry.quality,
            recency=entry.recency,
            rating=entry.rating,
            timestamp=entry.time,
            frequency=entry.frequency,
            access=entry.access,
            last_access=entry.last_access or None,
            cluster=entry.cluster if entry.cluster >= 0 else None,
            quality_parts=None if entry.parts is None else _parts(entry.parts),
            position=entry.place,
            first_time=entry.first_time,
            mean_gap_s=entry.mean_gap_s,
            occasions_since=entry.occasions_since,
            usual_hour=entry.usual_hour,
            usual_day=entry.usual_day,
        )
        for entry in found.entries
    ]
    return face.UserMemoryResponse(
        user_id=found.user_id,
        version=found.version,
        model_version=found.model_version,
        events=found.events,
        bank_size=len(entries),
        capacity=found.capacity,
        pruned=found.pruned,
        seen=found.seen,
        share=found.share,
        entropy=found.entropy,
        k=found.k,
        clusters={str(cluster): share for cluster, share in found.clusters.items()},
        entries=entries,
        log=[face.LogEntry(item_id=name(item), timestamp=when) for item, when in found.log],
        position=found.standing,
        threshold=found.threshold,
        adaptive_k=_adaptive_k(found),
        pruned_items=[
            face.PrunedItem(
                item_id=name(one.item),
                timestamp=one.time,
                frequency=one.frequency,
                quality=one.quality,
                quality_parts=_parts(one.parts),
            )
            for one in found.gone
        ],
    )


def _parts(parts: QualityParts) -> face.QualityParts:
    return face.QualityParts(**msgspec.structs.asdict(parts))


def _adaptive_k(found: UserMemory) -> face.AdaptiveK | None:
    if found.own is None or found.collective is None:
        return None  # a memory service of an older version
    own, others = (face.HowMany(**msgspec.structs.asdict(how)) for how in (found.own, found.collective))
    return face.AdaptiveK(own=own, collective=others)


@router.delete("/users/{user_id:id}/memory", tags=["memory"], responses=failures(INVALID_ID, UNAVAILABLE))
async def forget(user_id: UserId, request: Request) -> face.ForgetResponse:
    """Forget a user: everything, for good. Late retries of old events do not bring them back."""
    gone = await request.app.state.engine.memory.forget(user_id)
    return face.ForgetResponse(user_id=user_id, existed=gone.existed)


@router.get("/users", tags=["memory"], responses=failures(INVALID, UNAVAILABLE))
async def users(request: Request, prefix: Prefix = "", limit: Limit = 100) -> face.UsersResponse:
    """User ids that begin with a prefix; where there are more than `limit`, some of them."""
    return face.UsersResponse(users=list(await request.app.state.engine.memory.users(prefix, limit)))


# ----------------------------------------------------------------------------------------------- items


@router.get("/items", tags=["catalogue"], responses=failures(INVALID))
async def items(request: Request, query: Search = "", limit: Limit = 20, ids: Ids = None) -> face.ItemsResponse:
    """Items whose id or metadata contains the query; or those of the ids that are in the catalogue, in their order."""
    engine: Engine = request.app.state.engine
    if ids is not None:
        return face.ItemsResponse(items=[_item(engine, item) for item in engine.catalogue.named(ids)])
    found = await asyncio.to_thread(engine.catalogue.find, query, limit)  # a large catalogue takes its time
    return face.ItemsResponse(items=[_item(engine, item) for item in found])


@router.get("/items/{item_id:id}", tags=["catalogue"], responses=failures(NO_ITEM, INVALID_ID))
async def item(item_id: ItemId, request: Request) -> face.ItemOut:
    """One catalogue item."""
    return _known_item(request.app.state.engine, item_id)


@router.put("/items/{item_id:id}", tags=["catalogue"], responses=failures(*INVALID_BODY, UNAVAILABLE))
async def put_item(item_id: ItemId, body: face.ItemPut, request: Request) -> face.ItemOut:
    """Register an item, or replace all that is said about it."""
    engine: Engine = request.app.state.engine
    async with engine.changing:
        return await _change_item(
            request.app.state.models, RegisterRequest([Item(item_id, body.metadata, body.hidden)], overwrite=True)
        )


@router.patch("/items/{item_id:id}", tags=["catalogue"], responses=failures(*INVALID_BODY, NO_ITEM, UNAVAILABLE))
async def patch_item(item_id: ItemId, body: face.ItemPatch, request: Request) -> face.ItemOut:
    """Change some of an item's metadata, or hide it from recommendations; what is not named stays as it is."""
    engine: Engine = request.app.state.engine
    async with engine.changing:
        await engine.sync()  # another process may have changed it since
        now = _known_item(engine, item_id)
        metadata = None if body.metadata is None else _merged(now.metadata, body.metadata)
        change = Item(item_id, metadata, bool(body.hidden))
        return await _change_item(
            request.app.state.models, RegisterRequest([change], overwrite=True, flags=body.hidden is not None)
        )


def _merged(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    try:
        return face.checked_metadata(metadata | changes)
    except ValueError as error:
        raise InvalidRequest(f"with what the item has already: {error}") from error


async def _change_item(models: Models, change: RegisterRequest) -> face.ItemOut:
    await models.serving.memory.register(change)
    await models.sync_catalogues()
    return _known_item(models.serving, change.items[0].item_id)


def _known_item(engine: Engine, item_id: str) -> face.ItemOut:
    number = engine.catalogue.number_of.get(item_id)
    if number is None:
        raise NotFound("this item is not in the catalogue", "item_not_found")
    return _item(engine, engine.catalogue.items[number - 1])


def _item(engine: Engine, item: Item) -> face.ItemOut:
    index = engine.recommender.index_of.get(item.item_id)
    metadata = item.metadata or {}
    return face.ItemOut(
        item_id=item.item_id,
        title=title_of(item.item_id, metadata),
        metadata=metadata,
        hidden=item.hidden,
        known_to_model=index is not None,
        cluster=None if index is None else _cluster(engine, index),
    )


def _cluster(engine: Engine, index: int) -> int | None:
    cluster = int(engine.recommender.checkpoint.item_clusters[index])
    return cluster if cluster >= 0 else None


# ------------------------------------------------------------------------------------ model and probes


@router.get("/model", tags=["model"])
async def model(request: Request) -> face.ModelResponse:
    """The checkpoint that answers, and its configuration."""
    models: Models = request.app.state.models
    recommender = models.serving.recommender
    return face.ModelResponse(
        model_version=recommender.version,
        wanted=models.wanted.version,
        items=len(recommender.checkpoint.item_ids),
        scopes=list(SCOPES),
        config=recommender.config.model_dump(),
    )


@router.post("/model/reload", tags=["model"], responses=failures(*INVALID_RELOAD, REFUSED, UNAVAILABLE))
async def reload_model(request: Request, body: Reload = None) -> face.ReloadResponse:
    """Read a checkpoint, and have it wanted everywhere. It serves once `ramrec reembed` has moved all users to it; who
    takes something before moves at once. The checkpoint that serves already: it stays, and nothing else is wanted.
    """
    models: Models = request.app.state.models
    state = await models.reload(FilePath(body.run) if body is not None and body.run is not None else None)
    return face.ReloadResponse(
        serving=state.serving,
        wanted=state.wanted,
        state="serving" if state.wanted == state.serving else "moving",
        users=state.users,
        moved=state.moved,
    )


@router.get("/health/live", tags=["probes"])
async def live() -> face.Alive:
    """The process answers."""
    return face.Alive(status="alive")


@router.get("/health/ready", tags=["probes"], response_model=face.Ready, responses={503: {"model": face.Unready}})
async def ready(request: Request) -> JSONResponse:
    """Recommendations with memory can be given: memory service and Redis answer, with the same model."""
    if request.app.state.leaving:
        return JSONResponse({"status": "about to stop"}, 503)
    models: Models = request.app.state.models
    begin = time.perf_counter()
    try:
        memory = await models.serving.memory.ready()
        served = memory.model_version
        if served != models.serving.version:
            await models.follow()
    except MemoryUnavailable as error:
        return JSONResponse({"status": error.detail}, 503)
    if served not in models.engines:
        return JSONResponse({"status": f"the memory service serves model {served}"}, 503)
    about = {"status": "ready", "model_version": served, "memory_s": time.perf_counter() - begin}
    if memory.wanted is not None:
        about["moving"] = {"wanted": memory.wanted, "users": memory.users, "moved": memory.moved}
    return JSONResponse(about)


@router.get("/metrics", tags=["probes"], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics, of all workers of `ramrec serve` added up."""
    models: Models = request.app.state.models
    models.show(request.app.state.metrics)
    return Response(generate_latest(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)
