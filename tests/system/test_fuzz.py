"""Damaged messages and files are refused with a reason and do no harm, whatever they contain. Seeded."""

import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx2
import jsonschema_rs
import msgspec
import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.protocol.structs import (
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
    UserRekey,
    Users,
    UserWrite,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import UserMemory
from model.checkpoint import (
    HEADER_FILE,
    ITEMS_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from model.memory.rules import unit
from model.serving.recommender import Recommender
from tests.conftest import served
from tests.mutations import damaged, damaged_json, damaged_msgpack, damaged_safetensors

NOW = 1_700_000_000.0
DIM = 16
MSGPACK = {"Content-Type": "application/msgpack"}
ROUNDS = 1500
LIES = 1200
CHECKPOINTS = 500
MEMORY_KB = 1_000_000
"""By how much the process may grow."""


@pytest.fixture
def memory(memory_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=memory_url, timeout=30))


def post(client: httpx2.Client, path: str, body: msgspec.Struct | bytes) -> httpx2.Response:
    content = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    return client.post(path, content=content, headers=MSGPACK)


def vectors(count: int) -> bytes:
    return unit(np.random.default_rng(count).normal(size=(count, DIM))).astype("<f4").tobytes()


def remember(client: httpx2.Client, model: str, user: str, events: list[EventIn]) -> None:
    plan = post(client, "/v1/plan", PlanRequest(model, NOW, [UserEvents(user, events)]))
    planned = msgspec.msgpack.decode(plan.content, type=PlanReply).users[0]
    write = UserWrite(user, planned.version, events, vectors(len(planned.accepted)), vectors(1))
    written = post(client, "/v1/write", WriteRequest(model, NOW, [write]))
    assert msgspec.msgpack.decode(written.content, type=WriteReply).users[0].accepted


def requests(model: str, user: str) -> dict[str, msgspec.Struct]:
    """A valid request for every call with a body."""
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
    rng = random.Random(path)
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
    """Checks that users can be retrieved and inspected, the catalogue can be listed, and all numbers are finite."""
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


# ------------------------------------------------------------------------ a memory service with damaged replies


class DamagingProxy:
    """An ASGI application between api and memory service that damages replies while `damaging`."""

    def __init__(self, url: str, seed: str) -> None:
        self.url, self.rng, self.damaging, self.damaged = url, random.Random(seed), False, 0
        self.client: httpx2.AsyncClient | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
            return
        request = Request(scope, receive)
        target = f"{self.url}{scope['path']}?{scope['query_string'].decode()}"
        assert self.client is not None
        answer = await self.client.request(scope["method"], target, content=await request.body(), headers=MSGPACK)
        status, content = answer.status_code, answer.content
        if self.damaging and content and not scope["path"].startswith("/health"):
            self.damaged += 1
            content = damaged_msgpack(self.rng, content)
            if self.rng.random() < 0.1:
                status = self.rng.choice([200, 201, 204, 404, 409, 418, 500, 503])
        if self.damaging and scope["path"].startswith("/health"):
            content = damaged(self.rng, content)
        await Response(b"" if status == 204 else content, status)(scope, receive, send)

    async def live(self, receive: Receive, send: Send) -> None:
        async with httpx2.AsyncClient(timeout=30) as self.client:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


BATCH = [{"user_id": "u0"}, {"user_id": "nobody"}, {"sequence": ["i4"]}]
TAKEN = [{"user_id": "u0", "item_id": "i7"}, {"user_id": "u9", "item_id": "i1"}]
CALLS = [
    ("POST", "/recommend", "/recommend", {"user_id": "u0", "explain": True}),
    ("POST", "/recommend", "/recommend", {"user_id": "u1", "sequence": ["i1", "i2"], "explain": True}),
    ("POST", "/recommend", "/recommend", {"sequence": ["i3"], "candidates": ["i1", "i9"]}),
    (
        "POST",
        "/recommend/batch",
        "/recommend/batch",
        {"requests": BATCH},
    ),
    (
        "POST",
        "/memories",
        "/memories",
        {"interactions": TAKEN},
    ),
    ("GET", "/users/u0/memory", "/users/{user_id}/memory", None),
    ("GET", "/users?prefix=u", "/users", None),
    ("PUT", "/items/i5", "/items/{item_id}", {"metadata": {"title": "Five", "year": 1979}}),
    ("PATCH", "/items/i6", "/items/{item_id}", {"hidden": False}),
    ("GET", "/items?query=i", "/items", None),
    ("GET", "/health/ready", "/health/ready", None),
    ("DELETE", "/users/u9/memory", "/users/{user_id}/memory", None),
]


def documented(document: dict, method: str, path: str, response: httpx2.Response) -> bool:
    """Whether the OpenAPI document describes the response, and it is not an internal error."""
    described = document["paths"][path][method.lower()]["responses"].get(str(response.status_code))
    if described is None or response.status_code == 500:
        return False
    schema = described["content"][response.headers["content-type"]]["schema"]
    return jsonschema_rs.is_valid(schema | {"components": document["components"]}, response.json())


def test_the_api_survives_damaged_replies_of_the_memory_service(memory_url, run, stack):
    proxy = DamagingProxy(memory_url, "liar")
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=stack.enter_context(served(proxy))))))
    client = stack.enter_context(httpx2.Client(base_url=url, timeout=30))
    events = [{"user_id": f"u{n % 3}", "item_id": f"i{n % 7 + 1}", "timestamp": n} for n in range(20)]
    assert client.post("/memories", json={"interactions": events}).status_code == 200
    proxy.damaging = True
    document, failed = client.get("/openapi.json").json(), []
    for n in range(LIES):
        method, path, template, body = CALLS[n % len(CALLS)]
        response = client.request(method, path, json=body)
        if not documented(document, method, template, response):
            failed.append((method, path, response.status_code, response.text))
    assert not failed, (len(failed), failed[:3])
    assert proxy.damaged > LIES // 2
    proxy.damaging = False
    answer = client.post("/recommend", json={"user_id": "u1", "explain": True}).json()
    assert (answer["source"], answer["memory"]["degraded"]) == ("memory", False)
    assert client.get("/health/ready").status_code == 200


