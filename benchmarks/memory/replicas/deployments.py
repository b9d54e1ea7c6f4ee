"""Memory replicas over one Valkey, and clients of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import redis

from api.memory.client import MemoryClient
from api.memory.replicas import MemoryReplicas
from benchmarks.memory import banks as made
from benchmarks.memory.service import Replica, service, valkey
from memory_service.protocol.question import Question
from model.checkpoint import Checkpoint
from tests.redis_cluster import until

BATCH, CALLERS = 16, 4
"""Users of a call, as in the api's micro-batches under load, and concurrent calls."""


@dataclass(frozen=True)
class Extent:
    """Extent of the measurement: users with a full bank, entries that a joining replica loads, seconds of each load."""

    users: int = 20_000
    entries: Sequence[int] = (1_000_000, 3_000_000, 7_500_000)
    seconds: float = 4.0


@dataclass(frozen=True)
class Deployment:
    """Memory replicas over one Valkey."""

    of: Checkpoint
    run: Path
    redis_url: str
    replicas: list[Replica]

    @property
    def name(self) -> str:
        """Number of replicas, in words."""
        return "one replica" if len(self.replicas) == 1 else f"{len(self.replicas)} replicas"

    @property
    def urls(self) -> str:
        """Their URLs, as the api expects them."""
        return ",".join(one.url for one in self.replicas)

    def cpu_s(self) -> float:
        """CPU seconds that all replicas have used."""
        return sum(one.cpu_s() for one in self.replicas)

    def redis_pid(self) -> int:
        """Process id of Valkey."""
        with redis.Redis.from_url(self.redis_url) as client:
            return int(client.info("server")["process_id"])

    def add(self, stack: ExitStack) -> Replica:
        """Start another replica, which ends with the stack."""
        one = stack.enter_context(service(self.run, self.redis_url))
        self.replicas.append(one)
        return one

    def settle(self) -> None:
        """Wait until each replica sees exactly these replicas, all ready."""
        wanted = {one.url: True for one in self.replicas}
        until(lambda: all(seen == wanted for seen in asyncio.run(self._seen())))

    async def _seen(self) -> list[dict[str, bool]]:
        async with AsyncClients([one.url for one in self.replicas]) as clients:
            return [(await client.replicas()).replicas for client in clients]


class AsyncClients:
    """One plain client per URL."""

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
    """A client of all replicas, like that of the api."""
    client = MemoryReplicas(urls, timeout_s)
    try:
        await client.ready()
        yield client
    finally:
        await client.close()


@contextmanager
def deployed(count: int, users: int, entries: int = made.ENTRIES) -> Iterator[Deployment]:
    """`count` replicas over a Valkey with the banks of `users` users, of `entries` entries each."""
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
    """One deployment for each number of replicas."""
    with ExitStack() as stack:
        yield [stack.enter_context(deployed(count, users)) for count in counts]


@contextmanager
def on_a_core(deployments: Sequence[Deployment]) -> Iterator[None]:
    """All replicas share one core, which, if there are two, neither their Valkeys nor this process use."""
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


async def touch(deployments: Sequence[Deployment], users: int) -> None:
    """Make all users residents of the replica that will be asked about them."""
    for one in deployments:
        async with asking(one.urls) as client:
            for names in batches(client, users, 500):
                await client.retrieve(Question(one.of.version, names, alone=np.ones(len(names), bool)))


def batches(client: MemoryReplicas, users: int, size: int) -> list[list[str]]:
    """Batches of users of the same replica, as the api makes them, in random order."""
    rng, by_replica = np.random.default_rng(0), dict[str, list[str]]()
    for n in rng.permutation(users).tolist():
        by_replica.setdefault(client.replica_of(made.user(n)), []).append(made.user(n))
    batches = [names[at : at + size] for names in by_replica.values() for at in range(0, len(names), size)]
    return [batches[n] for n in rng.permutation(len(batches)).tolist()]
