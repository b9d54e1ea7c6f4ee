"""RAMRec's own index: faiss inverted lists as users, fp16 keys. Run with the project's Python."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

from benchmarks.memory.engines.harness import Floats, Ints, K, run
from memory_service.index.own import OwnIndex

USERS_A_PUT = 500


class Ours:
    """`OwnIndex` as the memory service uses it: a slot for each user, banks put whole, many users at a time."""

    about = "memory_service.index.own.OwnIndex, keys in fp16, batches of 1024"
    version = f"this checkout, faiss {faiss.__version__}"
    batch = 1024
    on_disk = False

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        self._dim = dim

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """A few hundred users at a time."""
        users, self._first, counts = np.unique(owners, return_index=True, return_counts=True)
        width = int(counts.max())
        self._index = OwnIndex(self._dim, len(users), width)
        for at in range(0, len(users), USERS_A_PUT):
            slots = np.arange(at, min(at + USERS_A_PUT, len(users)))
            banks = np.zeros((len(slots), width, self._dim), np.float16)
            there = np.arange(width) < counts[slots, None]
            banks[there] = keys[self._first[at] :][: there.sum()]
            self._index.put(slots, banks, counts[slots])

    def search(self, users: Ints, queries: Floats) -> Ints:
        """Places in each user's bank, made places among all keys."""
        _, places = self._index.search(users, queries, K)
        return np.where(places >= 0, self._first[users][:, None] + places, -1)

    def stored_bytes(self) -> int:
        """Nothing: this part of the service is in memory."""
        return 0

    def close(self) -> None:
        """Nothing was started."""


if __name__ == "__main__":
    run(Ours)
