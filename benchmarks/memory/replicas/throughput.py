"""What a request costs all memory replicas together, and how long a lone caller waits."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from api.memory.replicas import MemoryReplicas
from benchmarks.measures import Measure, measured, percentile
from benchmarks.memory import banks as made
from benchmarks.memory.replicas.deployments import (
    BATCH,
    CALLERS,
    Deployment,
    Extent,
    asking,
    batches,
    on_a_core,
    side_by_side,
    touch,
)
from memory_service.protocol.question import Question
from model.checkpoint import Checkpoint

COUNTS, LONE_COUNTS = (1, 2, 4), (1, 3)
"""Numbers of memory replicas that are compared."""
ROUNDS = 5
LONE_CALLS_A_S = 100


def throughput(extent: Extent) -> list[Measure]:
    """CPU of a request in all replicas together, by number of replicas."""
    with side_by_side(COUNTS, extent.users) as all_of_them:
        asyncio.run(touch(all_of_them, extent.users))
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
    """Result of a load: users answered, seconds, and CPU seconds of all replicas."""

    users: int
    seconds: float
    cpu_s: float


def _rounds(deployments: Sequence[Deployment], load: Callable[[Deployment], Awaitable[Spent]]) -> list[list[Spent]]:
    """ROUNDS loads of each deployment, by turns."""

    async def one(deployment: Deployment) -> Spent:
        return await load(deployment)

    return [[asyncio.run(one(deployment)) for deployment in deployments] for _ in range(ROUNDS)]


def _cost_s(rounds: Sequence[Sequence[Spent]]) -> NDArray[np.float64]:
    """CPU seconds of a request, median of the rounds, by deployment."""
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


async def _one_by_one(one: Deployment, extent: Extent, alone: bool) -> Spent:
    """Ask one replica after another about its users, for an equal part of the time."""
    async with asking(one.urls) as client:
        calls, part = batches(client, extent.users, BATCH), extent.seconds / len(one.replicas)
        theirs = [[names for names in calls if client.replica_of(names[0]) == replica.url] for replica in one.replicas]
        before, begin = one.cpu_s(), time.perf_counter()
        users = [await _load(client, one.of, some, part, alone) for some in theirs]
        return Spent(sum(users), time.perf_counter() - begin, one.cpu_s() - before)


async def _at_once(one: Deployment, extent: Extent, alone: bool) -> Spent:
    """Ask all replicas at once."""
    async with asking(one.urls) as client:
        calls = batches(client, extent.users, BATCH)
        before, begin = one.cpu_s(), time.perf_counter()
        users = await _load(client, one.of, calls, extent.seconds, alone)
        return Spent(users, time.perf_counter() - begin, one.cpu_s() - before)


async def _load(
    client: MemoryReplicas, of: Checkpoint, batches: Sequence[list[str]], seconds: float, alone: bool
) -> int:
    """Make CALLERS calls at a time, for `seconds`; returns the number of users answered."""
    answered, turn, until_s = 0, 0, time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal answered, turn
        while time.perf_counter() < until_s:
            names, turn = batches[turn % len(batches)], turn + 1
            reply = await client.retrieve(Question(of.version, names, alone=np.full(len(names), alone)))
            if reply.degraded or not reply.known.all():
                raise RuntimeError("an answer was incomplete")
            answered += len(names)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return answered


def lone(extent: Extent) -> list[Measure]:
    """Latency of a lone caller who asks about one user at a time."""
    with side_by_side(LONE_COUNTS, extent.users) as all_of_them:
        asyncio.run(touch(all_of_them, extent.users))
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
    """Seconds of each call to two deployments, about the same users, in alternating order."""
    rng, times = np.random.default_rng(1), [list[float]() for _ in deployments]
    async with asking(deployments[0].urls) as first, asking(deployments[1].urls) as second:
        turn = list(zip((first, second), deployments, times, strict=True))
        for n in range(-50, calls):
            name, turn = made.user(int(rng.integers(users))), turn[::-1]
            for client, one, mine in turn:
                begin = time.perf_counter()
                await client.retrieve(Question(one.of.version, [name]))
                if n >= 0:
                    mine.append(time.perf_counter() - begin)
    return times
