"""Damaged messages and files: refused with a reason, whatever they hold, and nothing else suffers. Seeded."""

import os
import random
import resource

import httpx2
import msgspec
import numpy as np
import pytest

from memory_service.schemas import (
    CatalogueReply,
    EventIn,
    Item,
    PlanReply,
    PlanRequest,
    Problem,
    RegisterRequest,
    RekeyRequest,
    RetrieveReply,
    RetrieveRequest,
    UserEvents,
    UserMemory,
    UserRekey,
    Users,
    UserWrite,
    WriteReply,
    WriteRequest,
)
from model.checkpoint import load_checkpoint
from model.rules import unit
from tests.mutations import damaged_msgpack

NOW = 1_700_000_000.0
DIM = 16
ROUNDS = 1500
MEMORY_KB = 1_000_000
"""Growth of the process that no refusal may cost."""


@pytest.fixture
def memory(memory_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=memory_url, timeout=30))


def post(client: httpx2.Client, path: str, body: msgspec.Struct | bytes) -> httpx2.Response:
    content = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    return client.post(path, content=content, headers={"Content-Type": "application/msgpack"})


def vectors(count: int) -> bytes:
    return unit(np.random.default_rng(count).normal(size=(count, DIM))).astype("<f4").tobytes()


def remember(client: httpx2.Client, model: str, user: str, events: list[EventIn]) -> None:
    plan = post(client, "/v1/plan", PlanRequest(model, NOW, [UserEvents(user, events)]))
    planned = msgspec.msgpack.decode(plan.content, type=PlanReply).users[0]
    write = UserWrite(user, planned.version, events, vectors(len(planned.accepted)), vectors(1))
    written = post(client, "/v1/write", WriteRequest(model, NOW, [write]))
    assert msgspec.msgpack.decode(written.content, type=WriteReply).users[0].accepted


def requests(model: str, user: str) -> dict[str, msgspec.Struct]:
    """A good request of every call that has a body."""
    events = [EventIn(n, f"i{n + 1}", NOW + 50 + n, 5.0, f"e{n}") for n in range(3)]
    return {
        "/v1/retrieve": RetrieveRequest(
            model,
            ["u0", "u1", "", "stranger"],
            np.array([2, 3], "<u4").tobytes(),
            vectors(2),
            np.array([0, 3, 0, 5], "<i4").tobytes(),
            {0: [1, 2], 1: []},
            [0],
            [1],
            np.full(4, 0.5, "<f4").tobytes(),
        ),
        "/v1/plan": PlanRequest(model, NOW, [UserEvents("u0", events), UserEvents(user, events)]),
        "/v1/write": WriteRequest(model, NOW, [UserWrite(user, 0, events, vectors(3), vectors(1))]),
        "/v1/rekey": RekeyRequest(model, [UserRekey("u0", 1, vectors(4), vectors(1))]),
        "/v1/catalogue": RegisterRequest([Item("i1", {"title": "One", "year": 1979}), Item("new")], True),
    }


@pytest.mark.parametrize("path", ["/v1/retrieve", "/v1/plan", "/v1/write", "/v1/rekey", "/v1/catalogue"])
def test_the_memory_service_survives_damaged_requests(memory, run, path):
    model = load_checkpoint(run, with_weights=False).version
    for n in range(3):
        remember(memory, model, f"u{n}", [EventIn(i, f"i{i + n + 1}", NOW + i) for i in range(4)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, failed = 0, []
    rng = random.Random(path + os.environ.get("SEED", ""))
    for n in range(ROUNDS):
        body = damaged_msgpack(rng, msgspec.msgpack.encode(requests(model, f"new-{n}")[path]))
        response = post(memory, path, body)
        if response.status_code not in (200, 400, 409, 422):
            failed.append(body)
            continue
        if response.status_code != 200:
            assert msgspec.msgpack.decode(response.content, type=Problem).detail
            refused += 1
    assert not failed, (len(failed), failed[:3])
    assert refused > ROUNDS // 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KB
    assert_sound(memory, model)


def assert_sound(memory: httpx2.Client, model: str) -> None:
    """Everybody can be asked about and looked at, and the catalogue be listed; all numbers are numbers."""
    users = msgspec.msgpack.decode(memory.get("/v1/users", params={"limit": 1000}).content, type=Users).users
    reply = post(memory, "/v1/retrieve", RetrieveRequest(model, ["u1", *users]))
    answer = msgspec.msgpack.decode(reply.content, type=RetrieveReply)
    assert (answer.known, answer.degraded) == (b"\1" * (len(users) + 1), False)
    for column in (answer.states, answer.entropy, answer.own.similarity, answer.own.quality, answer.own.recency):
        assert np.isfinite(np.frombuffer(column, "<f4")).all()
    for user in users:
        found = memory.get("/v1/user", params={"user_id": user})
        bank = msgspec.msgpack.decode(found.content, type=UserMemory)
        numbers = [[e.quality, e.recency, e.time, e.last_access, e.rating or 0] for e in bank.entries]
        assert np.isfinite(numbers).all(), bank
        assert np.isfinite([when for _, when in bank.log]).all(), bank
    listing = memory.get("/v1/catalogue")
    assert listing.status_code == 200, listing.content
    assert msgspec.msgpack.decode(listing.content, type=CatalogueReply).items
