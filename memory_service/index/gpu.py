"""Searching the own scope on a GPU copy of the index: the GPU holds inverted lists, but cannot change them.

The index on the CPU is the truth. Users whose banks have changed since the copy was made are answered from the CPU, in
the same batch, so that answers are always those of the CPU index. Once enough banks have changed, a new copy is made.
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
"""Share of changed lists above which a new copy is made."""
Copier = Callable[[Any], Any]
"""Makes a copy of a FAISS index that can be searched like the index."""


class GpuError(RamrecError):
    """The service cannot use a GPU; says why."""


def gpu_copier() -> Copier:
    """Makes copies on the first GPU.

    Raises:
        GpuError: this FAISS is built without GPU support, or there is no GPU.
    """
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise GpuError("--device cuda: this FAISS is built for the CPU; install ramrec[gpu] in place of ramrec[cpu]")
    if faiss.get_num_gpus() == 0:
        raise GpuError("--device cuda: no GPU is visible to this process")
    resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
    options.use_cuvs = False  # cuVS cannot search lists that the caller chooses

    def copied(index: Any) -> Any:
        return faiss.index_cpu_to_gpu(resources, 0, index, options)

    return copied


class GpuOwnIndex(OwnIndex):
    """An OwnIndex that searches the lists that have not changed on a copy made by `copier`."""

    def __init__(self, dim: int, slots: int, capacity: int, copier: Copier) -> None:
        super().__init__(dim, slots, capacity)
        self._index.quantizer.add(np.zeros((slots, dim), np.float32))  # a GPU needs a centroid for every list
        self._copier = copier
        self._copy: Any = None
        self._changed = np.zeros(slots, bool)

    def put(self, slots: Ints, keys: NDArray[np.float16], sizes: Ints, places: Ints | None = None) -> None:
        """See `OwnIndex.put`."""
        super().put(slots, keys, sizes, places)
        self._changed[slots] = True

    def drop(self, slots: Ints) -> None:
        """See `OwnIndex.drop`."""
        super().drop(slots)
        self._changed[slots] = True

    def search(self, slots: Ints, queries: Floats, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See `OwnIndex.search`."""
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
        self._copy = self._copier(self._index)
        self._changed[:] = False
