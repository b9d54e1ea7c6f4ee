"""From interactions to sequences: id maps, k-core filter, order, split, padding. No torch.

Items are counted from 1 (0 is padding), users from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.config import DatasetConfig
from model.interactions import DatasetError, Interactions, Metadata, read_interactions

__all__ = [
    "Dataset",
    "DatasetError",
    "Interactions",
    "Split",
    "k_core",
    "leave_one_out",
    "pad",
    "read_dataset",
    "read_interactions",
]

Ints = NDArray[np.integer]


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


def pad(rows: Sequence[Ints], length: int | None = None) -> NDArray[np.int64]:
    """Sequences of different lengths as one array (B, L), filled with 0 on the right.

    Only the last `length` items of each are kept; without `length`, L is the longest row's.

    >>> pad([np.array([1, 2, 3]), np.array([4])], 2).tolist()
    [[2, 3], [4, 0]]
    """
    counts = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    width = int(counts.max(initial=0)) if length is None else length
    padded = np.zeros((len(rows), width), np.int64)
    if padded.size:
        filled = np.arange(width) < counts[:, None]
        padded[filled] = np.concatenate([row[max(len(row) - width, 0) :] for row in rows])
    return padded


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
