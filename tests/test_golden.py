"""Online = offline: the same events and checkpoint give the same scores over HTTP, Valkey and FAISS as in a replay."""

from itertools import pairwise

import httpx2
import numpy as np
import pytest

from model.checkpoint import save_checkpoint
from model.dataset import Dataset
from model.evaluation import memory_space_of
from model.recommender import Query, Recommender
from model.replay import adaptive, ask_others, filled, index_of, replay, trajectory
from tests.synthetic import random_checkpoint, random_memories, small_config

USERS, ITEMS = 50, 30
TOLERANCE = 1e-4


SHAPES = {"plain": {}, "sketch": {"score": "cosine", "skip": True, "sketch": 8}}


@pytest.fixture(scope="module", params=SHAPES)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    save_checkpoint(folder, random_checkpoint(small_config(SHAPES[request.param])))
    return folder


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Histories of 1 to 60 events (the window is 8, a bank holds 10), tied times, repeats, missing ratings. Each ends
    with one event more, which is only asked about.
    """
    rng = np.random.default_rng(7)
    length = np.append(rng.integers(1, 61, USERS - 2), [1, 60]) + 1
    offsets = np.concatenate([[0], np.cumsum(length)])
    count = int(offsets[-1])
    step = rng.choice([0.0, 3600.0, 86400.0], count)
    times = 1.5e9 + np.cumsum(step)
    ratings = rng.choice([1, 2, 3, 4, 5, np.nan], count).astype(np.float32)
    return Dataset(
        user_ids=tuple(f"user {n}" for n in range(USERS)),
        item_ids=tuple(f"i{n}" for n in range(1, ITEMS + 1)),
        offsets=offsets,
        items=_no_item_twice_at_once(rng.integers(1, ITEMS + 1, count), times),
        times=times,
        ratings=ratings,
        has_times=True,
        has_ratings=True,
    )


def _no_item_twice_at_once(items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The same item at the same second would be a duplicate online."""
    for n in range(1, len(items)):
        while items[n] in items[:n][times[:n] == times[n]]:
            items[n] = items[n] % ITEMS + 1
    return items.astype(np.int32)


@pytest.fixture(scope="module")
def offline(dataset, run) -> list[dict[str, float]]:
    """Score of every item for every user, from the replay."""
    recommender = Recommender.load(run)
    last = np.zeros(len(dataset), bool)
    last[dataset.offsets[1:] - 1] = True
    space = memory_space_of(recommender)
    state = trajectory(dataset, recommender.encoder)
    asked = replay(dataset, state, space, last).replay
    assert len(asked.event) == USERS
    others = index_of(filled(dataset, state, space, dataset.lengths() - 1), space)
    asked = ask_others(asked.take(np.argsort(asked.event)), np.arange(USERS), others)
    queries = [
        Query(
            asked.state[u], dataset.items[dataset.offsets[u] : dataset.offsets[u + 1] - 1].astype(np.int64), top_n=ITEMS
        )
        for u in range(USERS)
    ]
    ranked = recommender.recommend(queries, adaptive(asked), [False] * USERS)
    return [
        {dataset.item_ids[item - 1]: float(score) for item, score in zip(one.items, one.scores, strict=True)}
        for one in ranked
    ]


def _events(dataset: Dataset) -> list[dict]:
    events = []
    for user, name in enumerate(dataset.user_ids):
        for n in range(dataset.offsets[user], dataset.offsets[user + 1] - 1):
            event = {"user_id": name, "item_id": dataset.item_ids[dataset.items[n] - 1], "timestamp": dataset.times[n]}
            if not np.isnan(dataset.ratings[n]):
                event["rating"] = float(dataset.ratings[n])
            events.append(event)
    return events


@pytest.mark.parametrize("chunk", [1000, 37])
def test_online_scores_equal_offline_scores(dataset, offline, api_url, chunk):
    events = _events(dataset)
    with httpx2.Client(base_url=api_url) as client:
        for at in range(0, len(events), chunk):
            answer = client.post("/memories", json={"interactions": events[at : at + chunk]}).json()
            assert answer["accepted"] == len(events[at : at + chunk])
        asks = [{"user_id": name, "top_n": ITEMS, "exclude_seen": False} for name in dataset.user_ids]
        together = client.post("/recommend/batch", json={"requests": asks}).json()["results"]
        alone = [client.post("/recommend", json=ask).json() for ask in asks]
    for answers in (together, alone):
        for answer, expected in zip(answers, offline, strict=True):
            assert answer["source"] == "memory"
            assert answer["memory"]["collective"]["retrieved"] == answer["memory"]["collective"]["k"] > 0
            found = {item["item_id"]: item["score"] for item in answer["items"]}
            assert found.keys() == expected.keys()
            assert max(abs(found[item] - expected[item]) for item in found) < TOLERANCE
            in_order = [expected[item["item_id"]] for item in answer["items"]]
            assert all(after - before < 2 * TOLERANCE for before, after in pairwise(in_order))


def test_the_golden_checkpoint_lets_memories_matter(run):
    """Were the gate shut, the comparison above would prove little."""
    recommender = Recommender.load(run)
    state = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    memories = random_memories(20, 6, ITEMS, empty_row=False)
    prediction = recommender.predict(state, memories, [np.zeros(0, np.int64)] * 20)
    assert prediction.fused.gate.mean() > 0.05
