"""What others make of a user's last basket: popularity, the user's own frequency, and TIFU-KNN.

Everything before the last basket is known, all items are ranked, nothing is masked; ties are counted against whoever
ranks, as everywhere here. TIFU-KNN is written from its paper (Hu et al., SIGIR 2020): groups of baskets, each weighing
`group_decay` times the one after it, baskets in a group `basket_decay`; a user's vector is mixed with the mean of the
nearest users'. Its parameters are the paper's for TaFeng; the decay of the own frequency is chosen on validation
baskets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset, Targets, split_of, training_part
from model.training.metrics import basket_summary, ndcg, ranks

ROWS = 512
GROUP_BASKETS = 7
DECAYS = (0.9, 0.97, 0.99, 1.0)
TIFU = {"group_decay": 0.7, "basket_decay": 0.9, "neighbours": 300, "own_share": 0.7}


@dataclass(frozen=True)
class Asked:
    """Targets of one part of the split, and who they belong to: (T,) each."""

    targets: Targets
    owner: NDArray[np.int64]

    @classmethod
    def of(cls, dataset: Dataset, part: str) -> Asked:
        split = split_of(dataset)
        targets = Targets.of(getattr(split, part), getattr(split, f"{part}_end"))
        return cls(targets, dataset.owners()[targets.event])


def baselines(dataset: Dataset) -> dict[str, Any]:
    """Figures on test baskets of all of them, by name, with the parameters chosen on validation."""
    taken = popularity_vectors(dataset, Asked.of(dataset, "test"))
    found = {"popularity": figures(dataset, Asked.of(dataset, "test"), taken)}
    for name, grid, vectors in (
        ("own frequency", [{"decay": decay} for decay in DECAYS], frequency_vectors),
        ("TIFU-KNN", [TIFU], tifu_vectors),
    ):
        best = grid[0]
        if len(grid) > 1:
            best = max(grid, key=lambda one, vectors=vectors: _validated(dataset, vectors, one))
        asked = Asked.of(dataset, "test")
        found[name] = {**figures(dataset, asked, vectors(dataset, asked, **best)), "parameters": best}
        print(f"  {name}: {found[name]}", flush=True)
    return found


def _validated(dataset: Dataset, vectors: Any, parameters: dict[str, float]) -> float:
    asked = Asked.of(dataset, "validation")
    return figures(dataset, asked, vectors(dataset, asked, **parameters))["basket-ndcg@10"]


def figures(dataset: Dataset, asked: Asked, scores: NDArray[np.float32]) -> dict[str, float]:
    """Scores (users, items + 1) to figures; what is scored 0 comes after everything else, popular items first."""
    popular = popularity_vectors(dataset, asked)[:1]
    popular = popular * np.float32(1e-3 / popular.max())
    found = np.concatenate(
        [
            ranks(scores[owner] + popular, dataset.items[event])
            for owner, event in _chunks(asked.owner, asked.targets.event)
        ]
    )
    single = {"hr@10": float(np.mean(found <= 10)), "ndcg@10": float(np.mean(ndcg(found)))}
    return {**single, **basket_summary(found, asked.targets.before)}


def _chunks(*columns: NDArray[Any]) -> Iterator[list[NDArray[Any]]]:
    for at in range(0, len(columns[0]), ROWS):
        yield [one[at : at + ROWS] for one in columns]


def popularity_vectors(dataset: Dataset, asked: Asked) -> NDArray[np.float32]:
    """(users, items + 1): every item's share of the training events."""
    training = training_part(dataset)
    counts = np.bincount(dataset.items[training], minlength=dataset.item_count + 1) / training.sum()
    counts[0] = -np.inf
    return np.broadcast_to(counts.astype(np.float32), (dataset.users, len(counts)))


def _known(dataset: Dataset, asked: Asked) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Events before each user's question, and how many baskets later (0: the last one known) it is asked."""
    before = dataset.offsets[:-1].copy()
    before[asked.owner] = asked.targets.before
    event, owner = np.arange(len(dataset)), dataset.owners()
    events = event[event < before[owner]]
    basket = np.cumsum(dataset.opens())
    last = basket[np.maximum(before - 1, 0)]
    return events, (last[owner[events]] - basket[events]).astype(np.int64)


def frequency_vectors(dataset: Dataset, asked: Asked, decay: float) -> NDArray[np.float32]:
    """(users, items + 1): how often each user took each item, a basket weighing `decay` times the one after it."""
    events, age = _known(dataset, asked)
    return _summed(dataset, events, decay**age)


def tifu_vectors(
    dataset: Dataset, asked: Asked, group_decay: float, basket_decay: float, neighbours: float, own_share: float
) -> NDArray[np.float32]:
    """(users, items + 1) as TIFU-KNN predicts them."""
    events, age = _known(dataset, asked)
    count = np.zeros(dataset.users)
    np.maximum.at(count, dataset.owners()[events], age + 1)
    groups = np.ceil(np.maximum(count, 1) / GROUP_BASKETS)[dataset.owners()[events]]
    weight = group_decay ** (age // GROUP_BASKETS) * basket_decay ** (age % GROUP_BASKETS) / (groups * GROUP_BASKETS)
    own = _summed(dataset, events, weight)
    length = np.einsum("ui,ui->u", own, own)
    mixed = np.empty_like(own)
    for at in range(0, len(own), ROWS):
        rows = slice(at, at + ROWS)
        distance = length[None] - 2 * own[rows] @ own.T
        distance[np.arange(len(distance)), np.arange(at, at + len(distance))] = np.inf
        nearest = np.argpartition(distance, int(neighbours), axis=1)[:, : int(neighbours)]
        chosen = np.zeros_like(distance)
        np.put_along_axis(chosen, nearest, np.float32(1 / neighbours), axis=1)
        mixed[rows] = own_share * own[rows] + (1 - own_share) * (chosen @ own)
    return mixed


def _summed(dataset: Dataset, events: NDArray[np.int64], weight: NDArray[np.float64]) -> NDArray[np.float32]:
    width = dataset.item_count + 1
    flat = dataset.owners()[events] * width + dataset.items[events]
    return np.bincount(flat, weight, minlength=dataset.users * width).reshape(dataset.users, width).astype(np.float32)
