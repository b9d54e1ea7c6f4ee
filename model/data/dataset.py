"""Turns interactions into sequences: indices, k-core filter, order, split, padding. No torch.

Item indices begin at 1 (0 is padding), user indices at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.config import DatasetConfig, Holdout
from model.data.interactions import DatasetError, Interactions, Metadata
from model.data.reading import read_interactions
from model.memory.rules import Bools, Floats, Ints


@dataclass(frozen=True)
class Dataset:
    """Filtered sequences of all users, one after another.

    offsets: (users + 1,) int64; the events of user u are `sequence(u)`, oldest first, ties in file order.
    items: (N,) int32; item i is `item_ids[i - 1]`.
    times: (N,) float64 s, or positions in the user's sequence if the log has no times; all events of a basket have the
        time of its first event.
    ratings: (N,) float32; NaN = none.
    metadata: attributes by item id, of items that the filter removed, too.
    holdout: what is kept from training, see `split_of`.
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
    holdout: Holdout = "leave-one-out"

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
        """Indices of a user's events in `items`, `times` and `ratings`."""
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def lengths(self) -> NDArray[np.int64]:
        """(users,) the number of events of each user."""
        return np.diff(self.offsets)

    def owners(self) -> NDArray[np.int64]:
        """(N,) the user of each event."""
        return np.repeat(np.arange(self.users), self.lengths())

    def history(self, event: Ints) -> list[Ints]:
        """For each event (indices into `items`) the items that its user had before."""
        first = self.offsets[np.searchsorted(self.offsets, event, side="right") - 1]
        return [self.items[start:stop] for start, stop in zip(first, event, strict=True)]

    def is_repeat(self) -> NDArray[np.bool_]:
        """(N,) bool: whether the user had the item of the event before."""
        pairs = self.owners() * (self.item_count + 1) + self.items
        repeated = np.ones(len(pairs), bool)
        repeated[np.unique(pairs, return_index=True)[1]] = False
        return repeated

    def repeats(self) -> bool:
        """Whether any user takes an item a second time."""
        return bool(self.is_repeat().any())

    def opens(self) -> NDArray[np.bool_]:
        """(N,) bool: whether the event is the first of its user at its time, as is the first of a basket."""
        first = np.ones(len(self), bool)
        first[1:] = self.times[1:] != self.times[:-1]
        first[self.offsets[:-1][self.lengths() > 0]] = True
        return first

    def basket_starts(self) -> NDArray[np.int64]:
        """(N,) the first event of the user at the time of each event: the first of its basket, or itself."""
        return np.maximum.accumulate(np.where(self.opens(), np.arange(len(self)), 0))

    def positions(self) -> NDArray[np.int64]:
        """(N,) the position of each event in its user's sequence, from 0."""
        return np.arange(len(self)) - self.offsets[self.owners()]


@dataclass(frozen=True)
class Split:
    """Which events train, validate and test: indices into `Dataset.items`, each (users,) int64.

    Training events of user u are `offsets[u]:train_end[u]`. The events `validation:validation_end` and `test:test_end`
    are predicted from the events before the first of them; −1 for users without such events.
    """

    train_end: NDArray[np.int64]
    validation: NDArray[np.int64]
    validation_end: NDArray[np.int64]
    test: NDArray[np.int64]
    test_end: NDArray[np.int64]


@dataclass(frozen=True)
class Targets:
    """Events to be predicted. event (T,): indices into `Dataset.items`, ascending. before (T,): the event that the
    question is asked before, which is the first of its basket, or the event itself.
    """

    event: NDArray[np.int64]
    before: NDArray[np.int64]

    @classmethod
    def of(cls, start: Ints, end: Ints) -> Targets:
        """All events from each start to its end, (users,) each, in order of the users; none if the start is −1."""
        has_events = start >= 0
        count = (end - start)[has_events]
        before = np.repeat(start[has_events], count)
        event = before + np.arange(len(before)) - np.repeat(np.cumsum(count) - count, count)
        return cls(event.astype(np.int64), before.astype(np.int64))

    def take(self, rows: Ints | Bools | slice) -> Targets:
        """Some of the targets."""
        return Targets(self.event[rows], self.before[rows])

    def __len__(self) -> int:
        return len(self.event)


def read_dataset(path: str | Path, config: DatasetConfig | None = None) -> Dataset:
    """Read interactions in any of the formats, filter them to the k-core and sort those of each user by time. All
    events of a basket get the time of its first event, even if the filter removes that one.

    Raises:
        DatasetError: see `read_interactions`; or the filter leaves nothing.
    """
    config = config or DatasetConfig()
    log = read_interactions(path, config)
    keep = k_core(log.user, log.item, config.core)
    if not keep.any():
        size = f"{len(log):,} interactions of {len(log.user_ids):,} users with {len(log.item_ids):,} items"
        core = f"none is in the {config.core}-core (dataset.core = {config.core})"
        raise DatasetError(f"{path}: empty after filtering: of {size} {core}")
    return _arrange(log, keep, config.holdout)


