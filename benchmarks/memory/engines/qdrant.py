"""Qdrant Edge: a Qdrant shard in this process, on disk."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import qdrant_edge as edge

from benchmarks.memory.engines.harness import Answers, Floats, Ints, K, folder_bytes, run

UPSERT = 10_000


class Qdrant:
    """One shard; the user is a payload field with an index marked as tenant, so that a user's points lie together."""

    about = (
        "EdgeShard, dot product, keyword index on the user with is_tenant, exact search, no HNSW graph, everything "
        "pinned in memory, optimized after ingest; query_batch with a filter per query; size without write-ahead log"
    )
    version = f"qdrant-edge-py {version('qdrant-edge-py')}"
    batch = 128
    on_disk = True

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        self._folder = folder / "shard"
        self._folder.mkdir()
        pinned = edge.Memory.Pinned
        config = edge.EdgeConfig(
            vectors=edge.EdgeVectorParams(size=dim, distance=edge.Distance.Dot, memory=pinned),
            hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10_000),
            optimizers=edge.EdgeOptimizersConfig(default_segment_number=1),
            max_search_threads=threads,
            payload_memory=pinned,
            id_tracker_memory=pinned,
        )
        self._shard = edge.EdgeShard.create(str(self._folder), config)
        self._exact = edge.SearchParams(exact=True)

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """The index on the field first: the documentation asks for that order."""
        schema = edge.KeywordIndexParams(is_tenant=True, memory=edge.Memory.Pinned)
        self._shard.update(edge.UpdateOperation.create_field_index("user", schema))
        for first in range(0, len(keys), UPSERT):
            vectors, users = keys[first : first + UPSERT].tolist(), owners[first : first + UPSERT].tolist()
            points = [
                edge.Point(first + n, vector, {"user": str(user)})
                for n, (vector, user) in enumerate(zip(vectors, users, strict=True))
            ]
            self._shard.update(edge.UpdateOperation.upsert_points(points))
        self._shard.optimize()
        self._shard.flush()

    def search(self, users: Ints, queries: Floats) -> Answers:
        """One call for all of them."""
        requests = [
            edge.QueryRequest(
                limit=K,
                query=edge.Query.Nearest(query),
                filter=edge.Filter(must=[edge.FieldCondition("user", match=edge.MatchValue(str(user)))]),
                params=self._exact,
            )
            for user, query in zip(users.tolist(), queries.tolist(), strict=True)
        ]
        answers = self._shard.query_batch(edge.QueryBatchRequest(requests))
        return [[point.id for point in points] for points in answers]

    def stored_bytes(self) -> int:
        """The shard's segments."""
        return folder_bytes(self._folder, without="wal")

    def close(self) -> None:
        """Release the files."""
        self._shard.close()


if __name__ == "__main__":
    run(Qdrant)
