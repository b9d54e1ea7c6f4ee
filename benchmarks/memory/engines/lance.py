"""LanceDB: a table in columnar files, in this process.

One worker and one compute thread by the environment; its I/O threads stay as they are, since with LANCE_IO_THREADS=1
concurrent searches of 0.40 wait for each other for ever.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree

from benchmarks.memory.engines.harness import Answers, Floats, Ints, K, folder_bytes, run


class Lance:
    """One table, no vector index: a filtered search is exact. The asynchronous interface has less overhead here."""

    about = (
        "one table sorted by user, BTree index on the user, prefilter, flat search with the dot product; a query per "
        "call, because all vectors of a call share one filter, 16 calls under way at once"
    )
    version = f"lancedb {version('lancedb')}"
    batch = 16
    on_disk = True

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        self._folder, self._dim = folder / "lance", dim
        self._loop = asyncio.new_event_loop()

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """One arrow table, then the index."""
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(keys.ravel()), self._dim)
        rows = pa.table({"entry": np.arange(len(keys)), "user": owners, "key": vectors})
        self._loop.run_until_complete(self._store(rows))

    async def _store(self, rows: pa.Table) -> None:
        base = await lancedb.connect_async(self._folder)
        self._table = await base.create_table("entries", rows)
        await self._table.create_index("user", config=BTree())
        await self._table.optimize()

    def search(self, users: Ints, queries: Floats) -> Answers:
        """All at once."""
        return self._loop.run_until_complete(self._all(users, queries))

    async def _all(self, users: Ints, queries: Floats) -> list[list[int]]:
        return await asyncio.gather(*(self._one(user, query) for user, query in zip(users, queries, strict=True)))

    async def _one(self, user: int, query: Floats) -> list[int]:
        asked = self._table.query().nearest_to(query).column("key").distance_type("dot").bypass_vector_index()
        found = await asked.where(f"user = {user}").select(["entry", "_distance"]).limit(K).to_arrow()
        entries: list[int] = found["entry"].to_pylist()
        return entries

    def stored_bytes(self) -> int:
        """The table's files."""
        return folder_bytes(self._folder)

    def close(self) -> None:
        """End the event loop."""
        self._loop.close()


if __name__ == "__main__":
    run(Lance)
