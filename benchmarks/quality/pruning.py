"""Does quality pruning pay? Banks of 10, 25 and 75 entries, forgetting by quality, first in first out, and at random.

On ML-100K (ratings, times) by the trained model's NDCG@10, and on a generated log of repeat consumption whose truth is
known: a few favourites are taken again and again between one-off items.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.quality.streams import trained
from model.config import Config, RulesConfig
from model.data.dataset import Dataset, Targets, split_of
from model.serving.recommender import Recommender
from model.training.evaluation import memory_space_of
from model.training.fusion_stage import memory_ranks
from model.training.metrics import ndcg, relative_gain, summary
from model.training.replay import MemorySpace, adaptive, collective, replay, trajectory

CAPACITIES = (10, 25, 75)
EVICTIONS = ("quality", "first-in", "random")
Part = Literal["validation", "test"]


def ranks_with(
    recommender: Recommender, dataset: Dataset, rules: RulesConfig, state: np.ndarray, part: Part
) -> np.ndarray:
    """Rank of each user's targets with banks kept by other rules than the model was trained with. Both scopes, masked
    where nobody repeats.
    """
    split = split_of(dataset)
    targets = Targets.of(getattr(split, part), getattr(split, f"{part}_end"))
    known = memory_space_of(recommender)
    space = MemorySpace(rules, known.clusters, known.layout)
    asked = collective(dataset, state, space, replay(dataset, state, space, targets).replay, "train")
    ranks = memory_ranks(recommender.fusion, recommender.table, dataset, asked, adaptive(asked))
    return ranks.unmasked if dataset.repeats() else ranks.masked


def evictions(
    recommenders: list[Recommender],
    dataset: Dataset,
    part: Part = "test",
    capacities: Sequence[int] = CAPACITIES,
) -> list[dict[str, Any]]:
    """One row for each capacity and eviction: metrics, and the gain of quality over it with its interval."""
    rows = []
    states = [trajectory(dataset, one.encoder) for one in recommenders]
    for capacity in capacities:
        found = {}
        for eviction in EVICTIONS:
            found[eviction] = [
                ranks_with(
                    one,
                    dataset,
                    one.config.rules.model_copy(update={"capacity": capacity, "eviction": eviction}),
                    state,
                    part,
                )
                for one, state in zip(recommenders, states, strict=True)
            ]
        quality = np.mean([ndcg(one) for one in found["quality"]], axis=0)
        for eviction, ranks in found.items():
            over = relative_gain(quality, np.mean([ndcg(one) for one in ranks], axis=0))
            figures = summary(np.concatenate(ranks))
            rows.append({"capacity": capacity, "eviction": eviction, **figures, "quality_over_it": over})
            print(f"  {capacity:3} {eviction:9} NDCG@10 {figures['ndcg@10']:.4f}", flush=True)
    return rows


def key_updates(recommenders: list[Recommender], dataset: Dataset, part: Part = "test") -> list[dict[str, Any]]:
    """EMA keys against the latest key of an item taken again."""
    states = [trajectory(dataset, one.encoder) for one in recommenders]
    rows, found = [], {}
    for update in ("ema", "latest"):
        found[update] = [
            ranks_with(one, dataset, one.config.rules.model_copy(update={"key_update": update}), state, part)
            for one, state in zip(recommenders, states, strict=True)
        ]
        rows.append({"key_update": update, **summary(np.concatenate(found[update]))})
    per_user = {name: np.mean([ndcg(one) for one in ranks], axis=0) for name, ranks in found.items()}
    rows[1]["latest_over_ema"] = relative_gain(per_user["latest"], per_user["ema"])
    return rows


def repeat_log(users: int = 1500, items: int = 1000, seed: int = 0) -> Dataset:
    """Repeat consumption with known truth: each user has 6 favourites, taken with Zipf-like shares in 45 % of the
    events, each in the company of its own genre; the rest are one-off items of it. 40 to 120 events, hours apart.
    """
    rng = np.random.default_rng(seed)
    genre = rng.integers(0, 20, items + 1)
    of_genre = [np.flatnonzero(genre[1:] == g) + 1 for g in range(20)]
    sequences, times = [], []
    for _ in range(users):
        length = int(rng.integers(40, 121))
        favourites = rng.choice(items, 6, replace=False) + 1
        share = 1 / np.arange(1, 7)
        mood, sequence = int(rng.integers(20)), []
        for _ in range(length):
            if rng.random() < 0.2:
                mood = int(rng.integers(20))
            if rng.random() < 0.45:
                likely = share * np.where(genre[favourites] == mood, 8.0, 1.0)
                item = int(rng.choice(favourites, p=likely / likely.sum()))
                mood = int(genre[item])
            else:
                item = int(rng.choice(of_genre[mood]))
            sequence.append(item)
        sequences.append(np.array(sequence, np.int32))
        times.append(np.cumsum(rng.exponential(8 * 3600, length)))
    lengths = np.array([len(one) for one in sequences])
    return Dataset(
        user_ids=tuple(f"u{n}" for n in range(users)),
        item_ids=tuple(f"i{n}" for n in range(1, items + 1)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=np.concatenate(sequences),
        times=np.concatenate(times),
        ratings=np.full(int(lengths.sum()), np.nan, np.float32),
        has_times=True,
        has_ratings=False,
    )


def repeat_study(folder: Path) -> dict[str, Any]:
    """Evictions and key updates on the repeat log, with a small model trained on it."""
    dataset = repeat_log()
    config = Config.model_validate(
        {
            "encoder": {"window": 20, "dropout": 0.2, "score": "cosine", "skip": True},
            "training": {"max_epochs": 6, "fusion_max_epochs": 6, "batch_tokens": 2048, "held_out_users": 0.15},
        }
    )
    recommender = trained(dataset, config, folder / "repeat-log")
    return {
        "evictions": evictions([recommender], dataset),
        "key_updates": key_updates([recommender], dataset),
        "repeats": float(np.mean(dataset.is_repeat()[_tests(dataset)])),
    }


def _tests(dataset: Dataset) -> np.ndarray:
    """Events that are to be found in the end."""
    split = split_of(dataset)
    return Targets.of(split.test, split.test_end).event
