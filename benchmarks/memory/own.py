"""Own-scope retrieval in process, on one core, without Redis: speed, growth and memory.

The whole way is timed: user ids to slots, entropy, K, search, choice, and the features of the chosen entries. The limit
is what reading the same users' keys costs, in the order asked: copied in one numpy call (`take`), and one after another
(`max` over each bank's bytes, the cheapest look at every one of them).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from benchmarks.measures import Measure, measured, percentile, resident_bytes
from benchmarks.memory import banks as made
from memory_service.index.own import OwnIndex
from memory_service.index.residents import OwnQueries, Residents
from model.checkpoint import Checkpoint
from model.memory.habits import FEATURES
from model.memory.rules import unit

BATCH, K, ROUNDS = 1024, 10, 1000
POOL = 20_000
"""Distinct banks, shared by all users: the content of a bank does not affect speed."""
BANK_BYTES = made.ENTRIES * made.DIM * 2


def measure(sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)) -> list[Measure]:
    with TemporaryDirectory() as folder:
        checkpoint = made.checkpoint(Path(folder))
    found, rates, p50 = [], {}, {}
    for users in sizes:
        before = resident_bytes()
        residents = filled(checkpoint, users)
        taken = resident_bytes() - before
        ask = asker(residents, users)
        times = timed(ask)
        rates[users], p50[users] = BATCH / float(np.median(times)), percentile(times, 50)
        if users == 100_000:
            found += at_target(rates[users], residents, users)
        if users == sizes[-1]:
            found.append(forgotten(residents, users))
        print(f"{users:,} users: {rates[users]:,.0f} queries/s, {taken / 2**30:.2f} GiB", flush=True)
        del residents, ask
    found += by_habits(checkpoint)
    largest = sizes[-1]
    about = f"own scope, {largest:,} users resident"
    found.append(
        measured(
            f"{about}, batch {BATCH}", rates[largest], "queries/s",
            reference="the 100k figure", limit=rates[100_000], ratio_at_least=0.8,
        )
    )  # fmt: skip
    found.append(measured(f"{about}: all that retrieval needs", taken / 1e9, "GB"))
    found.append(measured(f"{about}: the index alone", apart(index_bytes, largest) / 1e9, "GB", at_most=12))
    found.append(
        measured(
            f"growth of the p50 of a batch from {sizes[0]:,} to {largest:,} users",
            p50[largest] / p50[sizes[0]], "times", at_most=1.5,
        )
    )  # fmt: skip
    return found


def at_target(rate: float, residents: Residents, users: int) -> list[Measure]:
    """The rate at 100,000 users against the target and against reading the same bytes."""
    name = f"own scope in process, batch {BATCH}, {users:,} users"
    keys = np.ones((users, BANK_BYTES // 4), np.int32)
    rng = np.random.default_rng(1)
    copied = BATCH / float(np.median(timed(lambda: keys.take(rng.integers(0, users, BATCH), axis=0))))
    looked = BATCH / float(np.median(timed(lambda: [keys[row].max() for row in rng.integers(0, users, BATCH)])))
    queries = unit(rng.standard_normal((BATCH, made.DIM), np.float32))
    slots = [rng.integers(1, users + 1, BATCH) for _ in range(ROUNDS + WARM)]
    searched = BATCH / float(np.median(timed(lambda: residents.index.search(slots.pop(), queries, K))))
    streaming = f"{name}: against reading the same banks"
    return [
        measured(name, rate, "queries/s", at_least=300_000),
        measured(
            f"{streaming} one by one", rate, "queries/s",
            reference="a numpy max over each bank", limit=looked, ratio_at_least=0.5,
        ),
        measured(
            f"{streaming} at once", rate, "queries/s",
            reference="all banks copied by one numpy take", limit=copied, ratio_at_least=0.5,
        ),
        measured(f"{name}: FAISS alone", searched, "queries/s", reference="one numpy take", limit=copied),
    ]  # fmt: skip


def by_habits(checkpoint: Checkpoint, users: int = POOL) -> list[Measure]:
    """Time of a request per user for a model that retrieves by habits, which looks at all entries."""
    weights = dict.fromkeys(FEATURES, 0.1) | {"similarity": 1.0}
    rules = checkpoint.config.rules.model_copy(update={"activation": weights})
    habitual = replace(checkpoint, config=checkpoint.config.model_copy(update={"rules": rules}))
    residents, found = filled(habitual, users), []
    for batch in (1, 16, 64):
        now = np.full(batch, made.START + made.HOUR * 2 * made.ENTRIES)
        taken = float(np.median(timed(asker(residents, users, batch, now))))
        found.append(measured(f"own scope by habits, batch {batch}, {users:,} users", taken / batch * 1e6, "µs a user"))
    return found


def filled(checkpoint: Checkpoint, users: int) -> Residents:
    residents = Residents(users, made.DIM, checkpoint.config.rules, checkpoint.version)
    clusters = checkpoint.item_clusters
    pool = [one for chunk in made.records(checkpoint, range(min(users, POOL))) for one in chunk]
    for at in range(0, users, made.CHUNK):
        names = [made.user(n) for n in range(at, min(at + made.CHUNK, users))]
        residents.put(names, pool[at % POOL : at % POOL + len(names)], clusters)
    return residents


def asker(
    residents: Residents, users: int, batch: int = BATCH, now: NDArray[np.float64] | None = None
) -> Callable[[], None]:
    """A function that asks about a batch of random users. now: (batch,) times of the requests."""
    rng, k = np.random.default_rng(0), np.full(batch, K)
    names = [made.user(n) for n in range(users)]

    def ask() -> None:
        asked = batches.pop()
        slots = residents.find(asked)
        residents.entropy[slots]
        residents.search(OwnQueries(slots, unit(residents.state[slots]), k, now))

    batches = [[names[n] for n in rng.integers(0, users, batch)] for _ in range(ROUNDS + WARM)]
    return ask


WARM = 20


def timed(work: Callable[[], object]) -> list[float]:
    """Seconds of each of ROUNDS calls, after a warm-up."""
    for _ in range(WARM):
        work()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def apart(work: Callable[[int], int], users: int) -> int:
    """Run in a process of its own, for clean memory figures."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (users,))


def index_bytes(users: int) -> int:
    """Bytes that the keys of this many users take in the index."""
    before = resident_bytes()
    index = OwnIndex(made.DIM, users, made.ENTRIES)
    keys = np.ones((made.CHUNK, made.ENTRIES, made.DIM), np.float16)
    for at in range(0, users, made.CHUNK):
        slots = np.arange(at, min(at + made.CHUNK, users))
        index.put(slots, keys, np.full(len(slots), made.ENTRIES))
    return resident_bytes() - before


def forgotten(residents: Residents, users: int) -> Measure:
    """Time to remove one resident (the part of forgetting a user that could grow with the number of residents)."""
    times = []
    for n in range(0, users, users // 100):
        begin = time.perf_counter()
        residents.drop([made.user(n)])
        times.append(time.perf_counter() - begin)
    return measured(f"forgetting a user among {users:,} resident, p99", percentile(times, 99), "ms", at_most=5)
