"""Latency at load by simulation: every request passes an api, then n memory replicas side by side, and waits for the
slowest. Arrivals are random (Poisson), each process works on one request after another, times of service vary.
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
    requests_a_s: float, apis: int, replicas: int, api: Draw, part: Draw, count: int, rng: np.random.Generator
) -> Times:
    """(count,) seconds from arrival to answer: half of the api's work, all replicas, the other half."""
    arrivals = np.cumsum(rng.exponential(1 / requests_a_s, count))
    asked = np.empty(count)
    which = rng.integers(0, apis, count)
    half = api(rng, count) / 2
    for one in range(apis):
        mine = which == one
        asked[mine] = departures(arrivals[mine], half[mine])
    order = np.argsort(asked, kind="stable")
    slowest = np.zeros(count)
    for _ in range(replicas):
        done = departures(asked[order], part(rng, count))
        slowest[order] = np.maximum(slowest[order], done)
    return slowest + half - arrivals
