"""Calls of a memory service as the api makes them: over HTTP (`Caller`), or in this process (`service`)."""

import msgspec
import numpy as np
from starlette.testclient import TestClient

from memory_service.http.app import create_app
from memory_service.protocol.question import Question
from memory_service.protocol.structs import (
    EventIn,
    Forgotten,
    PlanReply,
    PlanRequest,
    RetrieveReply,
    RetrieveRequest,
    UserEvents,
    UserWrite,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import UserMemory
from memory_service.service.service import MemoryService
from memory_service.settings import MemorySettings
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint
from model.memory.rules import unit

DIM = 16
NOW = 1_700_000_000.0


class Caller:
    """Calls of the api, with keys that follow from user, item and time."""

    def __init__(self, client: TestClient, model_version: str) -> None:
        self.client, self.model_version = client, model_version

    def call(self, path: str, body: msgspec.Struct, kind: type, status: int = 200):
        response = self.client.post(path, content=msgspec.msgpack.encode(body))
        assert response.status_code == status, msgspec.msgpack.decode(response.content)
        return msgspec.msgpack.decode(response.content, type=kind)

    def plan(self, *users: UserEvents) -> PlanReply:
        return self.call("/v1/plan", PlanRequest(self.model_version, NOW, list(users)), PlanReply)

    def write_planned(self, plans, users) -> WriteReply:
        writes = [
            UserWrite(
                p.user_id, p.version, u.events, vectors(p.user_id, len(p.accepted)), vectors(p.user_id, 1), p.token
            )
            for p, u in zip(plans, users, strict=True)
        ]
        return self.call("/v1/write", WriteRequest(self.model_version, NOW, writes), WriteReply)

    def remember(self, user_id: str, *events: EventIn) -> WriteReply:
        users = [UserEvents(user_id, list(events))]
        return self.write_planned(self.plan(*users).users, users)

    def retrieve(self, *users: str, **more) -> RetrieveReply:
        return self.call("/v1/retrieve", RetrieveRequest(self.model_version, list(users), **more), RetrieveReply)

    def inspect(self, user_id: str) -> UserMemory | None:
        response = self.client.get("/v1/user", params={"user_id": user_id})
        return msgspec.msgpack.decode(response.content, type=UserMemory) if response.status_code == 200 else None

    def forget(self, user_id: str) -> bool:
        response = self.client.delete("/v1/user", params={"user_id": user_id})
        return msgspec.msgpack.decode(response.content, type=Forgotten).existed


def vectors(user_id: str, count: int) -> bytes:
    rng = np.random.default_rng(list(user_id.encode()))
    return unit(rng.normal(size=(count, DIM))).astype("<f4").tobytes()


def took(index: int, item_id: str, timestamp: float | None = None, **more) -> EventIn:
    return EventIn(index, item_id, NOW + index if timestamp is None else timestamp, **more)


def opened(run, url, **more) -> TestClient:
    """A memory service that gives everything away unless told otherwise: few users would share little."""
    return TestClient(
        create_app(MemorySettings(**{"run": run, "redis_url": url, "redis_timeout_s": 5, "collective_users": 1} | more))
    )


def column(data: bytes, kind: str) -> list:
    return np.frombuffer(data, kind).tolist()


def service(run, url, kind=Store) -> MemoryService:
    """A memory service in this process; `kind`: the class of its store."""
    checkpoint = load_checkpoint(run, with_weights=False)
    settings = MemorySettings(run=run, redis_url=url, resident_users=100, collective_users=1)
    return MemoryService(settings, kind(url, checkpoint.config.rules, 5), checkpoint)


async def remember(of: MemoryService, user: str, *events) -> None:
    plans = await of.plan(PlanRequest(of.model_version, NOW, [UserEvents(user, list(events))]))
    count = len(plans.users[0].accepted)
    vectors_of_user = vectors(user, count), vectors(user, 1)
    write = UserWrite(user, plans.users[0].version, list(events), *vectors_of_user, plans.users[0].token)
    await of.write(WriteRequest(of.model_version, NOW, [write]))


async def ask(of: MemoryService, *users: str) -> RetrieveReply:
    return await retrieved(of, RetrieveRequest(of.model_version, list(users)))


async def retrieved(of: MemoryService, request: RetrieveRequest) -> RetrieveReply:
    """What the service answers over HTTP."""
    return (await of.retrieve(Question.unpacked(request))).packed()
