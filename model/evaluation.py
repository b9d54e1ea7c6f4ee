"""Evaluation: leave-one-out on test items, all items ranked, with and without memory.

Protocols: `unmasked` removes nothing from the ranking; `masked` removes the user's history less the target. Store
`train`: the banks hold the user's own earlier events (the validation item included), nobody's test item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.bank import Entries, Retrieved
from model.dataset import Dataset, leave_one_out
from model.errors import RamrecError
from model.fusion_training import memory_ranks
from model.metrics import summary
from model.recommender import Recommender
from model.replay import Replay, Replayed, adaptive, fixed, replay
from model.rules import unit

PROTOCOLS = {"unmasked": False, "masked": True}
FIXED_K = (5, 10, 20)


class EvaluationError(RamrecError):
    """The run and the dataset do not fit together; the message says how."""


@dataclass(frozen=True)
class Variant:
    """What the ranking may use: memories (None = no memory) and whether the learned repeat bias is added."""

    name: str
    memories: Callable[[Replayed, NDArray[np.int32], int], Retrieved]
    repeat_bias: bool = True


def _none(replayed: Replayed, clusters: NDArray[np.int32], seed: int) -> Retrieved:
    asked = replayed.replay.retrieved
    nothing = Entries.empty(len(asked.k))
    return Retrieved(asked.entropy, np.zeros_like(asked.k), asked.bank_size, nothing, nothing)


def _own(replayed: Replayed, clusters: NDArray[np.int32], seed: int) -> Retrieved:
    return adaptive(replayed.replay.retrieved, replayed.replay.rules)


def _fixed(k: int) -> Callable[[Replayed, NDArray[np.int32], int], Retrieved]:
    return lambda replayed, clusters, seed: fixed(replayed.replay.retrieved, k)


def _shuffled(replayed: Replayed, clusters: NDArray[np.int32], seed: int) -> Retrieved:
    """Each query asks the bank of another user, who had as many questions put to theirs: one each."""
    owner = np.flatnonzero(replayed.banks.size > 0)
    order = np.random.default_rng([seed, 5]).permutation(len(owner))
    stranger = np.empty_like(owner)
    stranger[order] = owner[np.roll(order, 1)]
    asked = replayed.replay
    return replayed.banks.retrieve(stranger[: len(asked.event)], unit(asked.state), clusters)


VARIANTS = (
    Variant("encoder", _none, repeat_bias=False),
    Variant("encoder+repeat-bias", _none),
    Variant("own", _own),
    Variant("own-no-repeat-bias", _own, repeat_bias=False),
    *(Variant(f"fixed-k-{k}", _fixed(k)) for k in FIXED_K),
    Variant("shuffled", _shuffled),
)


def evaluate(recommenders: Sequence[Recommender], dataset: Dataset, name: str) -> dict[str, Any]:
    """The report of one or several runs (seeds) on a dataset's test items; figures are means over the runs.

    Returns:
        {"rows": [{dataset, variant, protocol, store, seeds, hr@5, …, mrr}], "entropy": {mean, std,
        std_at_full_bank}, "k": {mean, distinct, distinct_at_full_bank, correlation_with_entropy_at_full_bank}}

    Raises:
        EvaluationError: a run was trained on other items.
    """
    reports = [_evaluate_one(recommender, dataset, name) for recommender in recommenders]
    rows = [_mean_row([report["rows"][n] for report in reports]) for n in range(len(reports[0]["rows"]))]
    spread = {
        part: {key: float(np.mean([report[part][key] for report in reports])) for key in reports[0][part]}
        for part in ("entropy", "k")
    }
    return {"rows": rows, **spread}


def ask_test(recommender: Recommender, dataset: Dataset) -> Replayed:
    """Every user's memory just before their test item."""
    if recommender.checkpoint.item_ids != dataset.item_ids:
        raise EvaluationError(
            f"the run knows {len(recommender.checkpoint.item_ids)} items, the dataset has {dataset.item_count}: "
            "evaluate on the dataset that the run was trained on"
        )
    split = leave_one_out(dataset)
    asked = np.arange(len(dataset)) == split.test[dataset.owners()]
    checkpoint = recommender.checkpoint
    return replay(dataset, recommender.encoder, checkpoint.config.rules, checkpoint.item_clusters, asked)


def _evaluate_one(recommender: Recommender, dataset: Dataset, name: str) -> dict[str, Any]:
    replayed = ask_test(recommender, dataset)
    clusters, seed = recommender.checkpoint.item_clusters, recommender.config.training.seed
    rows = []
    for variant in VARIANTS:
        memories = variant.memories(replayed, clusters, seed)
        for protocol, masked in PROTOCOLS.items():
            figures = summary_of(recommender, dataset, replayed.replay, memories, masked, variant.repeat_bias)
            label = {
                "dataset": name,
                "variant": variant.name,
                "protocol": protocol,
                "store": "train",
                "seeds": 1,
            }
            rows.append({**label, **figures})
    return {"rows": rows, **spread_of(replayed)}


def summary_of(
    recommender: Recommender,
    dataset: Dataset,
    asked: Replay,
    memories: Retrieved,
    masked: bool,
    repeat_bias: bool,
) -> dict[str, float]:
    """Metrics of one variant under one protocol."""
    found = memory_ranks(
        recommender.fusion,
        recommender.encoder,
        dataset,
        asked,
        masked=masked,
        retrieved=memories,
        repeat_bias=repeat_bias,
    )
    return summary(found)


def spread_of(replayed: Replayed) -> dict[str, dict[str, float]]:
    """How entropy and adaptive K differ between users: over all, and among the quarter with the fullest banks."""
    retrieved = replayed.replay.retrieved
    k = adaptive(retrieved, replayed.replay.rules).k
    full = retrieved.bank_size >= np.quantile(retrieved.bank_size, 0.75)
    entropy_full, k_full = retrieved.entropy[full], k[full]
    varied = np.std(k_full) > 0 and np.std(entropy_full) > 0
    return {
        "entropy": {
            "mean": float(retrieved.entropy.mean()),
            "std": float(retrieved.entropy.std()),
            "std_at_full_bank": float(entropy_full.std()),
        },
        "k": {
            "mean": float(k.mean()),
            "distinct": float(len(np.unique(k))),
            "distinct_at_full_bank": float(len(np.unique(k_full))),
            "correlation_with_entropy_at_full_bank": float(np.corrcoef(entropy_full, k_full)[0, 1]) if varied else 0.0,
        },
    }


def _mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    labels = {key: value for key, value in rows[0].items() if isinstance(value, str)}
    figures = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if "@" in key or key == "mrr"}
    return {**labels, "seeds": len(rows), **figures}
