"""A catalogue of a million items: what the item index finds of what scoring everything finds, and what a request costs.

The model is made up, because no dataset here has so many items: unit vectors around a few thousand centres of very
different sizes, an encoder and a fusion as they are drawn. Users stay near a centre or two. The same users' requests go
to `ramrec serve` with all items and with the first few thousand, one at a time; the difference is what the items cost.

    python -m benchmarks.serving.catalogue [--items 1000000] [--dim 64] [--table RUN]

`--table` takes the item vectors from a trained checkpoint, resampled with noise as large as its neighbours' distances.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.measures import Measure, measured, percentile, resident_bytes, store
from benchmarks.memory.banks import tables
from benchmarks.serving.deployment import Deployment, serving
from model.checkpoint import Checkpoint, save_checkpoint
from model.config import Config, EncoderConfig
from model.memory.record import EncodeJob
from model.memory.retrieval import Retrieved
from model.memory.rules import unit
from model.network.encoder import SequenceEncoder
from model.network.fusion import MemoryFusion
from model.serving.item_index import ItemTableIndex
from model.serving.recommender import NO_ITEMS, Query, Recommender
from model.training.optimisation import named_weights

RESULTS = Path(__file__).with_name("results.json")
CENTRES, SPREAD, TRAINED_DRAWN = 4000, 0.11, 1000
USERS, HISTORY, TOP_N = 200, 30, 100
SMALL, ROUNDS, WARM_UP = 3000, 5, 50


# ------------------------------------------------------------------------------------------------- the model


def made_up(items: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors around centres; the largest have thousands of items, most a handful."""
    centres = unit(rng.normal(size=(CENTRES, dim)))
    share = rng.pareto(1.5, CENTRES) + 0.1
    near = centres[rng.choice(CENTRES, items, p=share / share.sum())]
    return unit(near + SPREAD * rng.normal(size=(items, dim))).astype(np.float32)


