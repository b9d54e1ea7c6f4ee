"""How well the collective index finds. Now and then memories of others are searched for twice, for some users chosen at
random: as a request of theirs would, and in all lists. The share of the exact neighbours that the first search finds,
too, is the recall.

The exact search goes through the lists in slices of a few milliseconds and takes at most `SHARE` of a core: other calls
are answered in between. What is written meanwhile counts as missed, which at a hundred writes a second is less than a
hundredth of a percent of a large index.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from memory_service.service.space import Space
from model.memory.collective import CollectiveIndex

QUERIES = 32
NEIGHBOURS = 20
DISTANCES = 64_000_000
"""Similarities that a probe computes at most, some 3 s of a core: beyond 2 million entries fewer are searched for."""
SLICE = 50_000
"""Similarities computed in one go."""
SHARE = 0.05
"""Of a core."""
TOLERANCE = 1e-6


async def recall(space: Space, rng: np.random.Generator) -> float | None:
    """Recall among the 20 nearest entries of other users, over a sample of users; None where nobody has others."""
    if space.collective is None:
        return None
    index = space.collective.index
    count = int(np.clip(DISTANCES // max(1, len(index)), 1, QUERIES))
    queries, last, slots = space.sample(space.collective, count, rng)
    return await recall_of(index, queries, last, slots) if len(queries) else None


async def recall_of(
    index: CollectiveIndex, queries: NDArray[np.float32], last: NDArray[np.int64], slots: NDArray[np.int64]
) -> float | None:
    """Recall of questions: queries (B, d), last items (B, L), slots of the askers (B,); None where there is nothing to
    be found.
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
    """(B, NEIGHBOURS) similarities of the nearest entries of others, best first; −inf where there are no more."""
    best = np.full((len(queries), NEIGHBOURS), -np.inf, np.float32)
    step = max(1, SLICE * index.lists // max(1, len(queries) * len(index)))
    for first in range(0, index.lists, step):
        begin = time.perf_counter()
        lists = range(first, min(first + step, index.lists))
        similarity, rows = index.scan(lists, queries, NEIGHBOURS + index.most_of(slots))
        similarity[(rows < 0) | index.is_of(rows, slots)] = -np.inf
        best = -np.sort(-np.concatenate([best, similarity], axis=1), axis=1)[:, :NEIGHBOURS]
        await asyncio.sleep((time.perf_counter() - begin) * (1 / SHARE - 1))
    return best
