"""A memory replica joins, or leaves: until it answers, and what callers notice."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import numpy as np

from api.memory.replicas import LOOK_S
from benchmarks.measures import Measure, measured, percentile
from benchmarks.memory import banks as made
from benchmarks.memory.replicas.deployments import BATCH, AsyncClients, Deployment, Extent, deployed
from benchmarks.memory.service import open_loop, service, valkey
from benchmarks.ports import free_port
from benchmarks.serving.deployment import running
from memory_service.protocol.question import Question
from model.checkpoint import Checkpoint

REQUESTS_A_S = 100
"""Requests to the api while a memory replica ends."""
ENDS = 3
"""Trials of each kind of end."""
NOTICED_S = 4.0
"""How long requests go on afterwards."""


def joins(extent: Extent) -> list[Measure]:
    """Time from the start of a first and a second replica until each is ready and answers in full."""
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
        if (await client.retrieve(Question(of.version, names))).degraded:
            raise RuntimeError("a replica that is ready gave an incomplete answer")


@dataclass(frozen=True)
class TimedAnswer:
    """An answer of the api. due: seconds from the start of the load to the request; took: from then to the answer."""

    due: float
    took: float
    good: bool
    degraded: bool


def ends(extent: Extent) -> list[Measure]:
    """What callers of the api notice when one of three replicas is killed, hangs, or is told to stop."""
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


def _noticed(kind: str, rounds: Sequence[tuple[float, Sequence[TimedAnswer]]]) -> list[Measure]:
    """rounds: time at which the replica ended, and the answers before and after."""
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
) -> tuple[float, list[TimedAnswer]]:
    """End a replica during a load, then start another one in its place."""

    async def loaded() -> tuple[float, list[TimedAnswer]]:
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


async def _requests(api: str, users: int, seconds: float) -> list[TimedAnswer]:
    """Answers to `POST /recommend` for random users, REQUESTS_A_S a second."""
    rng, found = np.random.default_rng(), list[TimedAnswer]()
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
        found.append(TimedAnswer(due, time.perf_counter() - begin - due, good, degraded))

    async with aiohttp.ClientSession() as session:
        await open_loop(one, REQUESTS_A_S, seconds)
    return found