def resampled(run: Path, items: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """A trained model's items in their `dim` main directions, again and again, as far apart as its nearest ten are."""
    table = Recommender.load(run).table.numpy()[1:]
    _, _, directions = np.linalg.svd(table - table.mean(axis=0), full_matrices=False)
    table = unit(table @ directions[:dim].T)
    drawn = rng.choice(len(table), TRAINED_DRAWN, replace=False)
    nearest = np.sort(table[drawn] @ table.T, axis=1)[:, -11:-1].mean()
    noise = np.sqrt((1 / nearest**2 - 1) / dim)
    return unit(table[rng.integers(0, len(table), items)] + noise * rng.normal(size=(items, dim))).astype(np.float32)


def checkpoint_of(table: np.ndarray) -> Checkpoint:
    """A model with these items and everything else as it is drawn."""
    config, items = Config(encoder=EncoderConfig(dim=table.shape[1], score="cosine", skip=True)), len(table)
    torch.manual_seed(0)
    encoder, fusion = SequenceEncoder(config.encoder, items), MemoryFusion(config.fusion, table.shape[1])
    with torch.no_grad():
        encoder.item.weight[1:] = torch.from_numpy(table)
    popularity = np.append(0, 1 / np.arange(1, items + 1))
    return Checkpoint(
        config=config,
        item_ids=tuple(f"item-{n}" for n in range(1, items + 1)),
        item_clusters=np.append(-1, np.arange(items) % config.rules.clusters).astype(np.int32),
        popularity=(popularity / popularity.sum()).astype(np.float32),
        weights=named_weights(encoder, "encoder.") | named_weights(fusion, "fusion."),
        **tables(items, config.encoder.width),
    )


def histories(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(USERS, HISTORY) items: each user's own are those nearest to a mixture of two items."""
    tastes = unit(table[rng.integers(0, len(table), (2, USERS))].sum(axis=0))
    nearest = np.argpartition(-(tastes @ table.T), 10 * HISTORY, axis=1)[:, : 10 * HISTORY]
    return 1 + rng.permuted(nearest, axis=1)[:, :HISTORY]


# ------------------------------------------------------------------------------------------------ in process


def answers(checkpoint: Checkpoint, users: np.ndarray, name: str) -> list[Measure]:
    """The same questions to the model with its index and to the one that scores all items."""
    quick = Recommender.of(checkpoint)
    exact = Recommender(checkpoint, quick.encoder, quick.fusion, exact_items=len(checkpoint.item_ids))
    jobs = [EncodeJob(0, items.astype("<u4"), NO_ITEMS) for items in users]
    queries = [Query(state, row, row, top_n=TOP_N) for row, (_, state) in zip(users, quick.encode(jobs), strict=True)]
    nothing = Retrieved.nothing(np.full(1, 0.5, np.float32))
    recall, errors = [], []
    for query in queries:
        found, wanted = (one.recommend([query], nothing, [False])[0] for one in (quick, exact))
        recall.append(len(np.intersect1d(found.items, wanted.items)) / TOP_N)
        errors.append(abs(float(found.scores[0] - wanted.scores[0])))
    begin, before = time.perf_counter(), resident_bytes()
    ItemTableIndex(quick.table.numpy())
    built_s, grown = time.perf_counter() - begin, resident_bytes() - before
    return [
        measured(f"{name}: top-{TOP_N} recall of scoring all", float(np.mean(recall)), "share", at_least=0.99),
        measured(f"{name}: error of log Z, mean", float(np.mean(errors)), "nats"),
        measured(f"{name}: error of log Z, 95 % below", float(np.quantile(errors, 0.95)), "nats"),
        measured(f"{name}: index built in", built_s, "s", at_most=60),
        measured(f"{name}: index, beside the table", grown / 2**20, "MiB"),
    ]


# ---------------------------------------------------------------------------------------------- through HTTP


class Asked:
    """A service of one catalogue, a connection to it, and the times of its answers in seconds."""

    def __init__(self, url: str, started_s: float) -> None:
        self.url, self.started_s = url, started_s
        self.seconds: list[float] = []
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer: dict[str, Any] = json.load(response)
        assert response.status == 200, answer
        return answer

    def tell(self, users: np.ndarray) -> None:
        """Everybody's history."""
        for user, items in enumerate(users):
            events = [{"user_id": f"user-{user}", "item_id": f"item-{item}"} for item in items]
            accepted = self.post("/memories", {"interactions": events})["accepted"]
            assert accepted == len(events), accepted

    def ask(self) -> None:
        """Every user's list, one after another, over a new connection: an idle one is closed by the service."""
        self._connection.close()
        for user in range(USERS):
            begin = time.perf_counter()
            answer = self.post("/recommend", {"user_id": f"user-{user}", "top_n": TOP_N})
            self.seconds.append(time.perf_counter() - begin)
            assert len(answer["items"]) == TOP_N, answer
            assert answer["source"] == "memory", answer


def requests(table: np.ndarray, users: np.ndarray, work: Path, name: str) -> list[Measure]:
    """One request at a time, to many items and to few by turns."""
    with ExitStack() as stack:
        few = started(stack, table[:SMALL], users % SMALL + 1, work / "few")
        many = started(stack, table, users, work / "many")
        for _ in range(ROUNDS):
            few.ask()
            many.ask()
        deployment = Deployment.at(many.url)
        resident = {"api": resident_bytes_of(deployment.api), "memory service": resident_bytes_of(deployment.memory)}
    low, high = (percentile(one.seconds[WARM_UP:], 50) for one in (few, many))
    return [
        measured(f"{name}: POST /recommend, top {TOP_N}, p50", high, "ms", reference=f"{SMALL:,} items", limit=low),
        measured(f"{name}: added to p50", high - low, "ms", at_most=5),
        measured(f"{name}: POST /recommend, top {TOP_N}, p99", percentile(many.seconds[WARM_UP:], 99), "ms"),
        measured(f"{name}: from the start to ready, first time", many.started_s, "s"),
        *(measured(f"{name}: {process} in RAM", size / 2**30, "GiB") for process, size in resident.items()),
    ]


def started(stack: ExitStack, table: np.ndarray, users: np.ndarray, work: Path) -> Asked:
    """`ramrec serve` of a model with these items, told everybody's history."""
    save_checkpoint(work / "run", checkpoint_of(table))
    begin = time.perf_counter()
    asked = Asked(stack.enter_context(serving(work / "run", work / "memories")), time.perf_counter() - begin)
    asked.tell(users)
    return asked


def resident_bytes_of(process: int) -> int:
    """Memory of another process that is in RAM."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    from api.commands.report import measured_with

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--table", type=Path, help="trained checkpoint whose items are resampled; default: made up")
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    torch.set_num_threads(1)
    shape = asked.items, asked.dim, rng
    table = resampled(asked.table, *shape) if asked.table else made_up(*shape)
    users = histories(table, rng)
    name = f"{asked.items:,} items of d {asked.dim}{f', resampled from {asked.table.name}' if asked.table else ''}"
    measures = answers(checkpoint_of(table), users, name)
    with TemporaryDirectory() as work:
        measures += requests(table, users, Path(work), name)
    command = f"python -m benchmarks.serving.catalogue --items {asked.items} --dim {asked.dim}"
    part = "catalogue" if asked.table is None else f"catalogue, {asked.table.name}"
    store(part, measures, measured_with() | {"command": command}, asked.json)


if __name__ == "__main__":
    main()
