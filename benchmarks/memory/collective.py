"""The collective index over ML-1M's million entries: what it finds of what exact search finds, and how fast.

Every interaction becomes an entry, keyed by the trained encoder's state before it; the index is the one that serves,
with centroids made as training makes them. Banks have 75 entries: who has more counts as several users. Asked with the
last states of users, one core, the entries of their last bank left out.

    python -m benchmarks.memory.collective --run RUN --dataset data/ml-1m.txt.gz
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np

from benchmarks.measures import Measure, measured, store
from benchmarks.memory.run import RESULTS
from model.bank import Banks
from model.collective import CollectiveIndex, cells
from model.config import RulesConfig, load_config
from model.dataset import Dataset, read_dataset
from model.recommender import Recommender
from model.replay import trajectory
from model.rules import unit
from model.training import collective_centroids

K, ASKERS, BATCH = 20, 2000, 64
BANKS_A_PUT = 500


def measure(run: Path, dataset_file: Path) -> list[Measure]:
    recommender = Recommender.load(run)
    dataset = read_dataset(dataset_file, load_config("ml-1m").dataset)
    keys = unit(trajectory(dataset, recommender.encoder)).astype(np.float16)
    begin = time.perf_counter()
    centroids = collective_centroids(dataset, recommender.encoder, recommender.config)
    print(f"{len(centroids)} lists in {time.perf_counter() - begin:.0f} s", flush=True)
    rules, bank = load_config("ml-1m").rules, banks_of(dataset)
    index = CollectiveIndex(centroids, rules.capacity, rules.collective_probes)
    begin = time.perf_counter()
    fill(index, dataset, keys, bank, rules, centroids)
    filled_s = time.perf_counter() - begin
    askers = np.random.default_rng(0).choice(dataset.users, ASKERS, replace=False)
    queries = keys[dataset.offsets[askers + 1] - 1].astype(np.float32)
    last_bank = bank[dataset.offsets[askers + 1] - 1]
    found, seconds = asked(index, queries, last_bank)
    recall = found_of(exact(dataset, keys, bank, queries, last_bank), found)
    name = f"collective index, ML-1M, {len(index):,} entries, {len(centroids)} lists, {rules.collective_probes} probed"
    return [
        measured(f"{name}: recall@{K} against exact search", recall, "share", at_least=0.95),
        measured(f"{name}: time of a query, batches of {BATCH}", seconds / ASKERS * 1e6, "µs", at_most=150),
        measured(f"{name}: filled", len(index) / filled_s, "entries/s"),
    ]


def banks_of(dataset: Dataset) -> np.ndarray:
    """(N,) the bank of each interaction: a user's first 75, the next 75, and so on."""
    owner, capacity = dataset.owners(), RulesConfig().capacity
    position = np.arange(len(dataset)) - dataset.offsets[owner]
    new = np.append(True, (np.diff(owner) > 0) | (position[1:] % capacity == 0))
    return np.cumsum(new) - 1


def fill(
    index: CollectiveIndex,
    dataset: Dataset,
    keys: np.ndarray,
    bank: np.ndarray,
    rules: RulesConfig,
    centroids: np.ndarray,
) -> None:
    """Every interaction as an entry of its bank."""
    starts = np.searchsorted(bank, np.arange(bank[-1] + 2))
    position = np.arange(len(dataset)) - dataset.offsets[dataset.owners()]
    for at in range(0, len(starts) - 1, BANKS_A_PUT):
        slots = np.arange(at, min(at + BANKS_A_PUT, len(starts) - 1))
        banks = Banks(len(slots), keys.shape[1], rules)
        for row, slot in enumerate(slots):
            events = np.arange(starts[slot], starts[slot + 1])
            banks.fields["item"][row, : len(events)] = dataset.items[events]
            banks.fields["cell"][row, : len(events)] = cells(keys[events], position[events], centroids)
            banks.key[row, : len(events)], banks.size[row] = keys[events], len(events)
        index.put(slots, banks)


def asked(index: CollectiveIndex, queries: np.ndarray, askers: np.ndarray) -> tuple[list[set[float]], float]:
    """Similarities found for each query, and the seconds that all took (median of three rounds)."""
    k, rounds = np.full(BATCH, K), []
    for _ in range(3):
        begin = time.perf_counter()
        answers = [
            index.search(queries[at : at + BATCH], askers[at : at + BATCH], k[: len(queries) - at])
            for at in range(0, len(queries), BATCH)
        ]
        rounds.append(time.perf_counter() - begin)
    found = [set(np.round(row, 5).tolist()) for answer in answers for row in answer.similarity]
    return found, float(np.median(rounds))


def exact(
    dataset: Dataset, keys: np.ndarray, bank: np.ndarray, queries: np.ndarray, askers: np.ndarray
) -> list[list[float]]:
    """The K largest similarities to entries of other banks (made before any item: left out, as in the index)."""
    shared = np.arange(len(keys)) > dataset.offsets[dataset.owners()]
    flat = faiss.IndexFlatIP(keys.shape[1])
    flat.add(np.ascontiguousarray(keys[shared], np.float32))
    similarity, at = flat.search(queries, RulesConfig().capacity + K)
    mine = bank[shared][at] == askers[:, None]
    return [row[~own][:K].tolist() for row, own in zip(similarity, mine, strict=True)]


def found_of(wanted: list[list[float]], found: list[set[float]]) -> float:
    """Recall: an entry counts as found where its similarity (to 5 decimals, give or take one) was."""
    near = [{round(one + step * 1e-5, 5) for one in row for step in (-1, 0, 1)} for row in found]
    hits = [sum(round(one, 5) in row for one in best) / K for best, row in zip(wanted, near, strict=True)]
    return float(np.mean(hits))


def main() -> None:
    from api.cli import measured_with

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="checkpoint folder of ML-1M")
    parser.add_argument("--dataset", type=Path, required=True)
    asked = parser.parse_args()
    command = "python -m benchmarks.memory.collective --run RUN --dataset ml-1m.txt.gz"
    store("collective", measure(asked.run, asked.dataset), measured_with() | {"command": command}, RESULTS)


if __name__ == "__main__":
    main()
