"""Recall of the collective index, measured from time to time: the memories that some randomly chosen users would get
are searched as for a request, and exactly, in all lists. Recall is the share of the exact neighbours that the first
search finds.

The exact search goes through the lists in slices of a few milliseconds and takes at most `CORE_SHARE` of a core, so
that other calls are answered in between. An entry that is written meanwhile counts as missed; at a hundred writes per
second that is less than a hundredth of a percent of a large index.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from memory_service.service.space import Space
from model.memory.collective.index import CollectiveIndex

QUERIES = 32
NEIGHBOURS = 20
DISTANCES = 64_000_000
"""Most similarities that one measurement computes, some 3 s of a core; beyond 2 million entries it asks for fewer."""
SLICE = 50_000
"""Similarities that are computed without a pause."""
CORE_SHARE = 0.05
"""Share of a core that a measurement takes."""
TOLERANCE = 1e-6


async def recall(space: Space, rng: np.random.Generator) -> float | None:
    """Recall of the 20 nearest entries of others, over a sample of users; None if there are no entries of others."""
    if space.collective is None:
        return None
    index = space.collective.index
    count = int(np.clip(DISTANCES // max(1, len(index)), 1, QUERIES))
    queries, last, slots = space.sample(space.collective, count, rng)
    return await recall_of(index, queries, last, slots) if len(queries) else None


async def recall_of(
    index: CollectiveIndex, queries: NDArray[np.float32], last: NDArray[np.int64], slots: NDArray[np.int64]
) -> float | None:
    """Recall over queries (B, d) with last items (B, L) and the askers' own slots (B,); None if there is nothing to
    find.
    """
    found = index.search(queries, last, slots, np.full(len(queries), NEIGHBOURS))
    exact = await _exact(index, queries, slots)
    real = np.isfinite(exact)
    furthest = np.where(real, exact, np.inf).min(axis=1, keepdims=True)
    hits = (found.valid & (found.similarity >= furthest - TOLERANCE)).sum(axis=1)
    there = real.sum(axis=1)
    shares = np.minimum(hits, there)[there > 0] / there[there > 0]
    return float(shares.mean()) if len(shares) else None


async def _exact(index: CollectiveIndex, queries: NDArray[np.float32], slots: NDArray[np.int64]) -> NDArray[np.float32]:
    """Similarities of the nearest entries of others, (B, NEIGHBOURS), best first, padded with −inf."""
    best = np.full((len(queries), NEIGHBOURS), -np.inf, np.float32)
    step = max(1, SLICE * index.lists // max(1, len(queries) * len(index)))
    for first in range(0, index.lists, step):
        begin = time.perf_counter()
        lists = range(first, min(first + step, index.lists))
        similarity, rows = index.scan(lists, queries, NEIGHBOURS + index.most_of(slots))
        similarity[(rows < 0) | index.is_of(rows, slots)] = -np.inf
        best = -np.sort(-np.concatenate([best, similarity], axis=1), axis=1)[:, :NEIGHBOURS]
        await asyncio.sleep((time.perf_counter() - begin) * (1 / CORE_SHARE - 1))
    return best
