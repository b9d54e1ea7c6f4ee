"""Chroma: a collection of its own for each user, in this process."""

from __future__ import annotations

import resource
from importlib.metadata import version
from pathlib import Path

import chromadb
import numpy as np
from chromadb.config import Settings

from benchmarks.memory.engines.harness import Answers, Floats, Ints, K, folder_bytes, run


class ChromaPerUser:
    """No filter: a user's collection is small, and searched whole."""

    about = (
        "PersistentClient, a collection per user, inner product, HNSW with ef_search 100, written to files at once "
        "(sync_threshold 50: graphs not yet written are lost when more are open than file handles allow); one query "
        "per call"
    )
    version = f"chromadb {version('chromadb')}"
    batch = 1
    on_disk = True

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        self._folder = folder / "chroma"
        self._client = _client(self._folder)
        self._graph = {
            "space": "ip",
            "ef_search": 100,
            "num_threads": threads,
            "batch_size": 50,
            "sync_threshold": 50,
        }

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """User by user."""
        users, firsts, counts = np.unique(owners, return_index=True, return_counts=True)
        self._collections = []
        for user, first, count in zip(users.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            collection = self._client.create_collection(
                f"user-{user}", configuration={"hnsw": self._graph}, embedding_function=None
            )
            ids = [str(entry) for entry in range(first, first + count)]
            collection.add(ids=ids, embeddings=keys[first : first + count])
            self._collections.append(collection)

    def search(self, users: Ints, queries: Floats) -> Answers:
        """One after another."""
        return [self._one(user, query) for user, query in zip(users.tolist(), queries, strict=True)]

    def _one(self, user: int, query: Floats) -> list[int]:
        found = self._collections[user].query(query_embeddings=query[None], n_results=K, include=["distances"])
        return [int(entry) for entry in found["ids"][0]]

    def stored_bytes(self) -> int:
        """SQLite's file and the graphs'."""
        return folder_bytes(self._folder)

    def close(self) -> None:
        """Nothing was started."""


def _client(folder: Path) -> chromadb.api.ClientAPI:
    """Chroma keeps a fifth of the allowed file handles as open graphs, five files each: leave some for the rest."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most * 4 // 5, most))
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return client


if __name__ == "__main__":
    run(ChromaPerUser)
