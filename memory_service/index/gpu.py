"""Searching a copy of an index that stands elsewhere: on a GPU, which can hold lists but not change them.

The CPU index is the truth. What changed since the copy was made is answered from the CPU in the same batch, so answers
are those of the CPU index at any time; once enough has changed the copy is made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.index.own import OwnIndex
from model.errors import RamrecError
from model.memory.rules import Floats, Ints

RENEW = 0.05
"""Share of lists newer than the copy at which it is made anew."""
Replicate = Callable[[Any], Any]
"""Makes a copy of a FAISS index that is searched as the index itself is."""


class DeviceError(RamrecError):
    """The device asked for cannot be used; says why."""


def on_cuda() -> Replicate:
    """Copies on the first GPU.

    Raises:
        DeviceError: this FAISS knows no GPU, or there is none.
    """
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise DeviceError("--device cuda: this FAISS is built for the CPU; install ramrec[gpu] in place of ramrec[cpu]")
    if faiss.get_num_gpus() == 0:
        raise DeviceError("--device cuda: no GPU is visible to this process")
    resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
    options.use_cuvs = False  # the lists to scan are given, which cuVS does not do

    def replicate(index: Any) -> Any:
        return faiss.index_cpu_to_gpu(resources, 0, index, options)

    return replicate


class ReplicatedOwnIndex(OwnIndex):
    """An OwnIndex whose lists are searched on a copy where they have not changed since."""

    def __init__(self, dim: int, slots: int, capacity: int, replicate: Replicate) -> None:
        super().__init__(dim, slots, capacity)
        self._index.quantizer.add(np.zeros((slots, dim), np.float32))  # a GPU wants a row for every list
        self._replicate = replicate
        self._copy: Any = None
        self._changed = np.zeros(slots, bool)

    def put(self, slots: Ints, keys: NDArray[np.float16], sizes: Ints, places: Ints | None = None) -> None:
        """See OwnIndex."""
        super().put(slots, keys, sizes, places)
        self._changed[slots] = True

    def drop(self, slots: Ints) -> None:
        """See OwnIndex."""
        super().drop(slots)
        self._changed[slots] = True

    def search(self, slots: Ints, queries: Floats, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See OwnIndex."""
        if self._changed.mean() > RENEW or self._copy is None:
            self._renew()
        copied = ~self._changed[slots]
        similarity = np.full((len(slots), k), -np.inf, np.float32)
        places = np.full((len(slots), k), -1, np.int64)
        for rows, index in ((np.flatnonzero(copied), self._copy), (np.flatnonzero(~copied), self._index)):
            if len(rows):
                similarity[rows], places[rows] = self._search_in(index, np.asarray(slots)[rows], queries[rows], k)
        return similarity, places

    def _renew(self) -> None:
        self._index.ntotal = self._index.invlists.compute_ntotal()
        self._copy = self._replicate(self._index)
        self._changed[:] = False
