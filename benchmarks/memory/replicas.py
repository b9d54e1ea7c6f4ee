"""Any number of memory replicas over one Redis: what a request costs however many there are, and how long it takes
until one more, one less or a write is no longer noticed. Real processes.

    python -m benchmarks.memory.replicas [PART …] [--users N] [--entries N …] [--seconds S] [--json FILE]

Where there are fewer cores than replicas, throughput is reckoned from CPU: n replicas that have a core each answer n
requests in the CPU time (of all of them together, from /proc) that one request takes. For that they are asked one after
another, on a core that is theirs meanwhile; all at once they push each other out of the caches. Deployments are
compared by turns, each with a Valkey of its own. Results: benchmarks/memory/replicas.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import numpy as np
import redis
from numpy.typing import NDArray

os.environ.setdefault("OMP_NUM_THREADS", "1")

from api.http.problems import MemoryUnavailable
from api.memory.client import MemoryClient
from api.memory.replicas import LOOK_S, MemoryReplicas
from benchmarks.measures import Measure, measured, percentile, store
from benchmarks.memory import banks as made
from benchmarks.memory.service import Replica, Writer, cpu_s, events, open_loop, service, valkey
from benchmarks.ports import free_port
from benchmarks.serving.deployment import running
from memory_service.protocol.slots import SLOTS, slot_of
from memory_service.protocol.structs import EventIn, PlanRequest, RetrieveRequest, UserEvents, UserWrite, WriteRequest
from model.checkpoint import Checkpoint
from model.memory.rules import unit
from tests.redis_cluster import redis_cluster, until

COUNTS, LONE_COUNTS = (1, 2, 4), (1, 3)
"""Replicas of the deployments that are compared."""
BATCH, CALLERS = 16, 4
"""Users of a call, as the api's micro-batches have them under load, and calls under way at a time."""
ROUNDS = 5
LONE_CALLS_A_S = 100
REQUESTS_A_S = 100
"""Asked of the api while a replica ends."""
ENDS = 3
"""How often each kind of end is tried."""
NOTICED_S = 4.0
"""How long requests go on after it."""
ITEMS_SEEN = 20
WRITES_A_S = (100, 1000)
"""The last of them comes in calls of WRITES_A_CALL users."""
WRITES_A_CALL = 10
NODE_TIMEOUT_MS = 2000
RESULTS = Path(__file__).with_name("replicas.json")


@dataclass(frozen=True)
class Extent:
    """How much is measured: users with a full bank, entries that a joining replica loads, seconds of each load."""

    users: int = 20_000
    entries: Sequence[int] = (1_000_000, 3_000_000, 7_500_000)
    seconds: float = 4.0


# ------------------------------------------------------------------------------------------- deployments


@dataclass(frozen=True)
class Deployment:
    """Replicas over one Valkey."""

    of: Checkpoint
    run: Path
    redis_url: str
    replicas: list[Replica]

    @property
    def name(self) -> str:
        """How many replicas."""
        return "one replica" if len(self.replicas) == 1 else f"{len(self.replicas)} replicas"

    @property
    def urls(self) -> str:
        """All of them, as the api is told."""
        return ",".join(one.url for one in self.replicas)

    def cpu_s(self) -> float:
        """CPU seconds of all replicas so far."""
        return sum(one.cpu_s() for one in self.replicas)

    def redis_pid(self) -> int:
        """Process id of its Valkey."""
        with redis.Redis.from_url(self.redis_url) as client:
            return int(client.info("server")["process_id"])

    def add(self, stack: ExitStack) -> Replica:
        """Start one more, which ends with the stack."""
        one = stack.enter_context(service(self.run, self.redis_url))
        self.replicas.append(one)
        return one

    def settle(self) -> None:
        """Wait until each replica knows that all of them, and no others, are there and ready."""
        wanted = {one.url: True for one in self.replicas}
        until(lambda: all(seen == wanted for seen in asyncio.run(self._seen())))

    async def _seen(self) -> list[dict[str, bool]]:
        async with AsyncClients([one.url for one in self.replicas]) as clients:
            return [(await client.replicas()).replicas for client in clients]


