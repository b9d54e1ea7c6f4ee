"""Bodies about the catalogue: `GET /items`, `GET`, `PUT` and `PATCH /items/{item_id}`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from api.http.schemas.fields import Metadata, RequestBody

ITEMS_LIMIT = 200
"""Items that one request may name."""


class ItemOut(BaseModel):
    """An item of the catalogue. `title`: as its metadata says, otherwise its id. `known_to_model`: whether the encoder
    was trained with it. `cluster`: the item cluster that counts for a user's entropy (null: not known to the model).
    """

    item_id: str
    title: str
    metadata: dict[str, Any]
    hidden: bool
    known_to_model: bool
    cluster: int | None


class ItemsResponse(BaseModel):
    """The items that were found."""

    items: list[ItemOut]


class ItemPut(RequestBody):
    """An item as it is to be."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"metadata": {"title": "Alien", "year": 1979}}]})

    metadata: Metadata = {}  # noqa: RUF012 - pydantic copies it
    """Attributes to show and to filter by."""
    hidden: bool = False
    """Whether the item is never recommended."""


class ItemPatch(RequestBody):
    """Changes to an item."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"hidden": True}]})

    metadata: Metadata | None = None
    """Attributes to set; the others stay as they are."""
    hidden: bool | None = None
    """Whether the item is never recommended; absent: unchanged."""
