"""Computes the layout of a model's collective index (`memory.collective.layout`) from a fitted encoder and the log.

The layout says which lists to search after an item: those of the items that followed it in the log within `REACH`
places, and those of items with a similar embedding. Entries of users with the same last items are found there, as a
user who took X and then Y has an entry in the list of Y.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional

from model.config import Config
from model.data.dataset import Dataset, training_part
from model.memory.collective.layout import Layout
from model.memory.plane import Plane
from model.memory.rules import Ints, unit
from model.network.encoder import SequenceEncoder, encode_states
from model.training.replay import state_requests

NEIGHBOURS = 64
"""Neighbours kept of each item."""
REACH = 4
"""Places after an item at which others count as followers; each place counts half as much as the one before."""
FOLLOWING = 0.3
"""Weight of log(1 + FOLLOWED · count of followers) against the cosine of embeddings."""
FOLLOWED = 4.0
LENGTH_COUNTS = 0.05
"""Weight of log(popularity), which is subtracted because the list of a popular item is longer."""
ALIKE = 64
"""Items with the most similar embeddings that are considered for each item."""
FLAT_ITEMS = 50_000
"""Number of items up to which the nearest ones are found exactly."""
SAMPLE = 20_000
"""Keys that spans and the plane are computed from."""
SPAN = 2.5
"""Range of a code: this many standard deviations on either side of the mean."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Pairs of items: first, second, and a number for each pair; (n,) each."""


def layout_of(dataset: Dataset, encoder: SequenceEncoder, keys: NDArray[np.float32]) -> Layout:
    """The layout for a fitted encoder. keys (n, d): a sample of the keys of entries."""
    counts = np.bincount(dataset.items[training_part(dataset)], minlength=dataset.item_count + 1)
    near, nearness = neighbours(dataset, encoder, counts)
    middle, reach = keys.mean(axis=0), SPAN * keys.std(axis=0)
    span = np.stack([middle - reach, middle + reach]).astype(np.float32)
    return Layout(near, nearness, span, np.asarray(counts / counts.sum(), np.float32))


def sampled_keys(dataset: Dataset, encoder: SequenceEncoder, config: Config) -> NDArray[np.float32]:
    """Keys (n, d) of events drawn at random; no event is the first of its user."""
    rng, usable = np.random.default_rng([config.training.seed, 3]), np.flatnonzero(dataset.positions() > 0)
    events = np.sort(rng.choice(usable, min(SAMPLE, len(usable)), replace=False))
    return np.asarray(unit(encode_states(encoder, state_requests(dataset, events, dataset.item_count))), np.float32)


def plane_of(keys: NDArray[np.float32]) -> NDArray[np.float32]:
    """The plane on which memories are drawn, (3, d): origin and axes. keys (n, d)."""
    plane = Plane.through(keys)
    return np.concatenate([plane.origin[None], plane.axes.T]).astype(np.float32)


def neighbours(
    dataset: Dataset, encoder: SequenceEncoder, counts: Ints
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """`near` and `nearness` of a layout. counts (items + 1,): events of each item in training."""
    vectors = functional.normalize(encoder.item.weight.detach(), dim=1).cpu().numpy()
    alike, cosine = _alike(vectors)
    item = np.repeat(np.arange(len(vectors)), alike.shape[1])
    return best_neighbours(followers(dataset), (item, alike.ravel(), np.maximum(cosine.ravel(), 0.0)), counts)


def best_neighbours(following: Pairs, alike: Pairs, counts: Ints) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """`near` and `nearness` of a layout, from the counts of followers and the cosines of similar items."""
    (item, other, often), (similar, beside, cosine) = following, alike
    score = np.concatenate([FOLLOWING * np.log1p(FOLLOWED * often), cosine])
    return _best(np.concatenate([item, similar]), np.concatenate([other, beside]), score, counts)


def followers(dataset: Dataset) -> Pairs:
    """Pairs of items of which the second followed the first in training, and how often; closer places count more."""
    seen = np.zeros(len(dataset), bool)
    seen[training_part(dataset)] = True
    owner, items = dataset.owners(), dataset.items.astype(np.int64)
    pairs, weight = [], []
    for places in range(1, REACH + 1):
        first = np.flatnonzero((owner[:-places] == owner[places:]) & seen[:-places] & seen[places:])
        pairs.append(items[first] * (dataset.item_count + 1) + items[first + places])
        weight.append(np.full(len(first), 0.5 ** (places - 1)))
    different, where = np.unique(np.concatenate(pairs), return_inverse=True)
    before, after = np.divmod(different, dataset.item_count + 1)
    return before, after, np.bincount(where, np.concatenate(weight), len(different)).astype(np.float64)


def _alike(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The items of the nearest unit vectors and their cosines, (items + 1, n) each; row 0 is padding."""
    import faiss

    items, dim = len(vectors) - 1, vectors.shape[1]
    index: Any = faiss.IndexFlatIP(dim)
    if items > FLAT_ITEMS:
        index = faiss.IndexIVFFlat(index, dim, round(math.sqrt(items)), faiss.METRIC_INNER_PRODUCT)
        index.nprobe = 32
        index.train(vectors[1:])
    index.add(np.ascontiguousarray(vectors[1:]))
    cosine, found = index.search(np.ascontiguousarray(vectors), min(ALIKE, items))
    return np.where(found < 0, 0, found + 1), np.where(found < 0, 0.0, cosine).astype(np.float64)


def _best(
    item: NDArray[np.int64], other: NDArray[np.int64], score: NDArray[np.float64], counts: Ints
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """For each item the others with the highest scores (items + 1, NEIGHBOURS); scores of equal pairs are summed."""
    rows = len(counts)
    different, where = np.unique(item * rows + other, return_inverse=True)
    item, other = np.divmod(different, rows)
    total = np.bincount(where, score, len(different))
    worth = total - LENGTH_COUNTS * np.log(np.maximum(counts[other], 1))
    usable = (item > 0) & (other > 0) & (item != other) & (total > 0) & (counts[other] > 0)
    item, other, total, worth = (column[usable] for column in (item, other, total, worth))
    order = np.lexsort((other, -worth, item))
    item, other, total = item[order], other[order], total[order]
    place = np.arange(len(item)) - np.searchsorted(item, item)
    near, nearness = np.zeros((rows, NEIGHBOURS), np.int32), np.zeros((rows, NEIGHBOURS), np.float32)
    few = place < NEIGHBOURS
    near[item[few], place[few]], nearness[item[few], place[few]] = other[few], total[few]
    return near, nearness
