"""The memory service where calls overlap, Redis refuses, or a server was left behind: real FAISS and Valkey."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress

import msgspec
import numpy as np
import pytest
import redis
from starlette.testclient import TestClient

from memory_service.protocol.answer import Answer
from memory_service.protocol.replies import check_inspected
from memory_service.protocol.structs import (
    CatalogueReply,
    PlanRequest,
    Problem,
    RetrieveRequest,
    UserEvents,
    UserWrite,
    WriteRequest,
)
from memory_service.store.embedded import EmbeddedError, embedded_valkey
from memory_service.store.redis.errors import StoreUnavailable
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint
from model.memory.habits import FEATURES
from tests.memory_service.calling import NOW, Caller, ask, column, opened, remember, service, took, vectors
from tests.system.test_imports import ROOT


class GatedStore(Store):
    """Its next look that loads waits at `gate` with its answer in hand; one after that waits for the task `hold`."""

    gate: asyncio.Event | None = None
    hold: asyncio.Task | None = None
    reached: asyncio.Event
    opened: asyncio.Event

    async def look(self, check, load=(), tombstones=(), **more):
        found = await super().look(check, load, tombstones, **more)
        if load and self.gate is not None:
            gate, self.gate = self.gate, None
            self.reached.set()
            await gate.wait()
        elif load and self.hold not in (None, asyncio.current_task()):
            self.opened.set()
            await self.hold
        return found


class WithoutCatalogue(Store):
    """A store that loses Redis between records and catalogue."""

    lost = False

    async def catalogue_state(self):
        if self.lost:
            raise StoreUnavailable("gone")
        return await super().catalogue_state()


@pytest.fixture
def pair(run, valkey_url, go):
    """Two services over one Redis; the second's store is a GatedStore."""
    both = service(run, valkey_url), service(run, valkey_url, GatedStore)
    for one in both:
        go(one.start())
    yield both
    for one in both:
        go(one.store.close())


# --------------------------------------------------------------------------------------------- overlap


def test_items_registered_at_the_same_time_keep_their_numbers(run, valkey_url, go):
    one = service(run, valkey_url)
    go(one.start())
    names = [f"new-{n}" for n in range(8)]

    async def together():
        users = [UserEvents(name, [took(0, name)]) for name in names]
        await asyncio.gather(*(one.plan(PlanRequest(one.model_version, NOW, [user])) for user in users))
        return await one.catalogue.numbers(names), (await one.store.catalogue(1))[1]

    numbers, items = go(together())
    assert numbers == {item.item_id: n for n, item in enumerate(items, start=1) if item.item_id in numbers}
    assert (one.catalogue.size, len(one.serving.clusters)) == (len(items), len(items) + 1)
    go(one.store.close())


def test_a_slow_retrieval_does_not_take_an_acknowledged_write_from_a_later_one(pair, go):
    """The slow call installs version 1 again after the later call found version 2 current."""
    other, here = pair

    async def overlapping():
        await remember(other, "u", took(0, "i1"))
        here.store.reached, here.store.opened = asyncio.Event(), asyncio.Event()
        gate = here.store.gate = asyncio.Event()
        slow = asyncio.create_task(ask(here, "u"))
        await here.store.reached.wait()  # it holds version 1
        await remember(here, "u", took(1, "i2"))  # version 2 is acknowledged
        await remember(other, "v", took(2, "i3"))  # so that the later call has something to load
        here.store.hold = slow
        later = asyncio.create_task(ask(here, "u", "v"))
        await here.store.opened.wait()
        gate.set()
        return await later

    assert column(go(overlapping()).versions, "<i8") == [2, 1]


def test_a_user_forgotten_while_loading_is_not_answered_from_the_cache(pair, go):
    other, here = pair

    async def overlapping():
        await remember(here, "u", took(0, "i1"))
        await remember(other, "u", took(1, "i2"))  # `here` holds version 1 now
        look = here.store.look

        async def then_forgotten(*asked, **more):
            found = await look(*asked, **more)
            await other.forget("u")
            return found

        here.store.look = then_forgotten
        return await ask(here, "u")

    assert column(go(overlapping()).known, "u1") == [0]


# --------------------------------------------------------------------------------------------- refusals


def test_items_of_another_process_while_the_catalogue_is_out_of_reach(run, valkey_url, go):
    other, here = service(run, valkey_url), service(run, valkey_url, WithoutCatalogue)

    async def lost_and_found():
        await other.start()
        await here.start()
        await remember(other, "u", took(0, "unheard-of"))
        here.store.lost = True
        degraded = await ask(here, "u")
        here.store.lost = False
        return degraded, await ask(here, "u")

    degraded, after = go(lost_and_found())
    assert (degraded.degraded, column(degraded.known, "u1")) == (True, [0])
    assert (after.degraded, column(after.own.item, "<u4")) == (False, [31])
    for one in (other, here):
        go(one.store.close())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"\x82\xadmodel_version\xa2\xff\xfe\xa5users\x90", 400, "invalid_body"),
        (RetrieveRequest("", ["u"], query_rows=b"abc"), 422, "invalid_columns"),
    ],
)
def test_bytes_that_are_no_text_and_columns_cut_short(run, valkey_url, stack, body, status, code):
    client = stack.enter_context(opened(run, valkey_url))
    if isinstance(body, msgspec.Struct):
        body = msgspec.msgpack.encode(msgspec.structs.replace(body, model_version=load_checkpoint(run).version))
    response = client.post("/v1/retrieve", content=body)
    assert (response.status_code, msgspec.msgpack.decode(response.content, type=Problem).code) == (status, code)


