"""How every engine is measured: the same data in, the same rounds, one report. Needs numpy and nothing else.

A module of an engine is run from the repository root, with the Python of its own virtual environment:

    OMP_NUM_THREADS=1 python -m benchmarks.memory.engines.NAME --data DIR --out JSON [--threads 1]

peers.py does that for all of them and writes DIR.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

K = 10
ROUNDS = 5
SHORTEST_S, LONGEST_S = 1.0, 20.0
"""A round repeats all queries until it takes about the first; an engine too slow for the second gets fewer queries."""
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "TOKIO_WORKER_THREADS",
    "LANCE_CPU_THREADS",
)
"""Read once, when a library is loaded: they must be set before the process starts."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Answers = Sequence[Sequence[int]] | Ints


@dataclass(frozen=True)
class Data:
    """Entry n belongs to user owners[n]. Entries are sorted by user, the best order for whoever reads from disk."""

    owners: Ints
    keys: Floats
    asked: Ints
    queries: Floats
    exact: Ints

    @classmethod
    def read(cls, folder: Path) -> Data:
        """What peers.py wrote."""
        return cls(**{name: np.load(folder / f"{name}.npy") for name in cls.__dataclass_fields__})

    def first(self, queries: int) -> Data:
        """The same with fewer queries."""
        return Data(self.owners, self.keys, self.asked[:queries], self.queries[:queries], self.exact[:queries])

    def write(self, folder: Path) -> None:
        """For the processes of the engines."""
        for name in self.__dataclass_fields__:
            np.save(folder / f"{name}.npy", getattr(self, name))


class Engine(Protocol):
    """What is measured. `batch`: queries of one call of `search`; 1 where the engine has no call for several users.

    `on_disk`: its size is what `stored_bytes` says, else the growth of the process's resident memory.
    """

    about: str
    version: str
    batch: int
    on_disk: bool

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """Everything at once, until it is stored, indexed and ready to be asked."""

    def search(self, users: Ints, queries: Floats) -> Answers:
        """Numbers of the K entries of users[n] that have the largest inner product with queries[n]."""

    def stored_bytes(self) -> int:
        """On disk, after a flush."""

    def close(self) -> None:
        """End what was started."""


def run(make: Callable[[Path, int, int], Engine]) -> None:
    """Command line of an engine. `make`: from an empty folder, the dimension and the number of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder that peers.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the report")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(asked.threads):
        parser.error(f"start it with OMP_NUM_THREADS={asked.threads} in the environment; libraries read it once")
    data = Data.read(asked.data)
    with (
        tempfile.TemporaryDirectory(prefix="ramrec-peer-") as folder,
        closing(make(Path(folder), data.keys.shape[1], asked.threads)) as engine,
    ):
        asked.out.write_text(json.dumps(measured(engine, data)) + "\n")


def measured(engine: Engine, data: Data) -> dict[str, Any]:
    """The report on one engine."""
    gc.collect()
    memory = resident_bytes()
    start = time.perf_counter()
    engine.ingest(data.owners, data.keys)
    ingested = time.perf_counter() - start
    gc.collect()
    size = engine.stored_bytes() if engine.on_disk else resident_bytes() - memory
    one_round(engine, data, engine.batch)
    seconds, batched = one_round(engine, data, engine.batch)
    data = data.first(len(batched))
    times = max(1, round(SHORTEST_S / sum(seconds)))
    rates = [rate(engine, data, times) for _ in range(ROUNDS)]
    singles, alone = one_round(engine, data, 1)
    return {
        "about": engine.about,
        "version": engine.version,
        "python": platform.python_version(),
        "batch": engine.batch,
        "queries": len(data.asked),
        "repeats_per_round": times,
        "ingest_entries_per_s": round(len(data.keys) / ingested),
        "queries_per_s": round(statistics.median(rates), 1),
        "rounds_queries_per_s": [round(one, 1) for one in rates],
        "p50_ms": round(float(np.percentile(singles, 50)) * 1e3, 4),
        "p99_ms": round(float(np.percentile(singles, 99)) * 1e3, 4),
        "bytes_per_entry": round(size / len(data.keys), 1),
        "bytes_are": "on disk" if engine.on_disk else "growth of resident memory",
        "recall_at_10": round(min(recall(batched, data.exact), recall(alone, data.exact)), 5),
        "short": max(short(batched), short(alone)),
    }


def rate(engine: Engine, data: Data, times: int) -> float:
    """Queries per second over all queries, `times` times."""
    return times * len(data.asked) / sum(sum(one_round(engine, data, engine.batch)[0]) for _ in range(times))


def one_round(engine: Engine, data: Data, batch: int) -> tuple[list[float], list[list[int]]]:
    """All queries once, or as many as LONGEST_S allows: seconds of each call, and the answers."""
    seconds: list[float] = []
    answers: list[list[int]] = []
    for first in range(0, len(data.asked), batch):
        users, queries = data.asked[first : first + batch], data.queries[first : first + batch]
        start = time.perf_counter()
        found = engine.search(users, queries)
        seconds.append(time.perf_counter() - start)
        answers += [[int(entry) for entry in row] for row in found]
        if sum(seconds) > LONGEST_S:
            break
    return seconds, answers


def short(answers: list[list[int]]) -> int:
    """How many queries got fewer than K entries."""
    return sum(len(set(row)) < K for row in answers)


def recall(answers: list[list[int]], exact: Ints) -> float:
    """Share of the exact K that was found, mean over queries."""
    return float(np.mean([len(set(row) & set(best)) / K for row, best in zip(answers, exact.tolist(), strict=False)]))


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def folder_bytes(folder: Path, without: str = "") -> int:
    """Blocks of all files below a folder, so that files reserved but not filled count as what they take.

    Args:
        without: name of a folder to leave out, for example a write-ahead log.
    """
    files = (file for file in folder.rglob("*") if file.is_file() and without not in file.parts)
    return sum(file.stat().st_blocks * 512 for file in files)
