"""Adaptive K: how it follows entropy, and whether a fixed K serves any group of users better."""

from __future__ import annotations

from typing import Any

import numpy as np

from model.dataset import Dataset
from model.evaluation import FIXED_COLLECTIVE_K, FIXED_K, Asked, ask_test, both_scopes, fixed_collective, fixed_own
from model.fusion_training import memory_ranks
from model.metrics import ndcg, relative_gain
from model.recommender import Recommender
from model.replay import adaptive, trajectory

QUINTILES = 5


def study(recommenders: list[Recommender], dataset: Dataset) -> dict[str, Any]:
    """Per scope: NDCG@10 (masked, store train) of every fixed K and of adaptive K, over all and per entropy quintile,
    the mean adaptive K, and adaptive K's gain over the best fixed one.
    """
    parts = [_one(recommender, dataset) for recommender in recommenders]
    curves = [part["curve"] for part in parts]
    report: dict[str, Any] = {"curve": {key: curves[0][key] for key in curves[0]}}
    for scope, fixed in (("own", FIXED_K), ("collective", FIXED_COLLECTIVE_K)):
        names = [*(str(k) for k in fixed), "adaptive"]
        gains = {name: np.mean([part[scope][name] for part in parts], axis=0) for name in names}
        quintile = parts[0]["quintile"]
        best = max(names[:-1], key=lambda name: float(gains[name].mean()))
        report[scope] = {
            "ndcg@10": {name: float(gain.mean()) for name, gain in gains.items()},
            "by_entropy_quintile": {
                name: [float(gain[quintile == q].mean()) for q in range(QUINTILES)] for name, gain in gains.items()
            },
            "mean_k": float(np.mean([part["mean_k"][scope] for part in parts])),
            "best_fixed": best,
            "over_best_fixed": relative_gain(gains["adaptive"], gains[best]),
        }
    return report


def _one(recommender: Recommender, dataset: Dataset) -> dict[str, Any]:
    asked = ask_test(recommender, dataset, "train", trajectory(dataset, recommender.encoder))
    chosen = adaptive(asked.questions)
    order = np.argsort(np.argsort(chosen.entropy, kind="stable"))
    whole = _ndcg(recommender, dataset, asked, both_scopes)
    sample = np.random.default_rng(0).permutation(len(chosen.k))[:400]
    return {
        "own": {**{str(k): _ndcg(recommender, dataset, asked, fixed_own(k)) for k in FIXED_K}, "adaptive": whole},
        "collective": {
            **{str(k): _ndcg(recommender, dataset, asked, fixed_collective(k)) for k in FIXED_COLLECTIVE_K},
            "adaptive": whole,
        },
        "quintile": order * QUINTILES // len(order),
        "mean_k": {"own": float(chosen.k.mean()), "collective": float(chosen.collective_k.mean())},
        "curve": {
            "entropy": chosen.entropy[sample].round(4).tolist(),
            "bank_size": chosen.bank_size[sample].tolist(),
            "own_k": chosen.k[sample].tolist(),
            "collective_k": chosen.collective_k[sample].tolist(),
        },
    }


def _ndcg(recommender: Recommender, dataset: Dataset, asked: Asked, memories: Any) -> np.ndarray:
    questions = asked.questions
    return ndcg(memory_ranks(recommender.fusion, recommender.table, dataset, questions, memories(asked), masked=True))
