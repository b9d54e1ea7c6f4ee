"""The catalogue in Redis: numbers, metadata and hidden flags of items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memory_service.store import scripts
from memory_service.store.keys import ABOUT, CATALOGUE, CHANGES, HIDDEN, IDS, REVISION
from memory_service.store.redis.connect import Connector

CHANGES_KEPT = 10_000
"""Changes of items that are remembered one by one."""


@dataclass(frozen=True)
class CatalogueItem:
    """An item as Redis keeps it; `about` is its metadata as JSON, empty where there is none."""

    item_id: str
    about: bytes
    hidden: bool


class StoredItems:
    """Reads and writes the catalogue; a part of `Store`. All methods raise StoreUnavailable."""

    def __init__(self, redis: Connector) -> None:
        self.redis = redis

    async def register(self, items: Iterable[CatalogueItem], *, overwrite: bool, flags: bool = True) -> list[int]:
        """Catalogue numbers of items; new items are registered.

        Args:
            items: in any order.
            overwrite: whether metadata and hidden flags of registered items are replaced.
            flags: whether `overwrite` includes the hidden flags.
        """
        args: list[Any] = ["1" if overwrite else "0", CHANGES_KEPT]
        for item in items:
            args += [item.item_id, item.about, str(int(item.hidden)) if flags else ""]
        if len(args) == 2:
            return []
        numbers: list[int] = (await self.redis.send([scripts.call(scripts.REGISTER, CATALOGUE, args)], durable=True))[0]
        return numbers

    async def catalogue(self, since: int, limit: int | None = None) -> tuple[int, list[CatalogueItem]]:
        """The revision, and the items with numbers from `since` on, at most `limit`."""
        last = -1 if limit is None else since + limit - 2
        revision, ids = await self.redis.send([("GET", REVISION), ("LRANGE", IDS, since - 1, last)])
        return int(revision or 0), await self._items(ids)

    async def item_ids(self, since: int) -> list[str]:
        """Ids of the items with numbers from `since` on."""
        return [item.decode() for item in (await self.redis.send([("LRANGE", IDS, since - 1, -1)]))[0]]

    async def changed(self, revision: int, below: int) -> tuple[int, dict[int, CatalogueItem] | None]:
        """The revision, and by number the items below number `below` that changed since an earlier one.

        None instead of items: the earlier revision is too old, or of another catalogue.
        """
        now, *numbers = (await self.redis.send([scripts.call(scripts.CHANGED, [REVISION, CHANGES], [revision])]))[0]
        if not numbers:
            return now, None
        wanted = sorted({int(number) for number in numbers[0] if int(number) < below})
        ids = await self.redis.send([("LINDEX", IDS, number - 1) for number in wanted])
        return now, dict(zip(wanted, await self._items(ids), strict=True))

    async def catalogue_state(self) -> tuple[int, int]:
        """The number of items, and the revision."""
        size, revision = await self.redis.send([("LLEN", IDS), ("GET", REVISION)])
        return int(size), int(revision or 0)

    async def _items(self, ids: list[bytes]) -> list[CatalogueItem]:
        if not ids:
            return []
        about, hidden = await self.redis.send([("HMGET", ABOUT, *ids), ("SMISMEMBER", HIDDEN, *ids)])
        return [
            CatalogueItem(item.decode(), text or b"", bool(flag))
            for item, text, flag in zip(ids, about, hidden, strict=True)
        ]
