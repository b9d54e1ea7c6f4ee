"""Loading: the collective index of every loaded model is brought to what Redis has, and kept in step with it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from functools import partial

from memory_service.index.collective import Loaded
from memory_service.service.catalogue import Catalogue
from memory_service.service.models import Models
from memory_service.service.space import Space
from memory_service.store.batch import SHARED_FIELDS, read_batch
from memory_service.store.store import Store
from model.memory.bank import ENTRY_FIELDS

LOAD_USERS = 500
"""Users that are read and indexed at a time; other calls are answered in between."""


class CollectiveLoader:
    """Reads the records of others' memories from Redis into the collective indexes.

    Attributes:
        fills_residents: whether the users that are read also become residents, as long as there is room. True while the
            process starts.
    """

    def __init__(self, store: Store, catalogue: Catalogue, models: Models) -> None:
        self._store, self._catalogue, self._models = store, catalogue, models
        self._comparing = asyncio.Lock()
        self.fills_residents = True

    async def compare(self) -> None:
        """Compare all users' stamps with Redis, and load what other processes wrote, or forgot, or what expired. At the
        start this loads everything. Raises StoreUnavailable.
        """
        for space in list(self._models.spaces.values()):
            if space is self._models.serving:
                await self.complete(space)
            else:  # completed when it begins to serve
                await self._compare(space)

    async def complete(self, space: Space) -> None:
        """Compare one space, which then has all memories of others. Raises StoreUnavailable."""
        await self._compare(space)
        space.is_complete = True

    async def look_at(self, users: Collection[str]) -> None:
        """Bring the entries of these users, whose records may have changed, to what Redis has."""
        for space in list(self._models.spaces.values()):
            if space.collective is not None:
                read = partial(self._read, space)
                await space.collective.look_at(list(users), self._store.stamps, read, self._models.spaces)

    async def _compare(self, space: Space) -> None:
        if space.collective is not None:
            async with self._comparing:
                users, read = self._store.all_users(LOAD_USERS), partial(self._read, space)
                await space.collective.compare(users, self._store.stamps, read, self._models.spaces)

    async def _read(self, space: Space, users: list[str]) -> Loaded:
        """The readable records of users. The space of a model that does not serve needs only those of its model; the
        serving one keeps the entries of users who moved on.
        """
        if space is not self._models.serving:
            models = await self._store.models(users)
            users = [user for user, model in zip(users, models, strict=True) if model == space.model_version]
        packed = await self._store.load_packed(users)
        columns = ENTRY_FIELDS if self.fills_residents else SHARED_FIELDS
        rows, batch = read_batch(packed, space.rules, space.dim, space.model_version, columns)
        others = sorted(set(range(len(users))).difference(rows))
        records = self._store.readable([users[row] for row in others], [packed[row] for row in others])
        await self._catalogue.cover([batch, *records.values()])
        loaded = Loaded([users[row] for row in rows], batch, records)
        if self.fills_residents:
            space.fill(loaded)
        return loaded