class AsyncClients:
    """A plain client of each URL, closed at the end."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._clients: list[MemoryClient] = []

    async def __aenter__(self) -> list[MemoryClient]:
        self._clients = [MemoryClient(url, 30.0) for url in self._urls]
        return self._clients

    async def __aexit__(self, *raised: object) -> None:
        for client in self._clients:
            await client.close()


@asynccontextmanager
async def asking(urls: str, timeout_s: float = 30.0) -> AsyncIterator[MemoryReplicas]:
    """A client of all replicas, as the api has it."""
    client = MemoryReplicas(urls, timeout_s)
    try:
        await client.ready()
        yield client
    finally:
        await client.close()


@contextmanager
def deployed(count: int, users: int, entries: int = made.ENTRIES) -> Iterator[Deployment]:
    """So many replicas over a Valkey with the banks of so many users, of so many entries each."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        of, url = made.checkpoint(folder / "run"), stack.enter_context(valkey(folder / "redis"))
        asyncio.run(made.fill(url, of, range(users), entries))
        found = Deployment(of, folder / "run", url, [])
        for _ in range(count):
            found.add(stack)
        found.settle()
        yield found


@contextmanager
def side_by_side(counts: Sequence[int], users: int) -> Iterator[list[Deployment]]:
    """Deployments of so many replicas each."""
    with ExitStack() as stack:
        yield [stack.enter_context(deployed(count, users)) for count in counts]


# --------------------------------------------------------------------------------------------- throughput


def throughput(extent: Extent) -> list[Measure]:
    """What a request costs all replicas together, however many there are."""
    with side_by_side(COUNTS, extent.users) as all_of_them:
        asyncio.run(_touch(all_of_them, extent.users))
        names, found = [one.name for one in all_of_them], []
        for scope in ("own scope", "both scopes"):
            alone = scope == "own scope"
            with on_a_core(all_of_them):
                turns = _rounds(all_of_them, lambda one: _one_by_one(one, extent, alone))  # noqa: B023
            found += _with_a_core_each(scope, names, turns)
            at_once = _rounds(all_of_them, lambda one: _at_once(one, extent, alone))  # noqa: B023
            found += _on_these_cores(scope, names, at_once)
        return found


@dataclass(frozen=True)
class Spent:
    """A load: users answered, seconds, and CPU seconds of all replicas."""

    users: int
    seconds: float
    cpu_s: float


def _rounds(deployments: Sequence[Deployment], load: Callable[[Deployment], Awaitable[Spent]]) -> list[list[Spent]]:
    """Loads of each deployment, by turns."""

    async def one(deployment: Deployment) -> Spent:
        return await load(deployment)

    return [[asyncio.run(one(deployment)) for deployment in deployments] for _ in range(ROUNDS)]


def _cost_s(rounds: Sequence[Sequence[Spent]]) -> NDArray[np.float64]:
    """CPU seconds of a request, by deployment."""
    return np.asarray(np.median([[one.cpu_s / one.users for one in row] for row in rounds], axis=0))


def _with_a_core_each(scope: str, names: Sequence[str], rounds: Sequence[Sequence[Spent]]) -> list[Measure]:
    cost = _cost_s(rounds)
    capacity, found = np.array(COUNTS) / cost, []
    for n, name in enumerate(names):
        of = {"reference": names[0], "limit": capacity[0], "ratio_at_least": 0.95 * COUNTS[n]} if n else {}
        found.append(measured(f"{scope}, {name}: CPU of all replicas a request", cost[n] * 1e6, "µs"))
        found.append(measured(f"{scope}, {name}: requests a CPU second", 1 / cost[n], "requests"))
        found.append(measured(f"{scope}, {name} with a core each: throughput", capacity[n], "requests/s", **of))
    growth = (cost[-1] / cost[0] - 1) * 100
    return [*found, measured(f"{scope}: growth of CPU a request, one to four replicas", growth, "%", at_most=5)]


def _on_these_cores(scope: str, names: Sequence[str], rounds: Sequence[Sequence[Spent]]) -> list[Measure]:
    cost, found = _cost_s(rounds), []
    rate = np.median([[one.users / one.seconds for one in row] for row in rounds], axis=0)
    for n, name in enumerate(names):
        about = f"{scope}, {name} all at once, on {os.cpu_count()} cores with who asks and Valkey"
        found.append(measured(f"{about}: throughput", rate[n], "requests/s"))
        found.append(measured(f"{about}: CPU of all replicas a request", cost[n] * 1e6, "µs"))
    return found


