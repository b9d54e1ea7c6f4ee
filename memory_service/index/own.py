"""The own scope in FAISS: one inverted list per user.

It is an `IndexIVFScalarQuantizer` in fp16 with preassigned lists: the list number is the user's slot, the codes are the
bytes of the keys in the record. A search scans exactly one list, so it is exact. FAISS does not detect concurrent
changes: use an index from one thread only.
"""

from __future__ import annotations

import os
from typing import Any

# This must happen before FAISS is loaded: a forked child hangs if OpenMP runs two threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray

from model.memory.bank import KEY
from model.memory.rules import Floats, Ints


class OwnIndex:
    """Keys of users' banks, by slot (0 ≤ slot < slots); a list has at most `capacity` keys."""

    def __init__(self, dim: int, slots: int, capacity: int) -> None:
        self.dim, self.capacity = dim, capacity
        self._index: Any = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(dim), dim, slots, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.is_trained, self._index.nprobe = True, 1

    def put(self, slots: Ints, keys: NDArray[np.float16], sizes: Ints, places: Ints | None = None) -> None:
        """Replace the lists of slots.

        Args:
            slots: (B,).
            keys: (B, ≥ size, d) fp16.
            sizes: (B,) number of keys of each slot.
            places: (B, ≥ size) the number by which a search names each key; None: its rank.
        """
        lists = self._index.invlists
        ranks = np.broadcast_to(np.arange(keys.shape[1]), keys.shape[:2]) if places is None else places
        codes, ids = np.ascontiguousarray(keys, KEY), np.ascontiguousarray(ranks, np.int64)
        for slot, size, bank, names in zip(slots.tolist(), sizes.tolist(), codes, ids, strict=True):
            lists.resize(slot, 0)
            if size:
                lists.add_entries(slot, size, faiss.swig_ptr(names), faiss.swig_ptr(bank.view(np.uint8)))

    def drop(self, slots: Ints) -> None:
        """Empty the lists of slots."""
        for slot in slots.tolist():
            self._index.invlists.resize(slot, 0)

    def search(self, slots: Ints, queries: Floats, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k most similar keys of one list for each query, best first.

        Args:
            slots: (B,).
            queries: (B, d).

        Returns:
            Similarities and places, (B, k); place −1 if the list has fewer keys.
        """
        return self._search_in(self._index, slots, queries, k)

    def _search_in(
        self, index: Any, slots: Ints, queries: Floats, k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        lists = np.ascontiguousarray(slots, np.int64)[:, None]
        asked = np.ascontiguousarray(queries, np.float32)
        similarity, places = index.search_preassigned(asked, k, lists, np.zeros(lists.shape, np.float32))
        return similarity, places

    def similarities(self, slots: Ints, queries: Floats) -> NDArray[np.float32]:
        """Similarities (B, capacity) of all keys of each slot's list, by place; −inf where there is no key."""
        similarity, places = self.search(slots, queries, self.capacity)
        found = np.full((len(slots), self.capacity), -np.inf, np.float32)
        row, at = np.nonzero(places >= 0)
        found[row, places[row, at]] = similarity[row, at]
        return found