# ------------------------------------------------------------------------------------------- checkpoint files


def memory_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loads(folder: Path) -> str:
    """Version of a checkpoint that both services load; "" if either refuses it. Other errors are raised."""
    try:
        light = load_checkpoint(folder, with_weights=False)
        assert Recommender.load(folder).version == light.version
    except CheckpointError:
        return ""
    return light.version


@pytest.mark.parametrize(
    ("name", "damage"),
    [(HEADER_FILE, damaged_json), (ITEMS_FILE, damaged_json), (WEIGHTS_FILE, damaged_safetensors)],
)
def test_damaged_checkpoints_are_refused(run, tmp_path, name, damage):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    good, version, rng = (run / name).read_bytes(), load_checkpoint(run).version, random.Random(name)
    before, refused = memory_kb(), 0
    for _ in range(CHECKPOINTS):
        content = damage(rng, good)
        (tmp_path / name).write_bytes(content)
        loaded = loads(tmp_path)
        assert loaded in ("", version), content[:1000]  # whatever loads has the contents of the undamaged checkpoint
        refused += not loaded
    assert refused > CHECKPOINTS // 3
    assert memory_kb() - before < MEMORY_KB


def shaped(rules: dict | None = None, **encoder: object) -> Callable[[Checkpoint], Checkpoint]:
    """Changes the shape in a checkpoint's config, and its tables to match."""

    def change(good: Checkpoint) -> Checkpoint:
        shape = good.config.encoder.model_copy(update=encoder)
        config = good.config.model_copy(
            update={"encoder": shape, "rules": good.config.rules.model_copy(update=rules or {})}
        )
        width = min(shape.width, 2**15)  # larger tables would not fit into memory
        tables = {name: np.zeros((rows, width), np.float32) for name, rows in (("key_span", 2), ("key_plane", 3))}
        return replace(good, config=config, **tables)

    return change


def filled(name: str, value: object) -> Callable[[Checkpoint], Checkpoint]:
    return lambda good: replace(good, **{name: value})


@pytest.mark.parametrize(
    "change",
    [
        shaped(dim=10**9),
        shaped(dim=16384),
        shaped(layers=10**9),
        shaped(layers=200),
        shaped(window=512),
        shaped(window=10**9),
        shaped(sketch=10**9),
        shaped(rules={"clusters": 10**9}),
        shaped(rules={"half_life_s": float("inf")}),
        filled("item_ids", tuple(f"i{n}" for n in range(29))),
        filled("item_ids", ("i1",) * 30),
        filled("item_ids", tuple(range(30))),
        filled("item_clusters", np.full(31, 10**6, np.int32)),
        filled("item_clusters", np.zeros(31, np.float32)),
        filled("popularity", np.full(31, np.nan, np.float32)),
        filled("weights", {}),
        filled("weights", {"encoder.item.weight": np.zeros((31, 16), "f4")}),
        filled("weights", {"encoder.item.weight": np.full((31, 16), np.nan, "f4")}),
    ],
)
def test_undamaged_checkpoints_with_impossible_contents_are_refused(run, tmp_path, change):
    """Their version matches their contents, as in a file made by hand."""
    before = memory_kb()
    save_checkpoint(tmp_path, change(load_checkpoint(run)))
    assert not loads(tmp_path)
    assert memory_kb() - before < MEMORY_KB


@pytest.mark.parametrize("about", ['{"i1": []}', '{"i1": {"x": NaN}}', '{"i1": {"x": 1e400}}', "[" * 10**6, "[]"])
def test_metadata_that_cannot_be_served_is_refused(run, tmp_path, about):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / ITEMS_FILE).write_text(about)
    assert not loads(tmp_path)
