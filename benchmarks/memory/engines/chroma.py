"""Chroma: a collection in SQLite and an HNSW graph, in this process."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import chromadb
from chromadb.config import Settings

from benchmarks.memory.engines.harness import Answers, Floats, Ints, K, folder_bytes, run


class Chroma:
    """One collection, the user as metadata."""

    about = (
        "PersistentClient, one collection, inner product, HNSW with ef_search 100, where={'user': u}; one query per "
        "call, because all vectors of a call share one filter"
    )
    version = f"chromadb {version('chromadb')}"
    batch = 1
    on_disk = True

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        self._folder = folder / "chroma"
        self._client = chromadb.PersistentClient(self._folder, settings=Settings(anonymized_telemetry=False))
        graph = {"space": "ip", "ef_search": 100, "num_threads": threads}
        self._collection = self._client.create_collection(
            "entries", configuration={"hnsw": graph}, embedding_function=None
        )

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """In the largest batches it takes."""
        step = self._client.get_max_batch_size()
        for first in range(0, len(keys), step):
            users = owners[first : first + step].tolist()
            self._collection.add(
                ids=[str(first + n) for n in range(len(users))],
                embeddings=keys[first : first + step],
                metadatas=[{"user": user} for user in users],
            )

    def search(self, users: Ints, queries: Floats) -> Answers:
        """One after another."""
        return [self._one(user, query) for user, query in zip(users.tolist(), queries, strict=True)]

    def _one(self, user: int, query: Floats) -> list[int]:
        found = self._collection.query(
            query_embeddings=query[None], n_results=K, where={"user": user}, include=["distances"]
        )
        return [int(entry) for entry in found["ids"][0]]

    def stored_bytes(self) -> int:
        """SQLite's file and the graph's."""
        return folder_bytes(self._folder)

    def close(self) -> None:
        """Nothing was started."""


if __name__ == "__main__":
    run(Chroma)
