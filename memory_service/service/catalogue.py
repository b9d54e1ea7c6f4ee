"""The item catalogue: the numbers and ids that this process knows. The catalogue itself is in Redis."""

from __future__ import annotations

import json
from collections.abc import Iterable

import msgspec

from memory_service.protocol.columns import BadRequest
from memory_service.protocol.structs import CatalogueReply, Item, RegisterReply, RegisterRequest
from memory_service.store.batch import RecordBatch
from memory_service.store.items import CatalogueItem
from memory_service.store.store import Store
from model.checkpoint import Checkpoint
from model.memory.record import UserRecord

REGISTER_BATCH = 2000
"""Items that are registered at a time."""
LISTED = 10_000
"""Items in one listing; a longer one would hold up other calls."""


class Catalogue:
    """Item ids and their numbers. Items are only added and numbers never change, so what is known stays true."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number_of: dict[str, int] = {}
        self.ids: list[str] = []
        """Ids in order of their numbers; the first item has number 1."""
        self.revision = 0

    @property
    def size(self) -> int:
        """Number of items known here."""
        return len(self.ids)

    def number_of(self, item_id: str) -> int:
        """The number of an item; 0: it is not known here."""
        return self._number_of.get(item_id, 0)

    async def start(self, checkpoint: Checkpoint) -> None:
        """Register the items of a model, with the metadata of its dataset, and learn all numbers."""
        about = checkpoint.metadata
        items = [CatalogueItem(item, _json(about.get(item)), False) for item in checkpoint.item_ids]
        for at in range(0, len(items), REGISTER_BATCH):
            await self._store.register(items[at : at + REGISTER_BATCH], overwrite=False)
        await self.sync()

    async def sync(self) -> None:
        """Learn the items that other processes registered."""
        size, self.revision = await self._store.catalogue_state()
        if size > self.size:
            since = self.size + 1
            ids = await self._store.item_ids(since)
            self._learn(ids[self.size + 1 - since :])  # another call may have learned some meanwhile

    async def numbers(self, item_ids: Iterable[str]) -> dict[str, int]:
        """The number of each item; unknown items are registered."""
        wanted = set(item_ids)
        missing = sorted(wanted - self._number_of.keys())
        for at in range(0, len(missing), REGISTER_BATCH):
            batch = missing[at : at + REGISTER_BATCH]
            await self._store.register([CatalogueItem(item, b"", False) for item in batch], overwrite=False)
        if missing:
            await self.sync()
        return {item: self._number_of[item] for item in wanted}

    async def cover(self, records: Iterable[UserRecord | RecordBatch]) -> None:
        """Learn the items that these records name, before they are used: another process may have registered some."""
        if any(record.newest_item > self.size for record in records):
            await self.sync()

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Register or change items."""
        items = [CatalogueItem(item.item_id, _json(item.metadata), item.hidden) for item in request.items]
        numbers = await self._store.register(items, overwrite=request.overwrite, flags=request.flags)
        await self.sync()
        return RegisterReply(numbers, self.size, self.revision)

    async def listing(self, since: int, revision: int = 0) -> CatalogueReply:
        """Items from number `since` on, with metadata and hidden flags, and those before that changed since."""
        now, changed = await self._store.changed(revision, since) if since > 1 else (0, {})
        listed_at, items = await self._store.catalogue(since, LISTED)
        size, _ = await self._store.catalogue_state()
        return CatalogueReply(
            since,
            now if since > 1 else listed_at,
            list(map(_item, items)),
            size,
            None if changed is None else [(number, _item(item)) for number, item in changed.items()],
        )

    def _learn(self, ids: list[str]) -> None:
        self._number_of.update(zip(ids, range(self.size + 1, self.size + 1 + len(ids)), strict=True))
        self.ids += ids


def _item(item: CatalogueItem) -> Item:
    return Item(item.item_id, msgspec.json.decode(item.about) if item.about else None, item.hidden)


def _json(metadata: dict[str, object] | None) -> bytes:
    """Metadata as it is stored. Raises BadRequest if it is not valid JSON, for example with bytes or NaN."""
    if metadata is None:
        return b""
    try:
        return json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadRequest(f"metadata is not valid JSON: {error}") from error
