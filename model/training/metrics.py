"""Ranking metrics over the whole catalogue. Pure numpy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model.memory.rules import Floats, Ints

CUTOFFS = (5, 10)
BASKET_CUTOFFS = (10, 20)
BOOTSTRAP_ROUNDS = 1000


def ranks(scores: Floats, target: Ints) -> NDArray[np.int64]:
    """Rank of each row's target, (B,), 1 = best: the number of items whose score is at least the target's, itself
    included. Ties thus count as better items.

    Args:
        scores: (B, items + 1), −inf for items that are not ranked. target: (B,) item indices.
    """
    rows = np.arange(len(target))
    return np.asarray((scores >= scores[rows, target][:, None]).sum(axis=1), np.int64)


def summary(rank: Ints) -> dict[str, float]:
    """HR@k, NDCG@k and MRR, means over ranks (N,)."""
    rank = np.asarray(rank)
    figures = {f"hr@{k}": float(np.mean(rank <= k)) for k in CUTOFFS}
    figures |= {f"ndcg@{k}": float(np.mean(ndcg(rank, k))) for k in CUTOFFS}
    figures["mrr"] = float(np.mean(1.0 / rank))
    return figures


def basket_summary(rank: Ints, basket: Ints) -> dict[str, float]:
    """Recall, NDCG and PHR (whether any item was hit) of whole baskets at 10 and 20, means over baskets, as defined in
    the next-basket literature.

    Args:
        rank: (N,) of each item of a basket among all items. basket: (N,) numbers, equal within a basket.

    >>> basket_summary(np.array([1, 30]), np.array([7, 7]))["basket-recall@10"]
    0.5
    """
    _, place, size = np.unique(basket, return_inverse=True, return_counts=True)
    ideal = np.cumsum(1 / np.log2(np.arange(2, BASKET_CUTOFFS[-1] + 2)))
    figures = {}
    for cutoff in BASKET_CUTOFFS:
        hits = np.bincount(place, np.asarray(rank) <= cutoff)
        gain = np.bincount(place, ndcg(rank, cutoff))
        figures[f"basket-recall@{cutoff}"] = float(np.mean(hits / size))
        figures[f"basket-ndcg@{cutoff}"] = float(np.mean(gain / ideal[np.minimum(size, cutoff) - 1]))
        figures[f"basket-phr@{cutoff}"] = float(np.mean(hits > 0))
    return figures


def ndcg(rank: Ints, cutoff: int = 10) -> NDArray[np.float64]:
    """NDCG@cutoff of each rank (N,): 1 / log2(1 + rank), 0 beyond the cutoff."""
    return np.where(np.asarray(rank) <= cutoff, 1.0 / np.log2(np.asarray(rank) + 1.0), 0.0)


@lru_cache(maxsize=1)
def _resamples(users: int) -> NDArray[np.float32]:
    """(rounds, users) how often each user is drawn. The seed is fixed: all comparisons use the same resamples."""
    drawn = np.random.default_rng(0).multinomial(users, np.full(users, 1 / users), size=BOOTSTRAP_ROUNDS)
    return drawn.astype(np.float32)


def relative_gain(with_it: Floats, without: Floats) -> dict[str, float]:
    """By how much the mean of `with_it` exceeds that of `without`, relative to it; figures (N,) of the same users.

    Returns:
        gain, and low and high, the 95 % interval of a paired bootstrap over users (fixed seed).
    """
    sums = _resamples(len(without)) @ np.stack([with_it, without], axis=1).astype(np.float32)
    ratios = sums[:, 0] / np.maximum(sums[:, 1], 1e-12) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    gain = float(np.mean(with_it) / max(float(np.mean(without)), 1e-12) - 1)
    return {"gain": gain, "low": float(low), "high": float(high)}
