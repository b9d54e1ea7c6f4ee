"""How well the collective index finds. Now and then some of its own entries are searched for twice: as a request would
search, and in all lists. The share of the exact neighbours that the first search finds, too, is the recall.

The exact search goes through the lists in slices of a few milliseconds and takes at most `SHARE` of a core: other calls
are answered in between. What is written meanwhile counts as missed, which at a hundred writes a second is less than a
hundredth of a percent of a large index.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from model.collective import CollectiveIndex

QUERIES = 32
NEIGHBOURS = 20
DISTANCES = 64_000_000
"""Similarities that a probe computes at most, some 3 s of a core: beyond 2 million entries fewer are searched for."""
SLICE = 50_000
"""Similarities computed in one go."""
SHARE = 0.05
"""Of a core."""
TOLERANCE = 1e-4
"""Between similarities of one entry computed in two ways, by a GPU for one."""


async def recall(index: CollectiveIndex, rng: np.random.Generator) -> float | None:
    """Recall among the 20 nearest entries of other users, over a sample of entries; None where nobody has others."""
    count = int(np.clip(DISTANCES // max(1, len(index)), 1, QUERIES))
    queries, slots = index.sample(count, rng)
    if not len(queries):
        return None
    found = index.search(queries, slots, np.full(len(queries), NEIGHBOURS))
    exact = await _exact(index, queries, slots)
    real = np.isfinite(exact)
    furthest = np.where(real, exact, np.inf).min(axis=1, keepdims=True)
    hits = (found.valid & (found.similarity >= furthest - TOLERANCE)).sum(axis=1)
    there = real.sum(axis=1)
    shares = np.minimum(hits, there)[there > 0] / there[there > 0]
    return float(shares.mean()) if len(shares) else None


async def _exact(index: CollectiveIndex, queries: NDArray[np.float32], slots: NDArray[np.int64]) -> NDArray[np.float32]:
    """(B, NEIGHBOURS) similarities of the nearest entries of others, best first; −inf where there are no more."""
    best = np.full((len(queries), NEIGHBOURS), -np.inf, np.float32)
    step = max(1, SLICE * index.lists // max(1, len(queries) * len(index)))
    for first in range(0, index.lists, step):
        begin = time.perf_counter()
        lists = range(first, min(first + step, index.lists))
        similarity, whose = index.scan(lists, queries, NEIGHBOURS + index.capacity)
        similarity[(whose < 0) | (whose == slots[:, None])] = -np.inf
        best = -np.sort(-np.concatenate([best, similarity], axis=1), axis=1)[:, :NEIGHBOURS]
        await asyncio.sleep((time.perf_counter() - begin) * (1 / SHARE - 1))
    return best
