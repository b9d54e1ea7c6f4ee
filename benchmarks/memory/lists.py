"""What the collective index finds, how fast, in how many bytes, and what it gains: `lists.json` and `lists.md`.

Runs: recall of the index against exact search over whole keys, for questions of users before their test item, and what
memory gains in NDCG@10 with the index, with exact search and with samples of the entries: same encoder, same fusion.
Generated entries: the same recall and time at sizes that no log here has (`benchmarks.memory.generated`).

    python -m benchmarks.memory.lists --run beauty RUN DATASET --run sports RUN DATASET --generated DATASET 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.memory.generated import DIM, World, banks_of, last_of
from model.config import RulesConfig, load_config
from model.data.dataset import Dataset, read_dataset, split_of
from model.memory.bank import Banks
from model.memory.collective.index import CollectiveIndex, free_memory
from model.memory.retrieval import Entries
from model.memory.rules import unit
from model.serving.recommender import Recommender
from model.training.evaluation import Asked, ask_test, both_scopes, no_memory
from model.training.fusion_stage import memory_ranks
from model.training.metrics import ndcg
from model.training.replay import ask_others, filled, last_items, trajectory

FIGURES, PAGE = (Path(__file__).parent / name for name in ("lists.json", "lists.md"))
KS = (20, 40, 75)
QUESTIONS, BATCH, ROUNDS, PUT = 1000, 64, 3, 500
BUDGETS, BITS, SHARES = (2000, 4000, 8000), (4, 8), (1.0, 0.5, 0.25, 0.1)
GENERATED_QUESTIONS = 300
BLOCK = 256


# ------------------------------------------------------------------------------------------------------- runs


@dataclass
class Case:
    """A trained run, its log, and the queries of all users before their test item, on the `live` store."""

    name: str
    dataset: Dataset
    recommender: Recommender

    @classmethod
    def of(cls, name: str, run: Path, file: Path) -> Case:
        dataset = read_dataset(file, load_config(name).dataset)
        return cls(name, dataset, Recommender.load(run))

    @cached_property
    def state(self) -> np.ndarray:
        return trajectory(self.dataset, self.recommender.encoder)

    @cached_property
    def asked(self) -> Asked:
        return ask_test(self.recommender, self.dataset, "live", self.state)

    @cached_property
    def banks(self) -> Banks:
        split = split_of(self.dataset)
        lengths = np.maximum(split.train_end, split.validation_end) - self.dataset.offsets[:-1]
        return filled(self.dataset, self.state, self.asked.space, lengths)

    @cached_property
    def queries(self) -> np.ndarray:
        return np.asarray(unit(self.asked.questions.state), np.float32)

    @cached_property
    def last(self) -> np.ndarray:
        return last_items(self.dataset, self.asked.questions.before)

    @cached_property
    def askers(self) -> np.ndarray:
        return self.dataset.owners()[self.asked.questions.event]

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """User and slot of every entry that can be found."""
        return np.nonzero(self.banks.valid() & (self.banks.fields["cell"] >= 0))

    def rules(self, **changed: Any) -> RulesConfig:
        return self.recommender.config.rules.model_copy(update=changed)

    def index(self, rules: RulesConfig, share: float = 1.0) -> CollectiveIndex:
        limit = 0 if share == 1 else round(share * len(self.places[0]))
        index = CollectiveIndex(self.asked.space.layout, rules, limit)
        for at in range(0, len(self.banks), PUT):
            rows = np.arange(at, min(at + PUT, len(self.banks)))
            index.put(rows, self.banks.rows(rows))
        return index

    def nearest(self, rows: np.ndarray, k: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Exact search over whole keys, block by block: rows, similarities (n, k), and places (n, k)."""
        who, slot = self.places
        keys = torch.from_numpy(self.banks.key[who, slot].astype(np.float32))
        own = np.searchsorted(who, np.arange(self.dataset.users + 1))
        for some in np.array_split(rows, max(1, len(rows) // BLOCK)):
            similarity = torch.from_numpy(self.queries[some]) @ keys.T
            for n, user in enumerate(self.askers[some]):
                similarity[n, own[user] : own[user + 1]] = -torch.inf
            best = similarity.topk(k, dim=1)
            yield some, best.values.numpy(), best.indices.numpy()

    def gain(self, others: Entries | None) -> float:
        """Gain in NDCG@10 of memory over the calibrated encoder, in percent; others (N, K), None: no memory."""
        questions = self.asked.questions
        if others is not None:
            questions = replace(questions, retrieved=replace(questions.retrieved, collective=others))
        asked = replace(self.asked, replayed=replace(self.asked.replayed, replay=questions))
        base, found = (
            memory_ranks(
                self.recommender.fusion,
                self.recommender.table,
                self.dataset,
                asked.questions,
                memories(asked),
                repeats=repeats,
            ).unmasked
            for memories, repeats in ((no_memory, False), (both_scopes, True))
        )
        return float(100 * (ndcg(found).mean() / ndcg(base).mean() - 1))

    def gain_with(self, index: CollectiveIndex) -> float:
        found = ask_others(self.asked.questions, self.askers, self.last, index)
        return self.gain(found.retrieved.collective)

    def exact(self) -> Entries:
        """The entries that exact search over whole keys finds for every query."""
        who, slot = self.places
        every, k = self.banks.all_entries(), self.asked.space.rules.collective_k_max
        parts = [(values, places) for _, values, places in self.nearest(np.arange(len(self.queries)), k)]
        similarity, at = (np.concatenate(one) for one in zip(*parts, strict=True))
        columns = {name: getattr(every, name)[who[at], slot[at]] for name in Entries.COLUMNS}
        return Entries(**columns | {"similarity": similarity, "valid": np.isfinite(similarity)})


def of_run(case: Case) -> list[dict[str, Any]]:
    """Rows for one run: exact search, the index at several budgets and bits, and samples of the entries."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(case.queries), min(QUESTIONS, len(case.queries)), replace=False))
    nearest = np.concatenate([places for _, _, places in case.nearest(rows, max(KS))])
    about = {"dataset": case.name, "entries": len(case.places[0]), "width": case.queries.shape[1]}
    found = [{**about, "kind": "exact", "gain": case.gain(case.exact())}]
    for bits in BITS:
        for codes in BUDGETS:
            index = case.index(case.rules(collective_bits=bits, collective_codes=codes))
            figures = asked_of(index, case.queries[rows], case.last[rows], case.askers[rows])
            recall = recalls(index, case, rows, nearest)
            gain = case.gain_with(index)
            found.append({**about, "kind": "index", "bits": bits, "codes": codes, **figures, **recall, "gain": gain})
            print(found[-1], flush=True)
    for share in SHARES:
        index = case.index(case.rules(collective_bits=max(BITS)), share)
        found.append({**about, "kind": "sample", "share": share, "kept": len(index), "gain": case.gain_with(index)})
        print(found[-1], flush=True)
    return found


def recalls(index: CollectiveIndex, case: Case, rows: np.ndarray, nearest: np.ndarray) -> dict[str, float]:
    """Share of the nearest entries that the index finds, at each of KS."""
    who, slot = case.places
    keys = case.banks.key[who[nearest], slot[nearest]].astype(np.float32)
    coded = index.codec.rounded(keys.reshape(-1, keys.shape[2])).reshape(keys.shape)
    return recall_of(index, coded, case.queries[rows], case.last[rows], case.askers[rows])


# -------------------------------------------------------------------------------------------------- any index


def asked_of(index: CollectiveIndex, queries: np.ndarray, last: np.ndarray, askers: np.ndarray) -> dict[str, float]:
    """CPU of a query in batches (median of the rounds), entries looked at, bytes per entry."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for at in range(0, len(queries), BATCH):
            some = slice(at, at + BATCH)
            index.search(queries[some], last[some], askers[some], np.full(len(queries[some]), KS[0]))
        rounds.append((time.process_time() - begin) / len(queries))
    looked = [index.looked_at(last[at : at + BATCH]) for at in range(0, len(last), BATCH)]
    return {
        "us": float(np.median(rounds)) * 1e6,
        "looked_at": float(np.concatenate(looked).mean()),
        "bytes": float(index.entry_bytes),
    }


def recall_of(
    index: CollectiveIndex, coded: np.ndarray, queries: np.ndarray, last: np.ndarray, askers: np.ndarray
) -> dict[str, float]:
    """coded: (n, K, d) the nearest keys as the index stores them. A key counts as found if its similarity is."""
    found = [
        index.search(queries[at : at + BATCH], last[at : at + BATCH], askers[at : at + BATCH], _ks(queries[at:]))
        for at in range(0, len(queries), BATCH)
    ]
    wanted = np.einsum("nkd,nd->nk", coded, queries)
    given = np.concatenate([one.similarity for one in found])
    return {
        f"recall@{k}": float(np.mean([_shared(row[:k], have[:k]) for row, have in zip(wanted, given, strict=True)]))
        for k in KS
    }


def _ks(queries: np.ndarray) -> np.ndarray:
    return np.full(min(BATCH, len(queries)), max(KS))


def _shared(wanted: np.ndarray, given: np.ndarray) -> float:
    order = np.sort(given)
    at = np.clip(np.searchsorted(order, wanted - 2e-6), 0, len(order) - 1)
    return float((np.abs(order[at] - wanted) <= 4e-6).mean())


# ------------------------------------------------------------------------------------------- generated entries


def of_generated(dataset: Dataset, entries: int, bits: int) -> list[dict[str, Any]]:
    """Rows for this many generated entries."""
    world, rng = World.of(dataset), np.random.default_rng(5)
    items = world.sequences(GENERATED_QUESTIONS, rng)
    queries, last = world.keys(items, rng)[:, -1].astype(np.float32), last_of(items)
    before, index = _resident(), CollectiveIndex(world.layout, RulesConfig(collective_bits=bits))
    nearest, seconds, at = _Nearest(queries), 0.0, 0
    for some, keys in world.chunks(entries // (items.shape[1] - 1)):
        nearest.look_at(keys[:, 1:].reshape(-1, DIM))
        begin = time.perf_counter()
        for low in range(0, len(some), PUT):
            rows = slice(low, low + PUT)
            banks = banks_of(some[rows], keys[rows], RulesConfig(capacity=some.shape[1]))
            index.put(np.arange(at + low, at + low + len(banks)), banks)
        seconds, at = seconds + time.perf_counter() - begin, at + len(some)
    coded = index.codec.rounded(nearest.keys.reshape(-1, DIM)).reshape(nearest.keys.shape)
    about = {"kind": "generated", "entries": len(index), "bits": bits, "fill_us": seconds / len(index) * 1e6}
    del banks, some, keys
    index.compact()
    about["resident_bytes"] = (_resident() - before) / len(index)
    nobody, found = np.full(len(queries), -1), []
    for codes in BUDGETS:
        index.budget = codes
        figures = asked_of(index, queries, last, nobody) | recall_of(index, coded, queries, last, nobody)
        found.append({**about, "codes": codes, **figures})
        print(found[-1], flush=True)
    return found


class _Nearest:
    """Collects the keys (n, K, d) nearest to the queries, by exact search."""

    def __init__(self, queries: np.ndarray) -> None:
        self._queries = queries
        self._similarity = np.full((len(queries), max(KS)), -np.inf, np.float32)
        self.keys = np.zeros((len(queries), max(KS), queries.shape[1]), np.float32)

    def look_at(self, keys: np.ndarray) -> None:
        similarity = self._queries @ keys.astype(np.float32).T
        best = np.argpartition(-similarity, max(KS), axis=1)[:, : max(KS)]
        both = np.concatenate([self._similarity, np.take_along_axis(similarity, best, 1)], axis=1)
        order = np.argsort(-both, axis=1)[:, : max(KS)]
        every = np.concatenate([self.keys, keys[best].astype(np.float32)], axis=1)
        self._similarity = np.take_along_axis(both, order, 1)
        self.keys = np.take_along_axis(every, order[:, :, None], 1)


def _resident() -> int:
    """Bytes of memory in use, without freed memory."""
    free_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -------------------------------------------------------------------------------------------------------- page


def page(rows: list[dict[str, Any]]) -> str:
    """The text of `lists.md`."""
    runs, generated = [row for row in rows if "dataset" in row], [row for row in rows if row["kind"] == "generated"]
    exact = {row["dataset"]: row for row in runs if row["kind"] == "exact"}
    lines = [HEAD, *(_row(row) for row in runs if row["kind"] in ("exact", "index")), SAMPLES]
    for name in exact:
        shares = [row for row in runs if row["kind"] == "sample" and row["dataset"] == name]
        lines.append(f"| {name} | " + " | ".join(f"{row['gain']:+.2f} %" for row in shares) + " |")
    lines.append(LARGE)
    lines += [
        f"| {row['entries']:,} {_figures(row)} | {row['resident_bytes']:.0f} | {row['fill_us']:.1f} |"
        for row in generated
    ]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    if row["kind"] == "exact":
        return f"| {row['dataset']} | {row['entries']:,} | exact, whole keys | | | | | | {row['gain']:+.2f} % |"
    return f"| {row['dataset']} | {row['entries']:,} {_figures(row)} | {row['gain']:+.2f} % |"


def _figures(row: dict[str, Any]) -> str:
    recall = f"{row['recall@20']:.3f} | {row['recall@75']:.3f}"
    return (
        f"| {row['bits']}, {row['codes']:,} | {row['looked_at']:,.0f} | {recall} | {row['us']:.0f} | {row['bytes']:.0f}"
    )


HEAD = """# What the collective index finds

Made by `python -m benchmarks.memory.lists` (figures: `lists.json`), one core, batches of 64. Entries are filed in the
list of the item that their user took just before; a query asks the lists of its user's last five items and of the items
that tend to follow them, the most promising first, up to a budget of entries (`rules.collective_codes`), compared by
codes of 4 or 8 bits a dimension (`rules.collective_bits`). Recall: share of the nearest 20 and 75 entries of others by
whole keys (width 192), over 1,000 users' states before their test item. Gain: memory's in NDCG@10 over the calibrated
encoder, store `live`, unmasked, the same trained encoder and fusion (seed 0) throughout. Bytes are those in use for an
entry: code, FAISS' id, item, list, change mark, quality, recency, rating; lists and rows grow ahead of need, so about
half as much again may be set aside. µs: CPU of a query for 20.

| dataset | entries | bits, budget | looked at | recall@20 | recall@75 | µs | bytes | gain |
|---|---|---|---|---|---|---|---|---|"""
SAMPLES = """
## A sample of the entries

Gain with so many of the entries, which a hash of user and item chooses (8 bits).

| dataset | 100 % | 50 % | 25 % | 10 % |
|---|---|---|---|---|"""
LARGE = """
## Generated entries

Width 128, items as popular as Beauty's and following each other as there (`benchmarks.memory.generated`). Resident:
bytes an entry that the process grew by. Fill: µs an entry. µs: CPU of a
query for 20.

| entries | bits, budget | looked at | recall@20 | recall@75 | µs | bytes | resident | fill |
|---|---|---|---|---|---|---|---|---|"""


def keep(new: list[dict[str, Any]]) -> None:
    """Replace the rows of the same dataset, or of the same size and bits, and write the page again."""
    rows = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
    named = {_name(row) for row in new}
    rows = [row for row in rows if _name(row) not in named] + new
    FIGURES.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return ("generated", row["entries"], row["bits"]) if row["kind"] == "generated" else ("run", row["dataset"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=3, action="append", default=[], metavar=("CONFIG", "RUN", "DATASET"))
    parser.add_argument("--generated", nargs=2, action="append", default=[], metavar=("DATASET", "ENTRIES"))
    parser.add_argument("--bits", type=int, choices=BITS, action="append", help="of generated entries; both")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for config, run, file in asked.run:
        keep(of_run(Case.of(config, Path(run), Path(file))))
    for file, entries in asked.generated:
        for bits in asked.bits or BITS:
            keep(of_generated(read_dataset(Path(file), load_config("beauty").dataset), int(entries), bits))


if __name__ == "__main__":
    main()
