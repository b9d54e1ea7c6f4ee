"""A group of memory replicas over a Redis Cluster: what merging costs, and how long failures last. Real processes.

    python -m benchmarks.memory.group

Three primaries with a replica each (cluster-node-timeout 2 s, as docker-compose sets it), memory replicas on the same
machine, so they share its cores: the figures say what the protocol costs and how long it takes to recover, not how
throughput grows. Results: benchmarks/memory/group.json.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

from api.memory.group import MemoryGroup
from api.problems import MemoryUnavailable
from benchmarks.measures import Measure, measured, percentile, store
from benchmarks.memory import banks as made
from benchmarks.memory.service import until_ready
from benchmarks.ports import free_port
from memory_service.group import GRACE_S
from memory_service.schemas import EventIn, PlanRequest, RetrieveRequest, UserEvents, UserWrite, WriteRequest
from memory_service.slots import RANGES, SLOTS, range_of, read
from model.checkpoint import Checkpoint
from model.rules import unit
from tests.groups import described
from tests.redis_cluster import ClusterOfValkeys, redis_cluster, until

USERS, CALLS, BATCH = 4_000, 400, 64
NODE_TIMEOUT_MS = 2000
RESULTS = Path(__file__).parent / "group.json"


class Fleet:
    """Memory replicas as processes."""

    def __init__(self, run: Path, redis_url: str) -> None:
        self._run, self._redis_url = run, redis_url
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self) -> str:
        """Start a replica; returns its URL once it is ready."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "memory_service", "--run", str(self._run), "--redis-url", self._redis_url]
        setting = {"RAMREC_MEMORY_ADVERTISE": url, "RAMREC_MEMORY_RECALL_S": "0", "OMP_NUM_THREADS": "1"}
        self.processes[url] = subprocess.Popen([*command, "--port", str(port)], env=os.environ | setting)
        asyncio.run(until_ready(url))
        return url

    def end(self, url: str, how: signal.Signals) -> float:
        """Signal a replica; seconds until it was gone."""
        begin = time.perf_counter()
        self.processes[url].send_signal(how)
        self.processes[url].wait(60)
        return time.perf_counter() - begin

    def settled(self, *urls: str) -> bool:
        """Whether these share all ranges, none of which changes hands."""
        tables = [read(described(url).table) for url in urls]
        return all(sorted(t.members) == sorted(urls) and not t.contested().any() for t in tables)


@contextmanager
def fleet(run: Path, redis_url: str) -> Iterator[Fleet]:
    started = Fleet(run, redis_url)
    try:
        yield started
    finally:
        for process in started.processes.values():
            process.kill()
            process.wait(60)


def measure() -> list[Measure]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        of = made.checkpoint(folder / "run")
        cluster = stack.enter_context(redis_cluster(folder / "redis", node_timeout_ms=NODE_TIMEOUT_MS))
        asyncio.run(made.fill(cluster.url, of, range(USERS)))
        started = stack.enter_context(fleet(folder / "run", cluster.url))
        urls = [started.add()]
        found = retrieval(of, urls)
        for _ in range(2):
            begin = time.perf_counter()
            urls.append(started.add())
            until(lambda: started.settled(*urls))
            moved = USERS // len(urls)
            name = f"replica {len(urls)} joins, {moved:,} of {USERS:,} users change hands: until it owns them"
            found.append(measured(name, time.perf_counter() - begin, "s"))
            time.sleep(GRACE_S + 1)  # until the former owners have let go
            found += retrieval(of, urls, found[:4])
        found.append(elsewhere(of, urls))
        found += failures(of, cluster, started, urls)
        return found


def retrieval(of: Checkpoint, urls: list[str], alone: list[Measure] | None = None) -> list[Measure]:
    """What the api waits for, both scopes, one call after another."""
    found = []
    for batch in (1, BATCH):
        times = asyncio.run(_asked(of, urls, batch))
        for n, q in enumerate((50, 99)):
            name = f"retrieval, batch {batch}, both scopes, {len(urls)} replica{'s'[: len(urls) > 1]}: p{q}"
            base = alone[(2 if batch > 1 else 0) + n].value if alone else None
            found.append(
                measured(name, percentile(times, q), "ms", reference="one replica" if base else "", limit=base)
            )
    return found


async def _asked(of: Checkpoint, urls: list[str], batch: int) -> list[float]:
    rng, times = np.random.default_rng(0), []
    client = MemoryGroup(",".join(urls), 30)
    for n in range(CALLS + 50):
        names = [made.user(one) for one in rng.integers(0, USERS, batch)]
        begin = time.perf_counter()
        reply = await client.retrieve(RetrieveRequest(of.version, names))
        if reply.degraded or not reply.known.all():
            raise RuntimeError("an answer was incomplete")
        if n >= 50:
            times.append(time.perf_counter() - begin)
    await client.close()
    return times


# ------------------------------------------------------------------------------------------------ writes


async def take(client: MemoryGroup, of: Checkpoint, user: str, item: str, when: float, key: np.ndarray) -> None:
    """Write one event whose key is given."""
    events = [UserEvents(user, [EventIn(0, item, when)])]
    plans = (await client.plan(PlanRequest(of.version, when, events))).users
    for _ in range(3):
        one, count = plans[0], len(plans[0].accepted)
        vectors = np.tile(key, (count, 1)).astype("<f4").tobytes()
        write = UserWrite(user, one.version, events[0].events, vectors, key.astype("<f4").tobytes())
        told = (await client.write(WriteRequest(of.version, when, [write]))).users[0]
        if told.retry is None:
            return
        plans = [told.retry]
    raise MemoryUnavailable("written by others again and again")


