"""A dict of users, each with a `faiss.IndexFlatIP` of its own."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

from benchmarks.memory.engines.harness import Answers, Floats, Ints, K, run


class FaissFlat:
    """What one would write first with faiss: exact, fp32, one index per user."""

    about = "dict of faiss.IndexFlatIP, one per user, fp32; one search per query"
    version = f"faiss-cpu {faiss.__version__}"
    batch = 1
    on_disk = False

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self._dim = dim
        self._indexes: dict[int, faiss.IndexFlatIP] = {}
        self._first: dict[int, int] = {}

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """User by user."""
        users, firsts, counts = np.unique(owners, return_index=True, return_counts=True)
        for user, first, count in zip(users.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            index = self._indexes[user] = faiss.IndexFlatIP(self._dim)
            index.add(keys[first : first + count])
            self._first[user] = first

    def search(self, users: Ints, queries: Floats) -> Answers:
        """One index after another; an index knows its entries by their place."""
        found = np.empty((len(users), K), np.int64)
        for row, user in enumerate(users.tolist()):
            _, places = self._indexes[user].search(queries[row : row + 1], K)
            found[row] = places[0] + self._first[user]
        return found

    def stored_bytes(self) -> int:
        """Nothing: it is in memory."""
        return 0

    def close(self) -> None:
        """Nothing was started."""


if __name__ == "__main__":
    run(FaissFlat)
