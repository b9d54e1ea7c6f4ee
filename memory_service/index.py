"""FAISS over many banks: inverted lists as users.

`IndexIVFScalarQuantizer` fp16 with preassigned lists: list number = a user's slot, codes = the record's key bytes as
they are. Exact: a search scans exactly the one list it is told to.
Not safe for changes beside a search (faiss returns garbage silently): callers keep to one thread.
"""

from __future__ import annotations

import os
from typing import Any

# Before faiss is loaded: two OpenMP threads hang a forked child, and searches here are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray

from model.bank import KEY
from model.rules import Floats, Ints

BLOCK = 16_384
"""Lists an index has; more users get more indexes."""


class OwnIndex:
    """Keys of users' banks by slot. Slots are handed out by `claim` and reused after `drop`."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._blocks: list[faiss.IndexIVFScalarQuantizer] = []
        self._free: list[int] = []

    def claim(self) -> int:
        """A slot with an empty list."""
        if not self._free:
            first = len(self._blocks) * BLOCK
            self._blocks.append(_block(self.dim))
            self._free = list(range(first + BLOCK - 1, first - 1, -1))
        return self._free.pop()

    def put(self, slot: int, keys: NDArray[np.float16]) -> None:
        """Replace a list by keys (n, d) fp16; the n-th gets id n."""
        lists, number = self._list(slot)
        lists.resize(number, 0)
        if len(keys):
            codes = np.ascontiguousarray(keys, KEY).view(np.uint8)
            ids = np.arange(len(keys), dtype=np.int64)
            lists.add_entries(number, len(keys), faiss.swig_ptr(ids), faiss.swig_ptr(codes))

    def drop(self, slot: int) -> None:
        """Empty a list and take its slot back."""
        lists, number = self._list(slot)
        lists.resize(number, 0)
        self._free.append(slot)

    def search(self, slots: Ints, queries: Floats, width: int) -> NDArray[np.float32]:
        """Similarity of every key of each slot's list: (B, width) float32 by id, −inf where there is none.

        Args:
            slots: (B,). queries: (B, d). width: more than the largest id.
        """
        found = np.full((len(slots), width), -np.inf, np.float32)
        for block in np.unique(slots // BLOCK):
            rows = np.flatnonzero(slots // BLOCK == block)
            lists = (slots[rows] % BLOCK).astype(np.int64)[:, None]
            asked = np.ascontiguousarray(queries[rows], np.float32)
            similarity, ids = self._blocks[block].search_preassigned(asked, width, lists, np.zeros(lists.shape, "f4"))
            hit = ids >= 0
            found[np.broadcast_to(rows[:, None], ids.shape)[hit], ids[hit]] = similarity[hit]
        return found

    def _list(self, slot: int) -> tuple[Any, int]:
        return self._blocks[slot // BLOCK].invlists, slot % BLOCK


def _block(dim: int) -> faiss.IndexIVFScalarQuantizer:
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dim, BLOCK, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.is_trained, index.nprobe = True, 1
    return index
