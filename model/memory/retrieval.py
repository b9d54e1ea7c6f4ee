"""What memory answers to queries, and how the memories are chosen. Pure numpy, no state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory import habits
from model.memory.rules import Bools, Floats, Ints

TIE = 1.1e-6
"""Similarities that differ by more than this are not equal to 6 decimals."""


@dataclass(frozen=True)
class Entries:
    """Memories retrieved for B queries, best first, padded to K columns.

    item (B, K) int64, 0 = padding; similarity, quality, recency, rating (B, K) float32, rating in [0, 1]; valid (B, K)
    bool.
    """

    item: NDArray[np.int64]
    similarity: NDArray[np.float32]
    quality: NDArray[np.float32]
    recency: NDArray[np.float32]
    rating: NDArray[np.float32]
    valid: Bools

    COLUMNS = ("item", "similarity", "quality", "recency", "rating", "valid")

    @classmethod
    def empty(cls, rows: int, width: int = 0) -> Entries:
        """No memories for `rows` queries."""
        zeros = np.zeros((rows, width), np.float32)
        return cls(np.zeros((rows, width), np.int64), zeros, zeros, zeros, zeros, np.zeros((rows, width), bool))

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: Ints | Bools | slice) -> Entries:
        """The entries of some queries."""
        return Entries(*(getattr(self, name)[rows] for name in self.COLUMNS))

    def first(self, k: Ints | int) -> Entries:
        """Only the best k memories of each query; k is (B,) or one number."""
        limit = np.broadcast_to(np.asarray(k), (len(self),))
        width = int(min(self.item.shape[1], limit.max(initial=0)))
        cut = {name: getattr(self, name)[:, :width] for name in self.COLUMNS}
        cut["valid"] = cut["valid"] & (np.arange(width) < limit[:, None])
        return Entries(**cut)


@dataclass(frozen=True)
class Retrieved:
    """What memory answers to B queries.

    entropy (B,) float32; k (B,): K of the own scope; bank_size (B,); own, collective: the entries of both scopes;
    collective_k (B,). habits (B, K, F) float32: features of the own entries (`habits.features`). present (B, P) int64:
    items that the user takes at the very time of the request (a basket), 0 = padding. F and P are 0 for models that do
    not use them.
    """

    entropy: NDArray[np.float32]
    k: NDArray[np.int64]
    bank_size: NDArray[np.int64]
    own: Entries
    collective: Entries
    collective_k: NDArray[np.int64]
    habits: NDArray[np.float32]
    present: NDArray[np.int64]

    @classmethod
    def nothing(cls, entropy: NDArray[np.float32], bank_size: NDArray[np.int64] | None = None) -> Retrieved:
        """No memories for B users; entropy and bank_size (B,), bank_size 0 if None."""
        none, zero = Entries.empty(len(entropy)), np.zeros(len(entropy), np.int64)
        size = zero.copy() if bank_size is None else bank_size
        no_habits, no_items = np.zeros((len(entropy), 0, 0), np.float32), np.zeros((len(entropy), 0), np.int64)
        return cls(entropy, zero, size, none, none, zero.copy(), no_habits, no_items)

    def take(self, rows: Ints | Bools | slice) -> Retrieved:
        """The answers to some queries."""
        return Retrieved(
            self.entropy[rows],
            self.k[rows],
            self.bank_size[rows],
            self.own.take(rows),
            self.collective.take(rows),
            self.collective_k[rows],
            self.habits[rows],
            self.present[rows],
        )

    def first(self, k: NDArray[np.int64], collective_k: NDArray[np.int64]) -> Retrieved:
        """Only the best memories of each scope; k and collective_k (B,)."""
        own = self.own.first(k)
        return replace(
            self,
            k=k,
            own=own,
            collective=self.collective.first(collective_k),
            collective_k=collective_k,
            habits=self.habits[:, : own.item.shape[1]],
        )


def select(similarity: Floats, valid: Bools, time: Floats, k: Ints, threshold: float) -> tuple[Ints, Bools]:
    """Choose up to k memories of each row: those with the largest similarity (or activation) at or above the threshold.

    Similarities are compared to 6 decimals, so that two machines choose the same. Among equals the newer memory comes
    first, then the later slot.

    Args:
        similarity, valid, time: (B, C).
        k: (B,).

    Returns:
        slots (B, K) and valid (B, K), K = max(k), at most C. Invalid places hold slot 0.
    """
    width = int(min(similarity.shape[1], np.max(k, initial=0)))
    usable = valid & (similarity >= threshold)
    newest_first = np.argsort(np.where(valid, time, -np.inf), axis=1, kind="stable")[:, ::-1]
    rounded = np.where(usable, np.round(similarity.astype(np.float64), 6), -np.inf)
    order = np.argsort(-np.take_along_axis(rounded, newest_first, 1), axis=1, kind="stable")[:, :width]
    slots = np.take_along_axis(newest_first, order, 1)
    chosen = np.take_along_axis(usable, slots, 1) & (np.arange(width) < np.asarray(k)[:, None])
    return np.where(chosen, slots, 0), chosen


def select_own(
    similarity: Floats, features: NDArray[np.float32] | None, valid: Bools, time: Floats, k: Ints, rules: RulesConfig
) -> tuple[Ints, Bools]:
    """`select` for the own scope: by activation if the model has learned one and `features` (B, C, F) are given, else
    by similarity to the state.
    """
    if features is None or not rules.activation:
        return select(similarity, valid, time, k, rules.similarity_threshold)
    return select(habits.activation(features, similarity, rules), valid, time, k, -np.inf)


def tied_rows(similarity: NDArray[np.float32], valid: Bools) -> NDArray[np.int64]:
    """Rows with neighbours that are equal to 6 decimals: their order may differ from the order of `select`.

    similarity (B, K): best first. valid (B, K): which places hold a result.
    """
    close = (similarity[:, :-1] - similarity[:, 1:] < TIE) & valid[:, 1:]
    rows = np.flatnonzero(close.any(axis=1))  # few: only these are rounded
    rounded = np.round(similarity[rows].astype(np.float64), 6)
    equal = (rounded[:, :-1] == rounded[:, 1:]) & valid[rows, 1:]
    return np.asarray(rows[equal.any(axis=1)], np.int64)


def packed_items(items: Ints, chosen: Bools) -> NDArray[np.int64]:
    """The chosen items of each row (B, C) in their order, padded with 0 to the longest row: (B, P)."""
    width = int(chosen.sum(axis=1).max(initial=0))
    order = np.argsort(~chosen, axis=1, kind="stable")[:, :width]
    return np.where(np.take_along_axis(chosen, order, 1), np.take_along_axis(items, order, 1), 0).astype(np.int64)


def chosen_features(features: NDArray[np.float32] | None, slots: Ints, chosen: Bools) -> NDArray[np.float32]:
    """The features (B, K, F) of the chosen slots (B, K), out of those of all slots (B, C, F); F is 0 if None."""
    if features is None:
        return np.zeros((*slots.shape, 0), np.float32)
    return np.where(chosen[..., None], features[np.arange(len(slots))[:, None], slots], np.float32(0))
