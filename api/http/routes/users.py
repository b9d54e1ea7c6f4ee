"""Routes about users: what they took is stored, shown and forgotten."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request

from api.http import examples
from api.http.openapi import DescribedRoute
from api.http.policy import declare
from api.http.problems import NotFound
from api.http.routes.parameters import Limit, UserId
from api.http.schemas.memories import (
    AdaptiveK,
    ForgetResponse,
    HowMany,
    IngestRequest,
    IngestResponse,
    LogEntry,
    MemoryEntry,
    PrunedItem,
    QualityParts,
    UserMemoryResponse,
    UsersResponse,
)
from api.http.services import Services
from api.ingest.ingest import ingest
from api.models.engine import Engine
from memory_service.protocol import user_memory as wire
from memory_service.protocol.bounds import ID_LIMIT_BYTES
from model.memory.ids import CatalogueNumber

Prefix = Annotated[
    str, Query(max_length=ID_LIMIT_BYTES, description="Beginning of the ids; empty: all users.", examples=["19"])
]

router = APIRouter(route_class=DescribedRoute, tags=["memory"])


@router.post("/memories")
@declare("ingest", *examples.INVALID_BODY, *examples.NOT_STORED, example=examples.INGESTED)
async def remember(body: IngestRequest, request: Request) -> IngestResponse:
    """Store interactions. What is acknowledged is durable, and the next recommendation takes it into account."""
    services = Services.of(request)
    with services.intake.admitted(len(body.interactions)):
        return await ingest(services.models, body.interactions)


@router.get("/users/{user_id:id}/memory")
@declare("admin", examples.NO_USER, examples.INVALID_ID, examples.UNAVAILABLE, example=examples.BANK)
async def user_memory(user_id: UserId, request: Request) -> UserMemoryResponse:
    """A user's memory bank, with qualities, entropy, clusters and K."""
    engine = Services.of(request).engine
    found = await engine.memory.inspect(user_id)
    if found is None:
        raise NotFound("nothing is known about this user", "user_not_found")
    await engine.know(found.catalogue_size)
    return _bank(engine, found)


@router.delete("/users/{user_id:id}/memory")
@declare("admin", examples.INVALID_ID, examples.UNAVAILABLE, example=examples.FORGOTTEN)
async def forget(user_id: UserId, request: Request) -> ForgetResponse:
    """Delete everything about a user, for good. Old events that are sent again later do not bring the user back."""
    gone = await Services.of(request).engine.memory.forget(user_id)
    return ForgetResponse(user_id=user_id, existed=gone.existed)


@router.get("/users")
@declare("admin", examples.INVALID, examples.UNAVAILABLE, example={"users": ["196", "1960"]})
async def users(request: Request, prefix: Prefix = "", limit: Limit = 100) -> UsersResponse:
    """User ids that begin with a prefix; if there are more than `limit`, some of them."""
    return UsersResponse(users=list(await Services.of(request).engine.memory.users(prefix, limit)))


def _bank(engine: Engine, found: wire.UserMemory) -> UserMemoryResponse:
    def name(number: int) -> str:
        return engine.catalogue.item_id(CatalogueNumber(number))

    return UserMemoryResponse(
        user_id=found.user_id,
        version=found.version,
        model_version=found.model_version,
        events=found.events,
        bank_size=len(found.entries),
        capacity=found.capacity,
        pruned=found.pruned,
        seen=found.seen,
        share=found.share,
        entropy=found.entropy,
        k=found.k,
        clusters={str(cluster): share for cluster, share in found.clusters.items()},
        entries=[_entry(entry, name(entry.item)) for entry in found.entries],
        log=[LogEntry(item_id=name(item), timestamp=when) for item, when in found.log],
        position=found.standing,
        threshold=found.threshold,
        adaptive_k=_adaptive_k(found),
        pruned_items=[_pruned(gone, name(gone.item)) for gone in found.gone],
    )


def _entry(entry: wire.EntryOut, item_id: str) -> MemoryEntry:
    return MemoryEntry(
        item_id=item_id,
        quality=entry.quality,
        recency=entry.recency,
        rating=entry.rating,
        timestamp=entry.time,
        frequency=entry.frequency,
        access=entry.access,
        last_access=entry.last_access or None,
        cluster=entry.cluster if entry.cluster >= 0 else None,
        quality_parts=None if entry.parts is None else _quality_parts(entry.parts),
        position=entry.place,
        first_time=entry.first_time,
        mean_gap_s=entry.mean_gap_s,
        occasions_since=entry.occasions_since,
        usual_hour=entry.usual_hour,
        usual_day=entry.usual_day,
    )


def _pruned(gone: wire.GoneOut, item_id: str) -> PrunedItem:
    return PrunedItem(
        item_id=item_id,
        timestamp=gone.time,
        frequency=gone.frequency,
        quality=gone.quality,
        quality_parts=_quality_parts(gone.parts),
    )


def _quality_parts(parts: wire.QualityParts) -> QualityParts:
    return QualityParts(**msgspec.structs.asdict(parts))


def _adaptive_k(found: wire.UserMemory) -> AdaptiveK | None:
    if found.own is None or found.collective is None:
        return None  # of a memory service of an older version
    own, others = (HowMany(**msgspec.structs.asdict(how)) for how in (found.own, found.collective))
    return AdaptiveK(own=own, collective=others)
