"""From interactions to sequences: id maps, k-core filter, order, split, padding. No torch.

Items are counted from 1 (0 is padding), users from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.config import DatasetConfig
from model.interactions import DatasetError, Interactions, Metadata, read_interactions
from model.rules import Floats, Ints

__all__ = [
    "Dataset",
    "DatasetError",
    "Interactions",
    "Split",
    "k_core",
    "leave_one_out",
    "length_batches",
    "pad_windows",
    "read_dataset",
    "read_interactions",
]


@dataclass(frozen=True)
class Dataset:
    """Filtered sequences of all users, side by side.

    The events of user u are `sequence(u)`, oldest first, ties in file order. `offsets` (users + 1,) int64.
    `items` (N,) int32: item i is `item_ids[i - 1]`. `times` (N,) float64 seconds, or the position in the
    user's sequence where the source has none. `ratings` (N,) float32, NaN where there is none.
    `metadata`: item id → attributes, also of items that the filter removed.
    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    items: NDArray[np.int32]
    times: NDArray[np.float64]
    ratings: NDArray[np.float32]
    has_times: bool
    has_ratings: bool
    metadata: Metadata = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of interactions."""
        return len(self.items)

    @property
    def users(self) -> int:
        """Number of users."""
        return len(self.user_ids)

    @property
    def item_count(self) -> int:
        """Number of items; the largest item index."""
        return len(self.item_ids)

    def sequence(self, user: int) -> slice:
        """Where the events of a user are in `items`, `times` and `ratings`."""
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def lengths(self) -> NDArray[np.int64]:
        """Events of each user, (users,)."""
        return np.diff(self.offsets)

    def owners(self) -> NDArray[np.int64]:
        """User of each event, (N,)."""
        return np.repeat(np.arange(self.users), self.lengths())

    def history(self, event: Ints) -> list[Ints]:
        """Items that the user had before each event (indices into `items`)."""
        first = self.offsets[np.searchsorted(self.offsets, event, side="right") - 1]
        return [self.items[start:stop] for start, stop in zip(first, event, strict=True)]

    def repeats(self) -> bool:
        """Whether any user takes an item a second time."""
        pairs = self.owners() * (self.item_count + 1) + self.items
        return len(np.unique(pairs)) < len(pairs)

    def positions(self) -> NDArray[np.int64]:
        """Position of each event in its user's sequence, (N,)."""
        return np.arange(len(self)) - self.offsets[self.owners()]


@dataclass(frozen=True)
class Split:
    """Leave-one-out: absolute positions in `Dataset.items`, each (users,) int64.

    User u trains on `offsets[u]:train_end[u]`; `validation` and `test` are positions, −1 where there is none.
    """

    train_end: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def read_dataset(path: str | Path, config: DatasetConfig | None = None) -> Dataset:
    """Read interactions in any of the formats, filter them to the k-core and sort each user's by time.

    Raises:
        DatasetError: unreadable, or nothing left; see `read_interactions`.
    """
    config = config or DatasetConfig()
    log = read_interactions(path, config)
    keep = k_core(log.user, log.item, config.core)
    if not keep.any():
        size = f"{len(log):,} interactions of {len(log.user_ids):,} users with {len(log.item_ids):,} items"
        core = f"none is in the {config.core}-core (dataset.core = {config.core})"
        raise DatasetError(f"{path}: empty after filtering: of {size} {core}")
    return _arrange(log, keep)


def k_core(user: Ints, item: Ints, core: int) -> NDArray[np.bool_]:
    """Which interactions remain when users and items with fewer than `core` are removed until none is left.

    Args:
        user: (N,) numbers ≥ 0. item: (N,) the same. Repeated pairs count each time.

    Returns:
        (N,) the largest part in which every user and every item has at least `core` interactions.

    >>> k_core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1]), 2).tolist()
    [True, True, True, True, False]
    """
    keep = np.ones(len(user), dtype=bool)
    users, items = int(user.max(initial=0)) + 1, int(item.max(initial=0)) + 1
    while True:
        enough_users = np.bincount(user[keep], minlength=users) >= core
        enough_items = np.bincount(item[keep], minlength=items) >= core
        left = keep & enough_users[user] & enough_items[item]
        if left.sum() == keep.sum():
            return keep
        keep = left


def leave_one_out(dataset: Dataset) -> Split:
    """Each user's last event tests, the last but one validates; users with fewer than 3 events only train."""
    end = dataset.offsets[1:]
    enough = dataset.lengths() >= 3
    return Split(
        train_end=np.where(enough, end - 2, end),
        validation=np.where(enough, end - 2, -1),
        test=np.where(enough, end - 1, -1),
    )


def pad_windows(items: Ints, begin: Ints, length: Ints) -> NDArray[np.int64]:
    """Windows `items[begin:begin + length]` as one array (W, L), filled with 0 on the right; L is the longest one's.

    >>> pad_windows(np.array([1, 2, 3, 4]), np.array([0, 3]), np.array([2, 1])).tolist()
    [[1, 2], [4, 0]]
    """
    columns = np.arange(int(length.max(initial=0)))
    inside = columns < length[:, None]
    padded = np.zeros(inside.shape, np.int64)
    padded[inside] = items[(begin[:, None] + columns)[inside]]
    return padded


def length_batches(length: Floats | Ints, tokens: int) -> list[NDArray[np.int64]]:
    """Indices (W,) of sequences put together by similar length, at most `tokens` positions a batch once padded.

    A fraction added to a length only decides the order among equals. A sequence too long for any batch gets its own.

    >>> [batch.tolist() for batch in length_batches(np.array([3, 1, 2, 9]), 6)]
    [[1, 2], [0], [3]]
    """
    order = np.argsort(length, kind="stable")
    width = np.maximum(np.floor(length[order]).astype(np.int64), 1)
    edges = [0]
    for at in range(1, len(order)):
        if (at + 1 - edges[-1]) * width[at] > tokens:
            edges.append(at)
    return np.split(order, edges[1:]) if len(order) else []


def _arrange(log: Interactions, keep: NDArray[np.bool_]) -> Dataset:
    user, user_ids = _renumber(log.user[keep], log.user_ids)
    item, item_ids = _renumber(log.item[keep], log.item_ids)
    time = np.zeros(len(user)) if log.time is None else log.time[keep]
    order = np.lexsort((time, user))  # stable: ties stay in file order
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))])
    positions = np.arange(len(user)) - np.repeat(offsets[:-1], np.diff(offsets))
    ratings = np.full(len(user), np.nan, np.float32) if log.rating is None else log.rating[keep][order]
    return Dataset(
        user_ids=user_ids,
        item_ids=item_ids,
        offsets=offsets.astype(np.int64),
        items=(item[order] + 1).astype(np.int32),
        times=positions.astype(np.float64) if log.time is None else time[order],
        ratings=ratings,
        has_times=log.time is not None,
        has_ratings=not bool(np.isnan(ratings).all()),
        metadata=log.metadata,
    )


def _renumber(codes: Ints, ids: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    kept = np.flatnonzero(np.bincount(codes, minlength=len(ids)))
    place = np.zeros(len(ids), np.int64)
    place[kept] = np.arange(len(kept))
    return place[codes], tuple(ids[code] for code in kept)
