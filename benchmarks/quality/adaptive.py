"""Adaptive K: how it follows entropy, and whether a fixed K serves any group of users better."""

from __future__ import annotations

from typing import Any

import numpy as np

from model.training.evaluation import FIXED_COLLECTIVE_K, FIXED_K, MEMORY, Tested
from model.training.metrics import ndcg, relative_gain

QUINTILES = 5
SAMPLE = 400


def study(tested: list[Tested]) -> dict[str, Any]:
    """Per scope: NDCG@10 (store train; masked, but where people repeat things) of every fixed K and of adaptive K,
    over all and per entropy quintile, the mean adaptive K, and its gain over the best fixed one. Means over seeds.
    """
    first = tested[0]
    quintile = np.argsort(np.argsort(first.entropy, kind="stable")) * QUINTILES // len(first.entropy)
    shown = np.random.default_rng(0).permutation(len(first.k))[:SAMPLE]
    columns = ("entropy", "bank_size", "k", "collective_k")
    report: dict[str, Any] = {"users": {name: getattr(first, name)[shown].round(4).tolist() for name in columns}}
    for scope, fixed, column in (("own", FIXED_K, "k"), ("collective", FIXED_COLLECTIVE_K, "collective_k")):
        gains = {str(k): _ndcg(tested, f"{scope}-k-{k}") for k in fixed} | {"adaptive": _ndcg(tested, MEMORY)}
        best = max((str(k) for k in fixed), key=lambda k, gains=gains: float(gains[k].mean()))
        report[scope] = {
            "ndcg@10": {name: float(gain.mean()) for name, gain in gains.items()},
            "by_entropy_quintile": {
                name: [float(gain[quintile == q].mean()) for q in range(QUINTILES)] for name, gain in gains.items()
            },
            "mean_k": float(np.mean([getattr(one, column).mean() for one in tested])),
            "best_fixed": best,
            "over_best_fixed": relative_gain(gains["adaptive"], gains[best]),
        }
    return report


def _ndcg(tested: list[Tested], variant: str) -> np.ndarray:
    """Of each user, mean over seeds."""
    protocol = "masked" if (variant, "masked", "train") in tested[0].ranks else "unmasked"
    return np.mean([ndcg(one.ranks[variant, protocol, "train"]) for one in tested], axis=0)
