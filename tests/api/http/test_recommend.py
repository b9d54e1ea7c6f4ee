"""Recommendations end to end: api, memory service and Valkey over real HTTP."""

import time
from types import SimpleNamespace

import httpx2
import pytest

from tests.api.calls import ids, recommend, remember, scores
from tests.conftest import MONDAY


def test_an_ingested_memory_changes_the_next_answer(client):
    remember(client, ("u", "i1"), ("u", "i2"))
    before = recommend(client, user_id="u")
    assert remember(client, ("u", "i9"))["versions"] == {"u": 2}
    after = recommend(client, user_id="u")
    assert (before["memory"]["version"], after["memory"]["version"]) == (1, 2)
    assert after["memory"]["bank_size"] == 3
    assert scores(before) != scores(after)


def test_a_user_nobody_knows_gets_what_is_popular(client):
    answer = recommend(client, user_id="stranger", top_n=3)
    assert answer["source"] == "popularity"
    assert ids(answer) == ["i1", "i2", "i3"]
    assert answer["memory"]["bank_size"] == 0
    assert recommend(client, top_n=3)["items"] == answer["items"]


def test_a_sequence_alone_is_answered_by_the_encoder_and_not_kept(client):
    answer = recommend(client, sequence=["i4", "i5"], top_n=30)
    assert answer["source"] == "encoder"
    assert answer["user_id"] is None
    assert {"i4", "i5"}.isdisjoint(ids(answer))
    assert len(ids(answer)) == 28
    assert client.get("/users").json() == {"users": []}


def test_items_the_model_does_not_know_are_skipped_and_listed(client):
    answer = recommend(client, sequence=["i4", "what?", "i5"], top_n=5)
    assert answer["unknown_items"] == ["what?"]
    assert scores(answer) == scores(recommend(client, sequence=["i4", "i5"], top_n=5))
    assert recommend(client, sequence=["what?"])["source"] == "popularity"


def test_user_and_sequence_together(client):
    remember(client, ("u", "i1"), ("u", "i2"))
    answer = recommend(client, user_id="u", sequence=["i7"], top_n=30)
    assert answer["source"] == "memory"
    assert {"i1", "i2", "i7"}.isdisjoint(ids(answer))
    assert scores(answer) != scores(recommend(client, user_id="u", top_n=30))


def test_everything_the_user_ever_had_is_excluded_not_only_what_is_in_window_or_bank(client):
    had = [f"i{n}" for n in range(1, 26)]  # the window is 8, the bank holds 10
    remember(client, *(("u", item, 1.6e9 + n) for n, item in enumerate(had)))
    assert client.get("/users/u/memory").json()["bank_size"] <= 10
    assert sorted(ids(recommend(client, user_id="u", top_n=30))) == sorted(f"i{n}" for n in range(26, 31))
    assert len(ids(recommend(client, user_id="u", top_n=30, exclude_seen=False))) == 30


def test_exclusions_candidates_and_hidden_items(client):
    remember(client, ("u", "i1"))
    answer = recommend(client, user_id="u", candidates=["i1", "i2", "i3", "i4", "nope"], exclude_items=["i3"])
    assert sorted(ids(answer)) == ["i2", "i4"]
    assert answer["unknown_items"] == ["nope"]
    assert client.patch("/items/i2", json={"hidden": True}).json()["hidden"]
    assert ids(recommend(client, user_id="u", candidates=["i2", "i4"])) == ["i4"]
    assert ids(recommend(client, candidates=["i2"])) == []


def test_k_scopes_and_ignored_memories(client):
    remember(client, *(("u", f"i{n}", 1.6e9 + n) for n in range(1, 10)))
    memory = recommend(client, user_id="u", k=2)["memory"]
    assert (memory["k"], memory["own"]) == (2, {"k": 2, "retrieved": 2})
    none = recommend(client, user_id="u", scopes=[], explain=True)
    assert none["memory"]["own"] == {"k": 0, "retrieved": 0}
    assert all(item["because"] == [] for item in none["items"])
    named = {r["item_id"] for i in recommend(client, user_id="u", k=9, explain=True)["items"] for r in i["because"]}
    ignored = sorted(named)[0]
    without = recommend(client, user_id="u", k=9, explain=True, ignore_memories=[ignored])
    assert ignored not in {r["item_id"] for i in without["items"] for r in i["because"]}
    assert without["memory"]["own"]["retrieved"] == 8