def k_core(user: Ints, item: Ints, core: int) -> NDArray[np.bool_]:
    """Which interactions remain after users and items with fewer than `core` are removed, again and again.

    Args:
        user, item: (N,) indices ≥ 0. Repeated pairs count each time.

    Returns:
        (N,) bool: the largest part in which every user and every item has at least `core` interactions.

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


def split_of(dataset: Dataset) -> Split:
    """The split that `Dataset.holdout` names."""
    return leave_one_out(dataset) if dataset.holdout == "leave-one-out" else last_basket(dataset)


def training_part(dataset: Dataset) -> Bools:
    """(N,) bool: whether the event is used for training."""
    return np.arange(len(dataset)) < split_of(dataset).train_end[dataset.owners()]


def leave_one_out(dataset: Dataset) -> Split:
    """The split by which each user's last event tests and the one before validates; users with fewer than 3 events only
    train.
    """
    end = dataset.offsets[1:]
    enough = dataset.lengths() >= 3
    return _split(enough, end - 2, end - 1, end)


def last_basket(dataset: Dataset) -> Split:
    """The split by which each user's last basket (events of equal time) tests and the one before validates; users with
    fewer than 3 baskets only train.
    """
    first = np.flatnonzero(dataset.opens())
    count = np.bincount(dataset.owners()[first], minlength=dataset.users)
    end, last = dataset.offsets[1:], np.cumsum(count) - 1  # `last`: index in `first` of each user's last basket
    enough = count >= 3
    return _split(enough, first[np.maximum(last - 1, 0)], first[np.maximum(last, 0)], end)


def _split(enough: Bools, validation: Ints, test: Ints, end: Ints) -> Split:
    return Split(
        train_end=np.where(enough, validation, end),
        validation=np.where(enough, validation, -1),
        validation_end=np.where(enough, test, -1),
        test=np.where(enough, test, -1),
        test_end=np.where(enough, end, -1),
    )


def pad_windows(items: Ints, begin: Ints, length: Ints) -> NDArray[np.int64]:
    """Windows `items[begin:begin + length]` as one array (W, L), right-padded with 0; L is the longest length.

    >>> pad_windows(np.array([1, 2, 3, 4]), np.array([0, 3]), np.array([2, 1])).tolist()
    [[1, 2], [4, 0]]
    """
    columns = np.arange(int(length.max(initial=0)))
    inside = columns < length[:, None]
    padded = np.zeros(inside.shape, np.int64)
    padded[inside] = items[(begin[:, None] + columns)[inside]]
    return padded


def length_batches(length: Floats | Ints, tokens: int) -> list[NDArray[np.int64]]:
    """Batches of sequences of similar length (W,), as indices; at most `tokens` positions each, padding included.

    A fraction added to a length decides the order among equals only. A sequence longer than `tokens` has its own batch.

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


def _arrange(log: Interactions, keep: NDArray[np.bool_], holdout: Holdout) -> Dataset:
    user, user_ids = _renumber(log.user[keep], log.user_ids)
    item, item_ids = _renumber(log.item[keep], log.item_ids)
    own = np.arange(len(log), dtype=np.float64) if log.time is None else log.time
    time = _basket_times(log, own)[keep]
    order = np.lexsort((own[keep], time, user))  # stable: ties stay in file order
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))])
    ratings = np.full(len(user), np.nan, np.float32) if log.rating is None else log.rating[keep][order]
    arranged = Dataset(
        user_ids=user_ids,
        item_ids=item_ids,
        offsets=offsets.astype(np.int64),
        items=(item[order] + 1).astype(np.int32),
        times=time[order],
        ratings=ratings,
        has_times=log.time is not None,
        has_ratings=not bool(np.isnan(ratings).all()),
        metadata=log.metadata,
        holdout=holdout,
    )
    return arranged if log.time is not None else replace(arranged, times=_positions(arranged))


def _basket_times(log: Interactions, own: Floats) -> NDArray[np.float64]:
    """(N,) times of the interactions: `own` (N,), but those of a user's basket have the time of its first."""
    time = np.array(own, np.float64)
    if log.basket is not None:
        within = np.flatnonzero(log.basket >= 0)
        baskets = log.user[within] * len(log.basket_ids) + log.basket[within]
        names, place = np.unique(baskets, return_inverse=True)
        first = np.full(len(names), np.inf)
        np.minimum.at(first, place, own[within])
        time[within] = first[place]
    return time


def _positions(dataset: Dataset) -> NDArray[np.float64]:
    """(N,) positions in the sequences, in place of times; all events of a basket have that of its first event."""
    return dataset.positions()[dataset.basket_starts()].astype(np.float64)


def _renumber(codes: Ints, ids: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    kept = np.flatnonzero(np.bincount(codes, minlength=len(ids)))
    place = np.zeros(len(ids), np.int64)
    place[kept] = np.arange(len(kept))
    return place[codes], tuple(ids[code] for code in kept)
