"""A memory replica in this process, called as the api calls it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memory_service.protocol.structs import (
    EventIn,
    PlanRequest,
    RetrieveReply,
    RetrieveRequest,
    UserEvents,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteRequest,
)
from memory_service.protocol.user_memory import UserMemory
from memory_service.service.service import MemoryService
from memory_service.settings import MemorySettings
from memory_service.store.store import Store
from model.checkpoint import Checkpoint
from tests.memory_service.calling import retrieved
from tests.memory_service.plain_memory import (
    CAPACITY,
    TRIES,
    drawn,
    key_of,
    state_of,
)


class Replica:
    """One memory service, called as the api calls it."""

    def __init__(self, url: str, checkpoint: Checkpoint, resident_users: int = 100) -> None:
        settings = MemorySettings(
            run=Path(),
            resident_users=resident_users,
            collective_users=1,
            advertise=f"http://replica-{id(self)}",
            patience_s=3600,
        )
        self.service = MemoryService(settings, Store(url, checkpoint.config.rules, 10), checkpoint)

    async def started(self) -> Replica:
        await self.service.start()
        return self

    async def close(self) -> None:
        await self.service.close()

    async def plan(self, user: str, events: list[EventIn], received_at: float) -> UserPlan:
        asked = PlanRequest(self.service.model_version, received_at, [UserEvents(user, events)])
        return (await self.service.plan(asked)).users[0]

    async def write(self, plan: UserPlan, events: list[EventIn], received_at: float) -> UserWritten:
        """Write what was planned, with the keys that the plan asks for."""
        names = await self.names()
        items = [names[number] for number in plan.job.unpack().items.tolist()]
        item_of = {event.index: event.item_id for event in events}
        positions = plan.job.unpack().positions.tolist()
        keys = [key_of(plan.user_id, item_of[n], at) for n, at in zip(plan.accepted, positions, strict=True)]
        state = state_of(plan.user_id, items).tobytes()
        packed = b"".join(key.tobytes() for key in keys)
        write = UserWrite(plan.user_id, plan.version, events, packed, state, plan.token)
        asked = WriteRequest(self.service.model_version, received_at, [write])
        return (await self.service.write(asked)).users[0]

    async def ingest(self, user: str, events: list[EventIn], received_at: float, tries: int = TRIES) -> UserWritten:
        """Plan and write; where another was faster, write by the plan that came back."""
        plan = await self.plan(user, events, received_at)
        for _ in range(tries):
            written = await self.write(plan, events, received_at)
            if written.retry is None:
                return written
            plan = written.retry
        raise AssertionError(f"lost {tries} times in a row")

    async def retrieve(self, users: Sequence[str], counted: bool = False, **more: bytes) -> RetrieveReply:
        everything = np.full(len(users), CAPACITY, "<i4").tobytes()
        uncounted = [] if counted else list(range(len(users)))
        asked = RetrieveRequest(self.service.model_version, list(users), k=everything, uncounted=uncounted, **more)
        return await retrieved(self.service, asked)

    async def others(self, user: str) -> list[str]:
        """Items that a user (""; nobody) is told of others."""
        query = drawn("query").tobytes()
        found = (await self.retrieve([user], query_rows=b"\0\0\0\0", queries=query)).collective.unpack()
        names = await self.names()
        return sorted(names[number] for number in found.item[0, found.valid[0]].tolist())

    async def forget(self, user: str) -> bool:
        return (await self.service.forget(user)).existed

    async def inspect(self, user: str) -> UserMemory | None:
        return await self.service.inspect(user)

    async def names(self) -> list[str]:
        """Item ids by number; nothing has number 0."""
        listing = await self.service.catalogue.listing(1)
        return ["", *(item.item_id for item in listing.items)]