def test_explanations_name_memories_of_the_bank(client):
    remember(client, ("u", "i1", 1.6e9), ("u", "brand-new", 1.6e9 + 1), ("u", "i3", 1.6e9 + 2))
    answer = recommend(client, user_id="u", explain=True, top_n=2)
    assert 0 < answer["memory"]["gate"] < 1
    for item in answer["items"]:
        assert {reason["item_id"] for reason in item["because"]} <= {"i1", "brand-new", "i3"}
        assert [r["logit"] for r in item["because"]] == sorted((r["logit"] for r in item["because"]), reverse=True)
    assert "because" not in recommend(client, user_id="u")["items"][0]


def test_a_batch_answers_like_its_requests_alone(client):
    remember(client, ("u", "i1"), ("v", "i2"), ("v", "i3"))
    asks = [{"user_id": "u"}, {"user_id": "v", "top_n": 3}, {"sequence": ["i5"]}, {}, {"user_id": "x"}]
    together = client.post("/recommend/batch", json={"requests": asks}).json()["results"]
    for ask, answer in zip(asks, together, strict=True):
        alone = recommend(client, **ask)
        assert ids(alone) == ids(answer)
        assert list(scores(alone).values()) == pytest.approx(list(scores(answer).values()), abs=1e-4)
        assert alone["memory"] == answer["memory"]


@pytest.fixture
def habitual(habit_url, stack) -> httpx2.Client:
    """A model that has learned habits; for two weeks u took i1 at seven and i2 at noon, every day."""
    client = stack.enter_context(httpx2.Client(base_url=habit_url))
    times = [(n, MONDAY + 86400 * day + 3600 * hour) for day in range(14) for n, hour in ((1, 7), (2, 12))]
    remember(client, *(("u", f"i{n}", when) for n, when in times))
    return client


def test_the_answer_is_for_the_time_of_the_request(habitual):
    tomorrow = MONDAY + 14 * 86400
    ask = {"user_id": "u", "top_n": 30, "explain": True}  # explained requests do not count as uses of memories
    seven, noon = (recommend(habitual, **ask, timestamp=tomorrow + 3600 * hour) for hour in (7, 12))
    assert (ids(seven)[0], ids(noon)[0]) == ("i1", "i2")
    again = recommend(habitual, **ask, timestamp=tomorrow + 3600 * 7)
    assert (again["items"], again["memory"]) == (seven["items"], seven["memory"])
    times = [tomorrow + 3600 * hour for hour in (7, 12, 7)]
    asks = {"requests": [ask | {"timestamp": when} for when in times]}
    together = habitual.post("/recommend/batch", json=asks).json()["results"]
    for one, alone in zip(together, (seven, noon, seven), strict=True):
        assert scores(one) == pytest.approx(scores(alone), abs=1e-4)


def test_years_later_it_is_as_at_the_longest_gap_but_for_the_hour(habitual):
    rules = habitual.get("/model").json()["config"]["rules"]
    limit, week = MONDAY + 13 * 86400 + 12 * 3600 + rules["longest_gap_s"], 7 * 86400
    ask = {"user_id": "u", "top_n": 30, "explain": True}
    at_limit, years_later, at_another_hour = (
        recommend(habitual, **ask, timestamp=when)
        for when in (limit, limit + 150 * week, limit + 150 * week + 7 * 3600)
    )
    assert scores(years_later) == pytest.approx(scores(at_limit), abs=1e-4)
    assert scores(at_another_hour) != pytest.approx(scores(at_limit), abs=1e-2)
    habits = [one["memory"]["memories"][0]["habit"] for one in (at_limit, years_later)]
    assert habits[0]["since_s"] == habits[1]["since_s"]


def test_without_a_time_it_is_that_of_receipt(habitual, monkeypatch):
    """One for all requests of a call, though they are worked on one batch after another."""
    stamps = iter([MONDAY + 14 * 86400 + 3600 * 7])
    clock = SimpleNamespace(time=lambda: next(stamps, MONDAY + 14 * 86400 + 3600 * 12), perf_counter=time.perf_counter)
    monkeypatch.setattr("api.recommend.request.time", clock)
    asks = {"requests": [{"user_id": "u", "explain": True, "scopes": ["own"]}] * 200}
    answers = habitual.post("/recommend/batch", json=asks).json()["results"]
    assert [ids(answer)[0] for answer in answers] == ["i1"] * 200
    assert ids(recommend(habitual, user_id="u"))[0] == "i2"


def test_where_people_come_back_what_one_had_is_listed_unless_the_request_says_otherwise(habitual):
    """Where they do not: `test_everything_the_user_ever_had_is_excluded_...`."""
    assert not habitual.get("/model").json()["config"]["rules"]["exclude_seen"]
    ask = {"user_id": "u", "top_n": 30}
    assert len(ids(recommend(habitual, **ask))) == len(ids(recommend(habitual, **ask, exclude_seen=False))) == 30
    assert set(ids(recommend(habitual, **ask, exclude_seen=True))) == {f"i{n}" for n in range(3, 31)}
