"""Latency at load by simulation: every request passes an api, then one memory replica, that of its user. Arrivals are
random (Poisson), each process works on one request after another, times of service vary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Times]
"""Times of service, in seconds."""


def exponential(mean_s: float) -> Draw:
    """Coefficient of variation 1."""
    return lambda rng, count: rng.exponential(mean_s, count)


def lognormal(mean_s: float, variation: float) -> Draw:
    """Of a coefficient of variation."""
    sigma = np.sqrt(np.log1p(variation**2))
    return lambda rng, count: rng.lognormal(np.log(mean_s) - sigma**2 / 2, sigma, count)


def departures(arrivals: Times, service: Times) -> Times:
    """When each is done at one server, first come first served. `arrivals` ascend.

    >>> departures(np.array([0.0, 1.0, 9.0]), np.array([3.0, 1.0, 1.0])).tolist()
    [3.0, 4.0, 10.0]
    """
    work = np.cumsum(service)
    return work + np.maximum.accumulate(arrivals - (work - service))


def latencies(
    requests_a_s: float, apis: int, replicas: int, api: Draw, memory: Draw, count: int, rng: np.random.Generator
) -> Times:
    """(count,) seconds from arrival to answer: half of the api's work, the replica's, the other half."""
    arrivals = np.cumsum(rng.exponential(1 / requests_a_s, count))
    half = api(rng, count) / 2
    asked = _shared(arrivals, half, rng.integers(0, apis, count), apis)
    return _shared(asked, memory(rng, count), rng.integers(0, replicas, count), replicas) + half - arrivals


def _shared(arrivals: Times, service: Times, server: NDArray[np.int64], servers: int) -> Times:
    """When each is done at its server."""
    done = np.empty(len(arrivals))
    for one in range(servers):
        mine = np.flatnonzero(server == one)
        mine = mine[np.argsort(arrivals[mine], kind="stable")]
        done[mine] = departures(arrivals[mine], service[mine])
    return done