def elsewhere(of: Checkpoint, urls: list[str]) -> Measure:
    """From when somebody took something, acknowledged, until those whom other replicas answer are told of it."""

    async def one(client: MemoryGroup, n: int) -> float:
        key = unit(np.random.default_rng(n).standard_normal(of.config.encoder.width)).astype(np.float32)
        for user in (f"first {n}", f"second {n}"):  # two must hold an item before it is given away
            await take(client, of, user, "i1", made.START, np.roll(key, 1))
            await take(client, of, user, f"new {n}", made.START + 1, key)
        begin = time.perf_counter()
        asking = RetrieveRequest(
            of.version,
            [made.user(m) for m in range(12)],
            query_rows=np.arange(12, dtype="<u4").tobytes(),
            queries=np.tile(key, (12, 1)).astype("<f4").tobytes(),
        )
        while True:
            found = (await client.retrieve(asking)).retrieved.collective
            if (found.valid[:, :2] & (found.similarity[:, :2] > 0.99)).all():
                return time.perf_counter() - begin
            await asyncio.sleep(0.01)

    async def many() -> list[float]:
        client = MemoryGroup(",".join(urls), 30)
        times = [await one(client, n) for n in range(20)]
        await client.close()
        return times

    name = "an item that its second user took is given to users of all replicas: slowest of 20"
    return measured(name, max(asyncio.run(many())), "s", at_most=1.5)


# ---------------------------------------------------------------------------------------------- failures


def failures(of: Checkpoint, cluster: ClusterOfValkeys, started: Fleet, urls: list[str]) -> list[Measure]:
    victim = cluster.primary_of_slot(0)
    last = SLOTS // 3 * RANGES // SLOTS
    theirs = next(name for name in map(made.user, range(USERS)) if range_of(name) < last - 1)
    others = next(name for name in map(made.user, range(USERS)) if range_of(name) > 2 * last + 1)
    found = []
    refused = asyncio.run(_refused(of, urls, (theirs, others), lambda: cluster.kill(victim), 3 * NODE_TIMEOUT_MS / 1e3))
    name = f"a primary is killed (node timeout {NODE_TIMEOUT_MS / 1e3:g} s): longest time without acknowledged write"
    found.append(measured(f"{name}, users of its slots", refused[0], "s", at_most=15))
    found.append(measured(f"{name}, users of other slots", refused[1], "s", at_most=1))
    cluster.start_again(victim)
    until(lambda: cluster.is_whole(victim))

    leaving = urls.pop()
    told = asyncio.run(_degraded(of, [*urls, leaving], lambda: started.end(leaving, signal.SIGTERM)))
    found.append(measured("a replica is told to stop: answers without all memories", told[0], "s", at_most=0))
    killed = urls.pop()
    told = asyncio.run(_degraded(of, [*urls, killed], lambda: started.end(killed, signal.SIGKILL)))
    found.append(measured("a replica is killed: answers without all memories of others", told[0], "s", at_most=15))
    found.append(measured("a replica is killed: answers refused", told[1], "", at_most=0))
    return found


async def _refused(
    of: Checkpoint, urls: list[str], users: tuple[str, str], fail: Callable[[], object], seconds: float
) -> list[float]:
    """Longest times between acknowledged writes of two users around a failure."""
    client = MemoryGroup(",".join(urls), 5)
    key = unit(np.random.default_rng(0).standard_normal(of.config.encoder.width)).astype(np.float32)
    over = asyncio.Event()

    async def writing(user: str) -> float:
        last, longest, n = time.perf_counter(), 0.0, 0
        while not over.is_set():
            n += 1
            try:
                await take(client, of, user, f"i{n % 50 + 1}", made.START + 1e6 + n, key)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            except MemoryUnavailable:
                await asyncio.sleep(0.05)
        return max(longest, time.perf_counter() - last)

    tasks = [asyncio.create_task(writing(user)) for user in users]
    await asyncio.sleep(1)
    await asyncio.to_thread(fail)
    await asyncio.sleep(seconds + 4)
    over.set()
    gaps = await asyncio.gather(*tasks)
    await client.close()
    return list(gaps)


async def _degraded(of: Checkpoint, urls: list[str], fail: Callable[[], object]) -> tuple[float, int]:
    """Seconds of incomplete answers after a failure, and how many calls were not answered at all."""
    client, rng = MemoryGroup(",".join(urls), 5), np.random.default_rng(1)
    seconds, refused, calm = 0.0, 0, 0
    failing: Awaitable[object] = asyncio.create_task(asyncio.to_thread(fail))
    last = time.perf_counter()
    while calm < 100 or not failing.done():  # type: ignore[attr-defined]
        names = [made.user(one) for one in rng.integers(0, USERS, 16)]
        try:
            complete = not (await client.retrieve(RetrieveRequest(of.version, names))).degraded
        except MemoryUnavailable:
            complete, refused = False, refused + 1
        now = time.perf_counter()
        calm = calm + 1 if complete else 0
        seconds, last = seconds + (0 if complete else now - last), now
        await asyncio.sleep(0.02)
    await client.close()
    return seconds, refused


def main() -> None:
    from api.cli import measured_with

    store("group", measure(), measured_with() | {"command": "python -m benchmarks.memory.group"}, RESULTS)


if __name__ == "__main__":
    main()