@contextmanager
def on_a_core(deployments: Sequence[Deployment]) -> Iterator[None]:
    """All replicas share a core that neither their Valkeys nor this process use, where there are two."""
    cores = os.sched_getaffinity(0)
    first = {min(cores)}
    place = {replica.process.pid: first for one in deployments for replica in one.replicas}
    place |= dict.fromkeys([0, *(one.redis_pid() for one in deployments)], cores - first or first)
    for pid, to in place.items():
        os.sched_setaffinity(pid, to)
    try:
        yield
    finally:
        for pid in place:
            os.sched_setaffinity(pid, cores)


async def _touch(deployments: Sequence[Deployment], users: int) -> None:
    """All banks become resident where they will be asked for."""
    for one in deployments:
        async with asking(one.urls) as client:
            for names in _batches(client, users, 500):
                await client.retrieve(RetrieveRequest(one.of.version, names, alone=list(range(len(names)))))


def _batches(client: MemoryReplicas, users: int, size: int) -> list[list[str]]:
    """Users in batches for one replica each, as the api makes them, in random order."""
    rng, by_replica = np.random.default_rng(0), dict[str, list[str]]()
    for n in rng.permutation(users).tolist():
        by_replica.setdefault(client.replica_of(made.user(n)), []).append(made.user(n))
    batches = [names[at : at + size] for names in by_replica.values() for at in range(0, len(names), size)]
    return [batches[n] for n in rng.permutation(len(batches)).tolist()]


async def _one_by_one(one: Deployment, extent: Extent, alone: bool) -> Spent:
    """Each replica is asked about its users for its part of the time."""
    async with asking(one.urls) as client:
        batches, part = _batches(client, extent.users, BATCH), extent.seconds / len(one.replicas)
        theirs = [
            [names for names in batches if client.replica_of(names[0]) == replica.url] for replica in one.replicas
        ]
        before, begin = one.cpu_s(), time.perf_counter()
        users = [await _load(client, one.of, some, part, alone) for some in theirs]
        return Spent(sum(users), time.perf_counter() - begin, one.cpu_s() - before)


async def _at_once(one: Deployment, extent: Extent, alone: bool) -> Spent:
    """All replicas are asked."""
    async with asking(one.urls) as client:
        batches = _batches(client, extent.users, BATCH)
        before, begin = one.cpu_s(), time.perf_counter()
        users = await _load(client, one.of, batches, extent.seconds, alone)
        return Spent(users, time.perf_counter() - begin, one.cpu_s() - before)


async def _load(
    client: MemoryReplicas, of: Checkpoint, batches: Sequence[list[str]], seconds: float, alone: bool
) -> int:
    """CALLERS calls at a time for so many seconds; how many users were answered."""
    answered, turn, until_s = 0, 0, time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal answered, turn
        while time.perf_counter() < until_s:
            names, turn = batches[turn % len(batches)], turn + 1
            rows = list(range(len(names))) if alone else []
            reply = await client.retrieve(RetrieveRequest(of.version, names, alone=rows))
            if reply.degraded or not reply.known.all():
                raise RuntimeError("an answer was incomplete")
            answered += len(names)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return answered


# ------------------------------------------------------------------------------------------- lone request


def lone(extent: Extent) -> list[Measure]:
    """How long one caller waits, one user at a time, by turns of each deployment."""
    with side_by_side(LONE_COUNTS, extent.users) as all_of_them:
        asyncio.run(_touch(all_of_them, extent.users))
        with on_a_core(all_of_them):
            times = asyncio.run(_by_turns(all_of_them, extent.users, round(extent.seconds * LONE_CALLS_A_S)))
    found = [
        measured(f"a lone request, both scopes, {one.name}: p{q}", percentile(some, q), "ms")
        for one, some in zip(all_of_them, times, strict=True)
        for q in (50, 99)
    ]
    ratio = percentile(times[1], 50) / percentile(times[0], 50)
    return [*found, measured("a lone request, three replicas over one, p50", ratio, "×", at_most=1.15)]  # noqa: RUF001


async def _by_turns(deployments: Sequence[Deployment], users: int, calls: int) -> list[list[float]]:
    """Seconds of each call of two deployments, about the same users, in changing order."""
    rng, times = np.random.default_rng(1), [list[float]() for _ in deployments]
    async with asking(deployments[0].urls) as first, asking(deployments[1].urls) as second:
        turn = list(zip((first, second), deployments, times, strict=True))
        for n in range(-50, calls):
            name, turn = made.user(int(rng.integers(users))), turn[::-1]
            for client, one, mine in turn:
                begin = time.perf_counter()
                await client.retrieve(RetrieveRequest(one.of.version, [name]))
                if n >= 0:
                    mine.append(time.perf_counter() - begin)
    return times


