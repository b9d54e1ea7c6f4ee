"""Online = offline: the same events and checkpoint give the same scores over HTTP, Valkey and FAISS as in a replay."""

from dataclasses import replace
from itertools import pairwise

import httpx2
import numpy as np
import pytest

from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import save_checkpoint
from model.data.dataset import Dataset, Targets
from model.serving.recommender import Query, Recommender
from model.training.evaluation import memory_space_of
from model.training.replay import Replay, adaptive, ask_others, filled, index_of, last_items, replay, trajectory
from tests.conftest import served
from tests.synthetic import habitual_config, random_checkpoint, random_memories, small_config

USERS, ITEMS = 50, 30
TOLERANCE = 1e-4


SHAPES = {
    "plain": small_config(),
    "sketch": small_config({"score": "cosine", "skip": True, "sketch": 8}),
    "habits": habitual_config(longest_gap_s=20 * 86400.0),
}
TRAINED = "trained habits"


@pytest.fixture(scope="module", params=[*SHAPES, TRAINED])
def run(request, tmp_path_factory):
    if request.param == TRAINED:
        return request.getfixturevalue("habit_run")
    folder = tmp_path_factory.mktemp("golden")
    save_checkpoint(folder, random_checkpoint(SHAPES[request.param]))
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


SCOPES = (None, ["own"], ["collective"], [])


@pytest.fixture(scope="module")
def offline(dataset, run) -> list[list[dict[str, float]]]:
    """For each of SCOPES the score of every item for every user at the time of their last event, from the replay."""
    recommender = Recommender.load(run)
    asked, seen = last_questions(dataset, recommender)
    chosen = adaptive(asked)
    none = np.zeros(USERS, np.int64)
    queries = [Query(state, had.astype(np.int64), top_n=ITEMS) for state, had in zip(asked.state, seen, strict=True)]
    answers = []
    for scopes in (SCOPES[0] or ["own", "collective"], *SCOPES[1:]):
        own, others = (
            k if scope in scopes else none for scope, k in (("own", chosen.k), ("collective", chosen.collective_k))
        )
        ranked = recommender.recommend(queries, chosen.first(own, others), [False] * USERS)
        answers.append([dict(zip((f"i{n}" for n in one.items), one.scores.tolist(), strict=True)) for one in ranked])
    return answers


def last_questions(dataset: Dataset, recommender: Recommender) -> tuple[Replay, list[np.ndarray]]:
    """What follows in the end, asked of the memories of everybody's other events; and what each user had."""
    last, space = dataset.offsets[1:] - 1, memory_space_of(recommender)
    state = trajectory(dataset, recommender.encoder)
    asked = replay(dataset, state, space, Targets(last, last)).replay
    others = index_of(filled(dataset, state, space, dataset.lengths() - 1), space)
    return ask_others(asked, np.arange(dataset.users), last_items(dataset, last), others), dataset.history(last)


@pytest.fixture
def memory_url(valkey_url, run, tmp_path):
    """A memory service whose catalogue numbers items otherwise than the model: one of another order came before it."""
    before = replace(random_checkpoint(small_config()), item_ids=tuple(f"i{n}" for n in range(ITEMS, 0, -1)))
    save_checkpoint(tmp_path, before)
    with served(create_memory(MemorySettings(run=tmp_path, redis_url=valkey_url))):
        pass
    with served(create_memory(MemorySettings(run=run, redis_url=valkey_url))) as url:
        yield url


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
        last = zip(dataset.user_ids, dataset.times[dataset.offsets[1:] - 1].tolist(), strict=True)
        asks = [{"user_id": name, "top_n": ITEMS, "exclude_seen": False, "timestamp": time} for name, time in last]
        alone = [client.post("/recommend", json=ask).json() for ask in asks]
        together = [
            client.post("/recommend/batch", json={"requests": [ask | {"scopes": scopes} for ask in asks]}).json()
            for scopes in SCOPES
        ]
    for scopes, answers, wanted in (
        (None, alone, offline[0]),
        *zip(SCOPES, (one["results"] for one in together), offline, strict=True),
    ):
        for answer, expected in zip(answers, wanted, strict=True):
            assert answer["source"] == "memory"
            others = answer["memory"]["collective"]
            assert others["retrieved"] == others["k"]
            assert (others["k"] > 0) == (scopes is None or "collective" in scopes)
            found = {item["item_id"]: item["score"] for item in answer["items"]}
            assert found.keys() == expected.keys()
            assert max(abs(found[item] - expected[item]) for item in found) < TOLERANCE
            in_order = [expected[item["item_id"]] for item in answer["items"]]
            assert all(after - before < 2 * TOLERANCE for before, after in pairwise(in_order))


def test_the_golden_checkpoint_lets_memories_matter(run):
    """Were the gate shut and nothing said of habits, the comparison above would prove little."""
    recommender = Recommender.load(run)
    state = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    memories = random_memories(20, 6, ITEMS, empty_row=False)
    if not recommender.config.rules.activation:
        memories = replace(memories, habits=memories.habits[..., :0], present=memories.present[:, :0])
    prediction = recommender.predict(state, memories, [np.zeros(0, np.int64)] * 20)
    moved = (prediction.added.abs() > 0.05).float().mean()
    assert moved > 0.5 if recommender.config.rules.activation else prediction.fused.gate.mean() > 0.05


def test_what_was_learned_about_habits_is_answered_online_as_it_was_measured(habit_log, habit_run, habit_url):
    recommender, items = Recommender.load(habit_run), habit_log.item_ids
    assert recommender.config.fusion.repeats
    assert recommender.config.rules.activation
    asked, seen = last_questions(habit_log, recommender)
    expected = recommender.predict(asked.state, adaptive(asked), seen).scores().numpy()[:, 1:]
    events = _events(habit_log)
    with httpx2.Client(base_url=habit_url) as client:
        for at in range(0, len(events), 1000):
            client.post("/memories", json={"interactions": events[at : at + 1000]}).raise_for_status()
        last = zip(habit_log.user_ids, asked.times.tolist(), strict=True)
        asks = [{"user_id": name, "top_n": ITEMS, "timestamp": time} for name, time in last]
        answers = client.post("/recommend/batch", json={"requests": asks}).json()["results"]
    for answer, scores in zip(answers, expected.tolist(), strict=True):
        found = {item["item_id"]: item["score"] for item in answer["items"]}
        assert found == pytest.approx(dict(zip(items, scores, strict=True)), abs=TOLERANCE)
    first = np.array([items.index(answer["items"][0]["item_id"]) + 1 for answer in answers])
    assert (first == habit_log.items[asked.event]).mean() > 0.5  # four fifths of the events are somebody's habit
