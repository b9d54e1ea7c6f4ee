"""The collective scope: all users' memories searchable at once, through FAISS. No torch, no I/O.

`IndexIVFScalarQuantizer` fp16; the lists are the cells of the checkpoint's centroids, kept with every entry, so nothing
is trained or assigned here. Changes are visible to the next search, and what is dropped is gone. Entries come out as
(item, similarity, weights) and never say whose they are. Evaluation and the memory service use this one class.
Not safe for changes beside a search (faiss returns garbage silently): callers keep to one thread.
"""

from __future__ import annotations

import os
from typing import Any

# Before faiss is loaded: two OpenMP threads hang a forked child. Training may have asked for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray

from model.bank import NOT_SHARED, Banks, Entries
from model.rules import Floats, Ints

STRIDE = 1024
"""Ids of a user: slot · STRIDE + place in the bank; the largest capacity is below it."""
FETCH_LIMIT = 2048
"""Most neighbours looked at for one query while its own entries and ties at the K-th place are resolved."""
COLUMNS = ("item", "quality", "recency", "rating")


def cells(keys: Floats, positions: Ints, centroids: Floats) -> NDArray[np.int32]:
    """Which list each key (n, d) belongs to; none for keys made before any item (position ≤ 0),
    which are alike for all users. (n,)
    """
    nearest = np.argmax(keys.astype(np.float32) @ centroids.T, axis=1)
    return np.where(np.asarray(positions) <= 0, NOT_SHARED, nearest).astype(np.int32)


class CollectiveIndex:
    """Entries of many users by slot (any small integer that the caller gives a user)."""

    def __init__(self, centroids: NDArray[np.float32], capacity: int, probes: int) -> None:
        lists, dim = centroids.shape
        self._quantizer = faiss.IndexFlatIP(dim)
        self._quantizer.add(np.ascontiguousarray(centroids, np.float32))
        self._index = faiss.IndexIVFScalarQuantizer(
            self._quantizer, dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.is_trained, self._index.nprobe = True, min(probes, lists)
        self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
        self._columns = {name: np.zeros((0, capacity), np.int64 if name == "item" else np.float32) for name in COLUMNS}
        self._shared = np.zeros((0, capacity), bool)

    def __len__(self) -> int:
        """Entries that can be found."""
        return int(self._index.ntotal)

    def put(self, slots: Ints, banks: Banks) -> None:
        """Make the banks' entries those of the slots, one row of `banks` each, replacing what was there."""
        slots = np.asarray(slots, np.int64)
        self.drop(slots)
        self._grow(int(slots.max(initial=-1)) + 1)
        entries, width = banks.everything(), self._shared.shape[1]
        for name in COLUMNS:
            self._columns[name][slots] = getattr(entries, name)[:, :width]
        cell = banks.fields["cell"][:, :width]
        shared = entries.valid[:, :width] & (cell != NOT_SHARED)
        self._shared[slots] = shared
        row, place = np.nonzero(shared)
        if len(row):
            keys = np.ascontiguousarray(banks.key[row, place], np.float32)
            ids = slots[row] * STRIDE + place
            lists = cell[row, place].astype(np.int64)
            self._index.add_core(len(row), *(faiss.swig_ptr(one) for one in (keys, ids, lists)))

    def drop(self, slots: Ints) -> None:
        """Remove all entries of the slots; unknown slots are fine."""
        slots = np.asarray(slots, np.int64)
        slots = slots[slots < len(self._shared)]
        row, place = np.nonzero(self._shared[slots])
        if len(row):
            ids = slots[row] * STRIDE + place
            self._index.remove_ids(faiss.IDSelectorArray(len(ids), faiss.swig_ptr(ids)))
        self._shared[slots] = False

    def search(self, queries: Floats, askers: Ints, k: Ints) -> Entries:
        """The k most similar entries of others for each query, best first; fewer only if there are fewer in the lists
        scanned. Similarities are compared to 6 decimals; ties go by item, then quality, so that no slot shows.

        Args:
            queries: (B, d) unit length. askers: (B,) slots whose own entries are left out, −1 = none. k: (B,).
        """
        queries = np.ascontiguousarray(queries, np.float32)
        wanted, askers = np.asarray(k, np.int64), np.asarray(askers, np.int64)
        width = int(wanted.max(initial=0))
        best = np.zeros((len(queries), width), np.float32)
        who = np.full((len(queries), width), -1, np.int64)
        pending, fetch = np.flatnonzero(wanted > 0), width + min(width, 32)
        while len(pending) and len(self):
            similarity, ids = self._index.search(queries[pending], fetch)
            ids[ids // STRIDE == askers[pending, None]] = -1
            settled = _settled(similarity, ids, wanted[pending]) | (fetch >= FETCH_LIMIT)
            rows = pending[settled]
            best[rows], who[rows] = self._best(similarity[settled], ids[settled], wanted[rows], width)
            pending, fetch = pending[~settled], fetch * 4
        return self._entries(best, who)

    def _best(
        self, similarity: NDArray[np.float32], ids: NDArray[np.int64], k: Ints, width: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The first k of each row, in order; the others are marked −1."""
        usable = ids >= 0
        at = (np.where(usable, ids // STRIDE, 0), np.where(usable, ids % STRIDE, 0))
        rounded = np.where(usable, -np.round(similarity.astype(np.float64), 6), np.inf)
        order = np.lexsort((-self._columns["quality"][at], self._columns["item"][at], rounded), axis=1)[:, :width]
        ids, similarity = np.take_along_axis(ids, order, 1), np.take_along_axis(similarity, order, 1)
        return similarity, np.where(np.arange(order.shape[1]) < k[:, None], ids, -1)

    def _entries(self, similarity: NDArray[np.float32], ids: NDArray[np.int64]) -> Entries:
        valid = ids >= 0
        if not len(self._shared):
            return Entries.empty(len(ids))
        at = (np.where(valid, ids // STRIDE, 0), np.where(valid, ids % STRIDE, 0))
        columns = {name: np.where(valid, self._columns[name][at], 0) for name in COLUMNS}
        return Entries(similarity=np.where(valid, similarity, 0).astype(np.float32), valid=valid, **columns)

    def _grow(self, slots: int) -> None:
        missing = slots - len(self._shared)
        if missing > 0:
            missing = max(missing, len(self._shared))  # doubling keeps growth cheap
            columns: dict[str, NDArray[Any]] = {**self._columns, "shared": self._shared}
            grown = {name: np.pad(values, ((0, missing), (0, 0))) for name, values in columns.items()}
            self._shared = grown.pop("shared")
            self._columns = grown


def _settled(similarity: NDArray[np.float32], ids: NDArray[np.int64], k: Ints) -> NDArray[np.bool_]:
    """(B,) whether the best k are surely among the fetched: the lists are exhausted, or what was fetched reaches below
    the k-th similarity, so that no tie was cut off.
    """
    exhausted = similarity[:, -1] < -1e30
    usable = ids >= 0
    nth = np.cumsum(usable, axis=1)
    kth = np.where(usable & (nth == k[:, None]), np.round(similarity.astype(np.float64), 6), -np.inf).max(axis=1)
    return np.asarray(exhausted | ((nth[:, -1] >= k) & (np.round(similarity[:, -1].astype(np.float64), 6) < kth)))