# ------------------------------------------------------------------------------------- a replica comes, or goes


def joins(extent: Extent) -> list[Measure]:
    """From the start of a replica beside another one until it answers, and answers fully."""
    found, there = [], 0
    with TemporaryDirectory() as name, valkey(Path(name) / "redis") as url:
        of = made.checkpoint(Path(name) / "run")
        for entries in sorted(extent.entries):
            users = -(-entries // made.ENTRIES)
            asyncio.run(made.fill(url, of, range(there, users)))
            there = users
            with service(Path(name) / "run", url) as first, service(Path(name) / "run", url) as second:
                asyncio.run(_answers_fully(second.url, of, users))
                of_them = f"{users * made.ENTRIES:,} entries of others"
                limit = 15 if entries >= 7_500_000 else None
                found.append(measured(f"a first replica starts, {of_them}: until ready", first.ready_s, "s"))
                found.append(
                    measured(f"a replica joins, {of_them}: until it answers fully", second.ready_s, "s", at_most=limit)
                )
                found.append(measured(f"a replica with {of_them}, in RAM", second.rss_bytes() / 2**30, "GiB"))
    return found


async def _answers_fully(url: str, of: Checkpoint, users: int) -> None:
    async with AsyncClients([url]) as (client,):
        names = [made.user(n) for n in np.random.default_rng(2).integers(0, users, BATCH)]
        if (await client.retrieve(RetrieveRequest(of.version, names))).degraded:
            raise RuntimeError("a replica that is ready gave an incomplete answer")


@dataclass(frozen=True)
class Answer:
    """One answer of the api: seconds from the start of the load until it was due, and from then until it came."""

    due: float
    took: float
    good: bool
    degraded: bool


def ends(extent: Extent) -> list[Measure]:
    """What callers of an api notice when one of three replicas is killed, hangs, or is told to stop."""
    kinds = {"is killed": signal.SIGKILL, "hangs": signal.SIGSTOP, "is told to stop": signal.SIGTERM}
    with deployed(3, extent.users) as one, ExitStack() as started:
        port = free_port()
        words = ["-m", "api", "--run", str(one.run), "--memory-url", one.urls, "--port", str(port)]
        with running(words, port) as api:
            asyncio.run(_requests(api.url, extent.users, 1.0))
            return [
                measure
                for kind, what in kinds.items()
                for measure in _noticed(kind, [_end(one, api.url, extent, what, started) for _ in range(ENDS)])
            ]


def _noticed(kind: str, rounds: Sequence[tuple[float, Sequence[Answer]]]) -> list[Measure]:
    """`rounds`: when the replica ended, and the answers around it."""
    after = [[one for one in answers if one.due + one.took >= ended] for ended, answers in rounds]
    until_whole = [
        max((one.due + one.took - ended for one in answers if one.degraded), default=0.0)
        for (ended, _), answers in zip(rounds, after, strict=True)
    ]
    every = [one for answers in after for one in answers]
    name = f"one of three replicas {kind}, {REQUESTS_A_S} requests a second, {len(rounds)} times"
    return [
        measured(f"{name}: requests refused, of {len(every)}", sum(not one.good for one in every), "", at_most=0),
        measured(f"{name}: marked degraded", sum(one.degraded for one in every), ""),
        measured(f"{name}: degraded for at most", max(until_whole), "s", at_most=1),
        measured(f"{name}: longest answer", max(one.took for one in every), "s"),
        measured(f"{name}: p99", percentile([one.took for one in every], 99), "ms"),
    ]


def _end(
    one: Deployment, api: str, extent: Extent, what: signal.Signals, started: ExitStack
) -> tuple[float, list[Answer]]:
    """End a replica in the middle of a load, then start another in its place."""

    async def loaded() -> tuple[float, list[Answer]]:
        load = asyncio.create_task(_requests(api, extent.users, 1.0 + NOTICED_S))
        begin = time.perf_counter()
        await asyncio.sleep(1.0)
        gone.process.send_signal(what)
        return time.perf_counter() - begin, await load

    gone = one.replicas.pop(0)
    found = asyncio.run(loaded())
    gone.process.kill()
    one.add(started)
    one.settle()
    time.sleep(2 * LOOK_S)  # until the api knows
    return found


async def _requests(api: str, users: int, seconds: float) -> list[Answer]:
    """`POST /recommend` by user, REQUESTS_A_S."""
    rng, found = np.random.default_rng(), list[Answer]()
    begin = time.perf_counter()

    async def one(n: int) -> None:
        due = n / REQUESTS_A_S
        try:
            body = {"user_id": made.user(int(rng.integers(users)))}
            async with session.post(f"{api}/recommend", json=body) as response:
                good, answer = response.status == 200, await response.json()
        except (aiohttp.ClientError, TimeoutError):
            good, answer = False, {}
        degraded = good and answer["memory"]["degraded"]
        found.append(Answer(due, time.perf_counter() - begin - due, good, degraded))

    async with aiohttp.ClientSession() as session:
        await open_loop(one, REQUESTS_A_S, seconds)
    return found


# ------------------------------------------------------------------------------------------------- writes


@dataclass(frozen=True)
class Written:
    """CPU seconds of a write: of the replica that wrote, of each that listened, and of Valkey; writes a second."""

    writer_s: float
    listener_s: float
    redis_s: float
    rate: float


def listening(extent: Extent) -> list[Measure]:
    """What a write costs a replica that is not asked anything."""
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
    """Write single events of random users, so many a second or as many as can be; how many were acknowledged."""
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
            acknowledged += await told.write([(made.user(user), events(1, since + n, rng)) for user in some])

    async with aiohttp.ClientSession() as session:
        told = Writer(session, writer.url, one.of)
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return acknowledged


def seen(extent: Extent) -> list[Measure]:
    """From when a write is acknowledged by one replica until another one gives it to others."""
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
    """Three users take the same item; two of them another one after it, which is then given to the third."""
    key = unit(np.random.default_rng(n).standard_normal(made.DIM)).astype(np.float32)
    for name in ("asks", "first", "second"):
        await take(writer, of, f"{name} {n}", f"old {n}", made.START, key)
    await take(writer, of, f"first {n}", f"new {n}", made.START + 1, key)
    await take(writer, of, f"second {n}", f"new {n}", made.START + 1, key)
    begin = time.perf_counter()
    while True:
        found = (await other.retrieve(RetrieveRequest(of.version, [f"asks {n}"]))).retrieved.collective
        if (found.valid[:, :2] & (found.similarity[:, :2] > 0.99)).sum() == 2:
            return time.perf_counter() - begin
        await asyncio.sleep(0.01)


async def take(
    client: MemoryClient | MemoryReplicas, of: Checkpoint, user: str, item: str, when: float, key: np.ndarray
) -> None:
    """Write one event whose key, and the state after it, are given."""
    taken = [EventIn(0, item, when)]
    plans = (await client.plan(PlanRequest(of.version, when, [UserEvents(user, taken)]))).users
    for _ in range(3):
        one, vector = plans[0], key.astype("<f4").tobytes()
        write = UserWrite(user, one.version, taken, vector * len(one.accepted), vector)
        told = (await client.write(WriteRequest(of.version, when, [write]))).users[0]
        if told.retry is None:
            return
        plans = [told.retry]
    raise MemoryUnavailable("written by others again and again")


# -------------------------------------------------------------------------------------- a primary of Redis


def primary(extent: Extent) -> list[Measure]:
    """How long nothing is acknowledged when a primary of a Redis Cluster (three, with a replica each) is killed."""
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
    """Longest times between acknowledged writes of some users around a failure."""
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


PARTS: dict[str, Callable[[Extent], list[Measure]]] = {
    "throughput": throughput,
    "lone": lone,
    "joins": joins,
    "ends": ends,
    "listening": listening,
    "seen": seen,
    "primary": primary,
}


def main() -> None:
    from api.cli import measured_with

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    options.add_argument("--users", type=int, default=Extent.users, help="with a full bank each")
    options.add_argument("--entries", type=int, nargs="+", default=Extent.entries, help="that a joining replica loads")
    options.add_argument("--seconds", type=float, default=Extent.seconds, help="of each load")
    options.add_argument("--json", type=Path, default=RESULTS)
    given = options.parse_args()
    extent = Extent(given.users, given.entries, given.seconds)
    if unknown := set(given.parts) - set(PARTS):
        options.error(f"no such part: {', '.join(sorted(unknown))}")
    for name in given.parts or PARTS:
        print(f"— {name}", flush=True)
        about = {"command": f"python -m benchmarks.memory.replicas {name}", "users": extent.users}
        store(name, PARTS[name](extent), measured_with() | about, given.json)


if __name__ == "__main__":
    main()
