"""What a write costs and when it is seen, and how long writes fail when a primary of Redis is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import numpy as np

from api.http.problems import MemoryUnavailable
from api.memory.client import MemoryClient
from api.memory.replicas import MemoryReplicas
from benchmarks.measures import Measure, measured, percentile
from benchmarks.memory import banks as made
from benchmarks.memory.replicas.deployments import (
    CALLERS,
    AsyncClients,
    Deployment,
    Extent,
    asking,
    deployed,
)
from benchmarks.memory.service import Replica, Writer, cpu_s, events
from memory_service.protocol.hash_slots import SLOTS, slot_of
from memory_service.protocol.question import Question
from memory_service.protocol.structs import EventIn, PlanRequest, UserEvents, UserWrite, WriteRequest
from model.checkpoint import Checkpoint
from model.memory.rules import unit
from tests.redis_cluster import redis_cluster

ITEMS_SEEN = 20
WRITES_A_S = (100, 1000)
"""Rates of writes. The last one is written in calls of WRITES_A_CALL users."""
WRITES_A_CALL = 10
NODE_TIMEOUT_MS = 2000


@dataclass(frozen=True)
class Written:
    """CPU seconds of a write: in the replica that writes, in each that listens, and in Valkey; writes a second."""

    writer_s: float
    listener_s: float
    redis_s: float
    rate: float


def listening(extent: Extent) -> list[Measure]:
    """CPU of a write in a replica that gets no requests."""
    found = []
    with deployed(2, extent.users) as one:
        for rate in WRITES_A_S:
            cost = asyncio.run(written(one, extent.users, rate, 3 * extent.seconds))
            name = f"a write, at {rate:,} a second"
            target = 60 if rate == WRITES_A_S[-1] else None
            found += [
                measured(f"{name}: reached", cost.rate, "writes/s"),
                measured(f"{name}: CPU of a replica that only listens", cost.listener_s * 1e6, "µs", at_most=target),
                measured(f"{name}: CPU of the replica that writes", cost.writer_s * 1e6, "µs"),
                measured(f"{name}: CPU of Valkey", cost.redis_s * 1e6, "µs"),
            ]
    return found


async def written(one: Deployment, users: int, rate: float, seconds: float) -> Written:
    """Costs of a write of a single event by the first replica, the others listening. What all of them spend when
    nothing is written is not counted.
    """
    writer, *listeners = one.replicas
    valkey_pid = one.redis_pid()

    def spent() -> np.ndarray:
        heard = sum(listener.cpu_s() for listener in listeners) / max(1, len(listeners))
        return np.array([writer.cpu_s(), heard, cpu_s(valkey_pid), time.perf_counter()])

    before = spent()
    await asyncio.sleep(seconds / 2)
    idle = spent() - before
    before = spent()
    begin = time.perf_counter()
    count = await _stream(one, writer, users, rate, seconds)
    wrote_s = time.perf_counter() - begin
    await asyncio.sleep(1.0)  # until all have heard
    busy = spent() - before
    costs = (busy[:3] - idle[:3] * busy[3] / idle[3]) / count
    return Written(*costs.tolist(), rate=count / wrote_s)


async def _stream(one: Deployment, writer: Replica, users: int, rate: float, seconds: float) -> int:
    """Write single events of random users, `rate` a second or as many as possible; returns how many succeeded."""
    rng, acknowledged = np.random.default_rng(3), 0
    at_once = WRITES_A_CALL if rate > WRITES_A_S[0] else 1
    since, begin = made.START + 1e7 + time.monotonic(), time.perf_counter()  # later than what was written before
    calls = iter(range(int(rate * seconds / at_once)))

    async def caller() -> None:
        nonlocal acknowledged
        for n in calls:
            if (now := time.perf_counter() - begin) > seconds:
                return
            await asyncio.sleep(max(0.0, n * at_once / rate - now))
            some = rng.choice(users, at_once, replace=False).tolist()
            done = await told.write([(made.user(user), events(1, since + n, rng)) for user in some])
            acknowledged += done  # not `+= await`: other callers add to it meanwhile

    async with aiohttp.ClientSession() as session:
        told = Writer(session, writer.url, one.of)
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return acknowledged


def seen(extent: Extent) -> list[Measure]:
    """Time from the acknowledgement of a write until another replica gives the entry to other users."""
    with deployed(2, extent.users) as one:
        times = asyncio.run(_seen(one))
    name = "an item that its second user took is given to others by another replica"
    return [
        measured(f"{name}: median of {ITEMS_SEEN}", percentile(times, 50) / 1e3, "s"),
        measured(f"{name}: slowest of {ITEMS_SEEN}", max(times), "s", at_most=1),
    ]


async def _seen(one: Deployment) -> list[float]:
    async with AsyncClients([replica.url for replica in one.replicas]) as (writer, other):
        return [await _until_seen(one.of, writer, other, n) for n in range(ITEMS_SEEN)]


async def _until_seen(of: Checkpoint, writer: MemoryClient, other: MemoryClient, n: int) -> float:
    """Three users take the same item. Two of them then take another one, which the third is given."""
    key = unit(np.random.default_rng(n).standard_normal(made.DIM)).astype(np.float32)
    for name in ("asks", "first", "second"):
        await take(writer, of, f"{name} {n}", f"old {n}", made.START, key)
    await take(writer, of, f"first {n}", f"new {n}", made.START + 1, key)
    await take(writer, of, f"second {n}", f"new {n}", made.START + 1, key)
    begin = time.perf_counter()
    while True:
        found = (await other.retrieve(Question(of.version, [f"asks {n}"]))).retrieved.collective
        if (found.valid[:, :2] & (found.similarity[:, :2] > 0.99)).sum() == 2:
            return time.perf_counter() - begin
        await asyncio.sleep(0.01)


async def take(
    client: MemoryClient | MemoryReplicas, of: Checkpoint, user: str, item: str, when: float, key: np.ndarray
) -> None:
    """Write one event, with `key` as its key and as the state after it."""
    taken = [EventIn(0, item, when)]
    plans = (await client.plan(PlanRequest(of.version, when, [UserEvents(user, taken)]))).users
    for _ in range(3):
        one, vector = plans[0], key.astype("<f4").tobytes()
        write = UserWrite(user, one.version, taken, vector * len(one.accepted), vector, one.token)
        told = (await client.write(WriteRequest(of.version, when, [write]))).users[0]
        if told.retry is None:
            return
        plans = [told.retry]
    raise MemoryUnavailable("written by others again and again")


def primary(extent: Extent) -> list[Measure]:
    """Time without an acknowledged write when a primary of a Redis Cluster is killed (three, with a replica each)."""
    with TemporaryDirectory() as name, ExitStack() as stack:
        of = made.checkpoint(Path(name) / "run")
        cluster = stack.enter_context(redis_cluster(Path(name) / "redis", node_timeout_ms=NODE_TIMEOUT_MS))
        one = Deployment(of, Path(name) / "run", cluster.url, [])
        for _ in range(2):
            one.add(stack)
        one.settle()
        some = [made.user(n) for n in range(1000)]
        theirs = next(user for user in some if slot_of(user) < SLOTS // 4)
        others = next(user for user in some if slot_of(user) > 3 * SLOTS // 4)
        victim = cluster.primary_of_slot(slot_of(theirs))
        gaps = asyncio.run(_gaps(one, (theirs, others), partial(cluster.kill, victim)))
    about = f"a primary is killed (node timeout {NODE_TIMEOUT_MS / 1e3:g} s): longest time without acknowledged write"
    return [
        measured(f"{about}, users of its slots", gaps[0], "s", at_most=15),
        measured(f"{about}, users of other slots", gaps[1], "s", at_most=1),
    ]


async def _gaps(one: Deployment, users: Sequence[str], fail: Callable[[], object]) -> list[float]:
    """The longest time between acknowledged writes of each user, around a failure."""
    key = unit(np.random.default_rng(0).standard_normal(made.DIM)).astype(np.float32)
    over = asyncio.Event()

    async def writing(user: str) -> float:
        last, longest, n = time.perf_counter(), 0.0, 0
        while not over.is_set():
            n += 1
            try:
                await take(client, one.of, user, f"i{n % 50 + 1}", made.START + n, key)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            except MemoryUnavailable:
                await asyncio.sleep(0.05)
        return max(longest, time.perf_counter() - last)

    async with asking(one.urls, 5.0) as client:
        tasks = [asyncio.create_task(writing(user)) for user in users]
        await asyncio.sleep(1)
        await asyncio.to_thread(fail)
        await asyncio.sleep(3 * NODE_TIMEOUT_MS / 1e3 + 4)
        over.set()
        return list(await asyncio.gather(*tasks))
