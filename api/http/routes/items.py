"""Routes about the catalogue."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from api.catalogue.catalogue import title_of
from api.http.examples import INVALID, INVALID_BODY, INVALID_ID, ITEM, NO_ITEM, UNAVAILABLE
from api.http.openapi import DescribedRoute
from api.http.policy import declare
from api.http.problems import InvalidRequest, NotFound
from api.http.routes.parameters import ItemId, Limit
from api.http.schemas.fields import Identifier, checked_metadata
from api.http.schemas.items import ITEMS_LIMIT, ItemOut, ItemPatch, ItemPut, ItemsResponse
from api.http.services import Services
from api.models.engine import Engine
from api.models.lifecycle import LoadedModels
from memory_service.protocol.bounds import ID_LIMIT_BYTES
from memory_service.protocol.structs import Item, RegisterRequest
from model.memory.ids import ItemIndex

Search = Annotated[
    str,
    Query(max_length=ID_LIMIT_BYTES, description="Part of an id or of metadata; empty: all items.", examples=["war"]),
]
Ids = Annotated[
    list[Identifier] | None,
    Query(alias="id", max_length=ITEMS_LIMIT, description="Ids of items, in place of a search.", examples=[["50"]]),
]

router = APIRouter(route_class=DescribedRoute, tags=["catalogue"])


@router.get("/items")
@declare("recommend", INVALID, example={"items": [ITEM]})
async def items(request: Request, query: Search = "", limit: Limit = 20, ids: Ids = None) -> ItemsResponse:
    """Items whose id or metadata contains the query; or the items with the given ids, in their order, as far as they
    are in the catalogue.
    """
    engine = Services.of(request).engine
    if ids is not None:
        return ItemsResponse(items=[_item(engine, item) for item in engine.catalogue.named(ids)])
    found = await asyncio.to_thread(engine.catalogue.find, query, limit)  # a large catalogue takes its time
    return ItemsResponse(items=[_item(engine, item) for item in found])


@router.get("/items/{item_id:id}")
@declare("recommend", NO_ITEM, INVALID_ID, example=ITEM)
async def item(item_id: ItemId, request: Request) -> ItemOut:
    """One item of the catalogue."""
    return _known_item(Services.of(request).engine, item_id)


@router.put("/items/{item_id:id}")
@declare("admin", *INVALID_BODY, UNAVAILABLE, example=ITEM)
async def put_item(item_id: ItemId, body: ItemPut, request: Request) -> ItemOut:
    """Add an item, or replace it."""
    services = Services.of(request)
    async with services.engine.changing:
        new = Item(item_id, body.metadata, body.hidden)
        return await _register(services.models, RegisterRequest([new], overwrite=True))


@router.patch("/items/{item_id:id}")
@declare("admin", *INVALID_BODY, NO_ITEM, UNAVAILABLE, example=ITEM | {"hidden": True})
async def patch_item(item_id: ItemId, body: ItemPatch, request: Request) -> ItemOut:
    """Change some of an item's metadata, or hide it from recommendations; the rest stays as it is."""
    services = Services.of(request)
    engine = services.engine
    async with engine.changing:
        await engine.sync()  # another process may have changed the item
        current = _known_item(engine, item_id)
        metadata = None if body.metadata is None else _merged(current.metadata, body.metadata)
        change = Item(item_id, metadata, bool(body.hidden))
        flags = body.hidden is not None
        return await _register(services.models, RegisterRequest([change], overwrite=True, flags=flags))


def _merged(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    try:
        return checked_metadata(metadata | changes)
    except ValueError as error:
        raise InvalidRequest(f"merged with the present metadata: {error}") from error


async def _register(models: LoadedModels, change: RegisterRequest) -> ItemOut:
    await models.serving.memory.register(change)
    await models.sync_catalogues()
    return _known_item(models.serving, change.items[0].item_id)


def _known_item(engine: Engine, item_id: str) -> ItemOut:
    number = engine.catalogue.number_of.get(item_id)
    if number is None:
        raise NotFound("this item is not in the catalogue", "item_not_found")
    return _item(engine, engine.catalogue.items[number - 1])


def _item(engine: Engine, item: Item) -> ItemOut:
    index = engine.recommender.index_of.get(item.item_id)
    metadata = item.metadata or {}
    return ItemOut(
        item_id=item.item_id,
        title=title_of(item.item_id, metadata),
        metadata=metadata,
        hidden=item.hidden,
        known_to_model=index is not None,
        cluster=None if index is None else _cluster(engine, index),
    )


def _cluster(engine: Engine, index: ItemIndex) -> int | None:
    cluster = int(engine.recommender.checkpoint.item_clusters[index])
    return cluster if cluster >= 0 else None
