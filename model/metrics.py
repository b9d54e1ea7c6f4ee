"""Ranking metrics over the whole catalogue. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.rules import Floats, Ints

CUTOFFS = (5, 10)


def ranks(scores: Floats, target: Ints) -> NDArray[np.int64]:
    """Rank of each row's target, 1 = best, ties counted against us: items scoring ≥ the target's, itself left out.

    Args:
        scores: (B, items + 1), −inf for items that cannot be recommended. target: (B,) item indices.
    """
    rows = np.arange(len(target))
    return np.asarray((scores >= scores[rows, target][:, None]).sum(axis=1), np.int64)


def summary(rank: Ints) -> dict[str, float]:
    """HR@k, NDCG@k and MRR of ranks (N,): means over N."""
    rank = np.asarray(rank)
    gain = 1.0 / np.log2(rank + 1.0)
    figures = {f"hr@{k}": float(np.mean(rank <= k)) for k in CUTOFFS}
    figures |= {f"ndcg@{k}": float(np.mean(np.where(rank <= k, gain, 0.0))) for k in CUTOFFS}
    figures["mrr"] = float(np.mean(1.0 / rank))
    return figures
