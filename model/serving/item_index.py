"""A FAISS index over the item table, for catalogues that are too large to score every item. No torch, no I/O.

It keeps every number of a randomly rotated row in 4 bits (`PQ{d}x4fs`). One pass over all codes finds the items that
are likely best (a million items of d 64: 32 MB, about a millisecond); the exact rows decide among them. The index has
no cells that a search could miss. It misses an item only where 4 bits are too coarse; more items are fetched to allow
for that.
"""

from __future__ import annotations

import os
from typing import Any

# Before faiss is loaded: with two OpenMP threads a forked child hangs, and the model has a single thread anyway.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray

from model.memory.rules import Floats, Ints

COMPLETE = 4
"""The best 1 / COMPLETE of the fetched items have no gaps: at 1M items their recall was above .999 on all tables tried.
"""
SAMPLED = 65_536
"""Items that stand for those not found when log Z is estimated."""
GATHERED = 8
"""A gathered row costs as much as this many consecutive rows."""
TRAINED_ON, ADDED = 100_000, 100_000
"""Items that the codes are trained on at most, and items added at once."""


class ItemTableIndex:
    """An index over an item table (items + 1, d) float32; row 0 is padding, which is never found."""

    def __init__(self, table: Floats) -> None:
        self.table = np.ascontiguousarray(table, np.float32)
        self.items = len(table) - 1
        rng = np.random.default_rng(0)
        self._codes = _coded(self.table, rng)
        self._sample = self.table[_drawn(self.items, SAMPLED, rng)]

    def nearest(self, queries: NDArray[np.float32], fetch: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Items (B, n) with large inner products, best first, and the exact products (B, n); n is `fetch`, at most the
        number of items. The first `complete(n)` of them are almost surely the best of all items. queries: (B, d).
        """
        found = self._found(np.ascontiguousarray(queries, np.float32), fetch)
        logits = np.stack([self.logits(query, items) for query, items in zip(queries, found, strict=True)])
        order = np.argsort(-logits, axis=1, kind="stable")
        return np.take_along_axis(found, order, 1), np.take_along_axis(logits, order, 1)

    def _found(self, queries: NDArray[np.float32], fetch: int) -> NDArray[np.int64]:
        if fetch >= self.items:
            return np.tile(np.arange(1, self.items + 1), (len(queries), 1))
        places: NDArray[np.int64] = self._codes.search(queries, fetch)[1]
        return places + 1

    def complete(self, fetched: int) -> int:
        """How many of the best of `fetched` items have no gaps."""
        return fetched if fetched >= self.items else max(1, fetched // COMPLETE)

    def logits(self, query: NDArray[np.float32], items: Ints) -> NDArray[np.float32]:
        """Exact inner products (n,) of a query (d,) with items (n,)."""
        many = len(items) * GATHERED > self.items
        return (self.table @ query)[items] if many else self.table[items] @ query

    def log_z(
        self, queries: NDArray[np.float32], best: NDArray[np.float32], lifted: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """log Σ exp over the logits of all items, (B,). queries (B, d); best (B, n): the products of `nearest`; lifted
        (B, n): the logits of these items.

        The best items count exactly; a fixed random sample stands for all others. The result is exact if the sample
        holds every item; at 1M items its standard deviation was .013 to .023.
        """
        complete = self.complete(best.shape[1])
        edge, lifted = best[:, complete - 1 : complete], lifted[:, :complete]
        rest = queries @ self._sample.T - edge
        others = rest <= 0
        each = (self.items - complete) / np.maximum(others.sum(axis=1), 1)
        tail = np.exp(np.minimum(rest, 0)).sum(axis=1, where=others) * each
        top = np.maximum(lifted.max(axis=1, keepdims=True), edge)
        head = np.exp(lifted - top).sum(axis=1)
        log_z: NDArray[np.float32] = top[:, 0] + np.log(head + tail * np.exp(edge - top)[:, 0])
        return log_z.astype(np.float32)


def _coded(table: NDArray[np.float32], rng: np.random.Generator) -> Any:
    """A FAISS index of the rows' codes. The rotation is random: FAISS uses one scale for all numbers of a query, so
    none of them should be much larger than the others.
    """
    items, dim = len(table) - 1, table.shape[1]
    index: Any = faiss.index_factory(dim, f"RR{dim},PQ{dim}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.train(table[_drawn(items, TRAINED_ON, rng)])
    for at in range(1, items + 1, ADDED):
        index.add(table[at : at + ADDED])
    return index


def _drawn(items: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` different items drawn at random, or all items, in ascending order."""
    return 1 + np.sort(rng.choice(items, min(count, items), replace=False))
