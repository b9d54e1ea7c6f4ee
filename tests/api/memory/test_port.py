"""The implementations of the memory port: the same calls give the same answers through each."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from api.http.problems import ApiProblem
from api.memory.client import MemoryClient
from api.memory.in_process import InProcessMemory
from api.memory.port import Memory
from api.memory.replicas import MemoryReplicas
from memory_service.http.app import create_app
from memory_service.protocol.hash_slots import ALL_SLOTS, SLOTS
from memory_service.protocol.question import Question
from memory_service.protocol.structs import (
    EventIn,
    Item,
    ModelRequest,
    PlanRequest,
    QuotaRequest,
    RegisterRequest,
    RekeyRequest,
    UserEvents,
    UserPlan,
    UserWrite,
    WriteRequest,
)
from memory_service.protocol.vectors import Vectors
from memory_service.settings import MemorySettings
from model.checkpoint import load_checkpoint, save_checkpoint
from model.memory.collective.layout import LAST
from model.memory.rules import unit
from tests.conftest import served
from tests.replicas import Replicas
from tests.synthetic import habitual_config, random_checkpoint

NOW = 1_700_000_000.0
USERS = [f"user {n}" for n in range(6)]
EVENTS = 4
DIM = 16
Opened = AbstractAsyncContextManager[Memory]


def settings(run: Path, redis_url: str) -> MemorySettings:
    return MemorySettings(run=run, redis_url=redis_url, collective_users=1)


@asynccontextmanager
async def over_http(run: Path, redis_url: str) -> AsyncIterator[Memory]:
    with served(create_app(settings(run, redis_url))) as url:
        memory = MemoryClient(url, 30)
        try:
            yield memory
        finally:
            await memory.close()


@asynccontextmanager
async def over_replicas(run: Path, redis_url: str) -> AsyncIterator[Memory]:
    """Two replicas, of which only one is named."""
    with ExitStack() as stack:
        replicas = Replicas(run, redis_url, stack)
        first, _ = replicas.add(), replicas.add()
        replicas.settle()
        memory = MemoryReplicas(first, 30)
        try:
            yield memory
        finally:
            await memory.close()


@asynccontextmanager
async def in_process(run: Path, redis_url: str) -> AsyncIterator[Memory]:
    service = create_app(settings(run, redis_url)).state.service
    await service.start()
    memory = InProcessMemory(service)
    try:
        yield memory
    finally:
        await memory.close()


KINDS: dict[type, Callable[[Path, str], Opened]] = {
    MemoryClient: over_http,
    MemoryReplicas: over_replicas,
    InProcessMemory: in_process,
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_implementation_has_the_calls_of_the_port(kind):
    for name, call in inspect.getmembers(Memory, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(kind, name)) == inspect.signature(call), name


def test_all_implementations_give_the_same_answers(valkey_url, tmp_path, go):
    runs = tmp_path / "run", tmp_path / "other"
    save_checkpoint(runs[0], random_checkpoint(habitual_config()))
    save_checkpoint(runs[1], random_checkpoint(habitual_config(), seed=1))

    async def told(n: int, opened: Callable[[Path, str], Opened]) -> dict[str, Any]:
        async with opened(runs[0], f"{valkey_url}?db={n}") as memory:
            return await story(memory, *runs)

    wanted, *others = (go(told(n, opened)) for n, opened in enumerate(KINDS.values()))
    for other, kind in zip(others, [*KINDS][1:], strict=True):
        assert wanted.keys() == other.keys()
        for name in wanted:
            assert wanted[name] == other[name], (kind, name)


async def story(memory: Memory, run: Path, other: Path) -> dict[str, Any]:
    """Calls of every kind, by name, with what came of them."""
    version, told = load_checkpoint(run).version, {}
    told["ready"] = await memory.ready()
    told["catalogue"] = await memory.catalogue(1, 0)
    told |= {f"write {user}": await write(memory, version, user) for user in USERS}
    outdated = UserWrite(USERS[0], 0, events(1, NOW + 9), vectors(USERS[0], 1), vectors(USERS[0], 1))
    told["conflict"] = await memory.write(WriteRequest(version, NOW, [outdated]))
    told["duplicates"] = await memory.plan(PlanRequest(version, NOW, [UserEvents(user, events()) for user in USERS]))
    await all_shared(memory, version)
    told |= {name: await memory.retrieve(question) for name, question in questions(version).items()}
    told["inspect"] = [await memory.inspect(user) for user in (*USERS, "nobody")]
    told["users"] = [await memory.users(prefix, 10) for prefix in ("user", "user 3", "x")]
    told["walk"] = [sorted(await walked(memory, slots)) for slots in (ALL_SLOTS, range(SLOTS // 2), range(0))]
    told["quota"] = [await memory.quota(QuotaRequest("0" * 32, int(NOW), 5, 3)) for _ in range(3)]
    told["forget"] = [(await memory.forget(user)).existed for user in (USERS[5], USERS[5], "nobody")]
    told["forgotten"] = await memory.retrieve(about(version, USERS, alone=np.ones(len(USERS), bool)))
    told["refused"] = await refusals(memory, version)
    told |= await moved(memory, version, other)
    told["register"] = await memory.register(RegisterRequest([Item("new", {"title": "New"}), Item("i1", hidden=True)]))
    told["changed"] = await memory.catalogue(30, told["catalogue"].revision)
    return dict(leaves(told))


def events(count: int = EVENTS, start: float = NOW) -> list[EventIn]:
    return [EventIn(n, f"i{n + 2}", start + 60 * n, rating=float(n), event_id=f"{start + n}") for n in range(count)]


def vectors(name: str, count: int) -> bytes:
    return drawn(name, count).tobytes()


def drawn(name: str, count: int) -> np.ndarray:
    return unit(np.random.default_rng([*name.encode()]).normal(size=(count, DIM))).astype("<f4")


async def write(memory: Memory, version: str, user: str) -> Any:
    plan: UserPlan = (await memory.plan(PlanRequest(version, NOW, [UserEvents(user, events())]))).users[0]
    made = Vectors(drawn(user, len(plan.accepted)), drawn(user, 1)[0])
    return plan, await memory.write(WriteRequest(version, NOW, [made.write_of(plan, events())]))


async def all_shared(memory: Memory, version: str) -> None:
    """Wait until whichever replica is asked finds the memories of all users."""
    query = {"query_rows": np.array([0]), "queries": drawn("query", 1), "last": np.array([[2, 3, 4, 5, 0]], np.uint32)}
    for user in ("", *USERS):
        while True:
            found = (await memory.retrieve(about(version, [user], **query))).retrieved
            shared = (EVENTS - 1) * (len(USERS) - bool(user))  # a user's first entry is not shared
            if found.collective.valid.sum() == min(found.collective_k[0], shared):
                break
            await asyncio.sleep(0.02)


def about(version: str, users: list[str], **more: Any) -> Question:
    """A question whose retrieval does not count as an access, so that it changes nothing."""
    return Question(version, users, uncounted=np.ones(len(users), bool), **more)


def questions(version: str) -> dict[str, Question]:
    """Retrievals of every kind."""
    query = {"query_rows": np.array([1, 4]), "queries": drawn("query", 2)}
    return {
        "as recorded": about(version, USERS),
        "with queries": about(version, USERS, **query),
        "with queries of items": about(version, USERS, **query, last=np.full((2, LAST), 3, np.uint32)),
        "k": about(version, USERS, k=np.arange(len(USERS))),
        "ignored": about(version, USERS, ignored={0: [2, 3], 1: [30], 2: [2, 3, 4, 5], 3: []}),
        "alone": about(version, USERS, alone=np.arange(len(USERS)) % 2 == 0),
        "at a time": about(version, USERS, now=np.full(len(USERS), NOW + 60)),
        "nobody": about(version, ["", "nobody"], entropy=np.array([0.2, 0.9], np.float32)),
    }


async def walked(memory: Memory, slots: range) -> set[str]:
    found, cursor = set(), 0
    while True:
        page = await memory.walk(cursor, 2, slots)
        found, cursor = found.union(page.users), page.cursor
        if not cursor:
            return found


async def refusals(memory: Memory, version: str) -> list[str]:
    """Names of the errors that impossible calls raise."""
    calls = [
        lambda: memory.retrieve(Question("unknown", ["u"])),
        lambda: memory.retrieve(Question(version, [])),
        lambda: memory.retrieve(Question(version, ["u"], query_rows=np.array([1]), queries=drawn("u", 1))),
        lambda: memory.retrieve(Question(version, ["u"], query_rows=np.array([0]), queries=np.ones((1, 3)))),
        lambda: memory.retrieve(Question(version, ["u"], k=np.array([1, 2]))),
        lambda: memory.plan(PlanRequest("unknown", NOW, [])),
        lambda: memory.plan(PlanRequest(version, NOW, [UserEvents("u", [EventIn(0, "i1", 1e300)])])),
        lambda: memory.write(WriteRequest(version, NOW, [UserWrite("u", 0, events(1), b"", vectors("u", 1))])),
        lambda: memory.stale("unknown", 0, 10),
        lambda: memory.change_model(ModelRequest("unknown", "/no/such/folder")),
        lambda: memory.change_model(ModelRequest("unknown", cut_over=True)),
    ]
    names = []
    for call in calls:
        with pytest.raises(ApiProblem) as raised:
            await call()
        names.append(type(raised.value).__name__)
    return names


async def moved(memory: Memory, version: str, other: Path) -> dict[str, Any]:
    """All users moved to another model, which then serves."""
    wanted = load_checkpoint(other).version
    told: dict[str, Any] = {"model": models(await memory.model())}
    told["wanted"] = models(await memory.change_model(ModelRequest(wanted, str(other))))
    page = await memory.stale(wanted, 0, 100)
    told["stale"] = sorted(page.users, key=lambda user: user.user_id)
    rekeyed = [Vectors(drawn(user.user_id, EVENTS), drawn("", 1)[0]).rekey_of(user) for user in page.users]
    told["rekeyed"] = sorted((await memory.rekey(RekeyRequest(wanted, rekeyed))).rekeyed)
    told["moved"] = await memory.retrieve(about(version, USERS, alone=np.ones(len(USERS), bool)))
    told["serving"] = models(await memory.change_model(ModelRequest(wanted, cut_over=True)))
    told["after"] = await memory.retrieve(about(wanted, USERS, alone=np.ones(len(USERS), bool)))
    return told


def models(reply: Any) -> tuple[str, ...]:
    return reply.serving, reply.wanted, reply.serving_run, reply.wanted_run, reply.trouble


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What `==` compares, by the path to it: numbers, texts, bytes and arrays as lists. Tokens of plans are random."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name) for name in value.__struct_fields__ if name != "token"}
    elif isinstance(value, list | tuple):
        value = {"length": len(value), **dict(enumerate(value))}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value.tolist() if isinstance(value, np.ndarray) else value