def test_a_query_without_its_parameter_is_a_problem_too(run, valkey_url, stack):
    response = stack.enter_context(opened(run, valkey_url)).get("/v1/user")
    assert response.status_code == 422
    assert msgspec.msgpack.decode(response.content, type=Problem).code == "invalid_query"


def test_unknown_paths_and_methods_are_problems_too(run, valkey_url, stack):
    client = stack.enter_context(opened(run, valkey_url))
    for response, code in [(client.get("/v2/retrieve"), "http_404"), (client.put("/v1/user"), "http_405")]:
        assert msgspec.msgpack.decode(response.content, type=Problem).code == code
    assert response.headers["Allow"] == "GET, DELETE"


def test_a_catalogue_number_beyond_all_is_beyond_the_end(run, valkey_url, stack):
    response = stack.enter_context(opened(run, valkey_url)).get("/v1/catalogue", params={"since": 10**30})
    assert response.status_code == 200
    assert msgspec.msgpack.decode(response.content, type=CatalogueReply).items == []


def test_a_redis_out_of_memory_refuses_writes_with_503(run, valkey_url, stack):
    client: TestClient = stack.enter_context(opened(run, valkey_url))
    version = load_checkpoint(run).version
    Caller(client, version).plan(UserEvents("u", [took(0, "i1")]))
    write = UserWrite("u", 0, [took(0, "i1")], vectors("u", 1), vectors("u", 1))
    with redis.Redis.from_url(valkey_url) as raw:
        raw.config_set("maxmemory", 1)
        try:
            response = client.post("/v1/write", content=msgspec.msgpack.encode(WriteRequest(version, NOW, [write])))
        finally:
            raw.config_set("maxmemory", 0)
    assert response.status_code == 503
    assert response.headers["Retry-After"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"habits": bytes(4)}, "habits"),
        ({"habits": bytes(4 * 3 * len(FEATURES))}, "habits"),
        ({"habits": b"\xff" * (4 * 2 * len(FEATURES))}, "habits"),
        ({"habits": np.full(2 * len(FEATURES), 1e30, "<f4").tobytes()}, "habits"),
        ({"present_count": bytes(4)}, "present"),
        ({"present": b"\1\0\0\0\2\0\0\0"}, "present"),
        ({"present_count": np.array([2, 0], "<i4").tobytes(), "present": b"\1\0\0\0"}, "present"),
        ({"present_count": np.array([2, -1], "<i4").tobytes(), "present": b"\1\0\0\0"}, "present"),
        ({"present_count": np.array([1, 0], "<i4").tobytes(), "present": b"\xff\0\0\0"}, "items"),
        ({"present_count": np.array([1, 0], "<i4").tobytes(), "present": bytes(4)}, "items"),
        ({"present_count": np.array([1, 0], "<i4").tobytes(), "present": b"\1\0"}, "present"),
    ],
)
def test_a_reply_whose_habits_cannot_be_is_doubted(run, valkey_url, stack, change, what):
    caller = Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)
    caller.remember("u", took(0, "i1"), took(1, "i2"))
    users = ["u", "nobody"]
    reply = caller.retrieve(*users)
    Answer.unpacked(reply, users)
    told = {
        "habits": np.arange(2 * len(FEATURES), dtype="<f4").tobytes(),
        "present_count": np.array([0, 1], "<i4").tobytes(),
        "present": b"\2\0\0\0",
    }
    fine = msgspec.structs.replace(reply, **told)
    found = Answer.unpacked(fine, users).retrieved
    assert found.habits.shape == (2, 2, len(FEATURES))
    assert found.habits[0].ravel().tolist() == list(range(2 * len(FEATURES)))
    assert not found.habits[1].any()
    assert found.present.tolist() == [[0], [2]]
    with pytest.raises(ValueError, match=what):
        Answer.unpacked(msgspec.structs.replace(fine, **change), users)


def test_an_entry_laid_open_whose_numbers_cannot_be_is_doubted(run, valkey_url, stack):
    caller = Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)
    caller.remember("u", took(0, "i1"))
    about = caller.inspect("u")
    check_inspected(about, "u")
    for name in ("first_time", "mean_gap_s", "usual_hour", "usual_day"):
        entry = msgspec.structs.replace(about.entries[0], **{name: float("nan")})
        with pytest.raises(ValueError, match="numbers"):
            check_inspected(msgspec.structs.replace(about, entries=[entry]), "u")


# --------------------------------------------------------------------------------------- embedded Valkey

OWNER = """
import sys
from pathlib import Path
from memory_service.store.embedded import embedded_valkey
with embedded_valkey(Path(sys.argv[1]), "always") as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def owner(folder) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWNER, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


@pytest.mark.parametrize("name", ["data", "long-" * 20])
def test_a_server_left_behind_by_a_killed_owner_is_ended_and_its_data_kept(tmp_path, stack, name):
    folder = tmp_path / name
    killed = stack.enter_context(owner(folder))
    with redis.Redis.from_url(killed.stdout.readline().strip()) as client:
        client.set("a", 1)
        left_behind = client.info("server")["process_id"]
    killed.kill()
    killed.wait(20)
    with embedded_valkey(folder, "always") as url, redis.Redis.from_url(url) as client:
        ended = gone(left_behind)
        if not ended:
            os.kill(left_behind, signal.SIGTERM)
        assert ended
        assert client.get("a") == b"1"
        with pytest.raises(EmbeddedError, match="in use"), embedded_valkey(folder, "always"):
            pass


def test_a_folder_that_cannot_be_used_is_one_clear_line(tmp_path):
    (tmp_path / "ramrec.lock").mkdir()
    with pytest.raises(EmbeddedError, match="cannot write in the data folder"), embedded_valkey(tmp_path, "always"):
        pass
