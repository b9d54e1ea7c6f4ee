"""Explanations end to end: parts that add up to every score, answers without some memories, and nobody given away."""

import json
import math

import httpx2
import numpy as np
import pytest

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from tests.api.calls import ids, recommend, remember, scores
from tests.conftest import MONDAY, served

ITEMS = 30
HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


@pytest.fixture
def habitual(habit_url, stack) -> httpx2.Client:
    """A model that has learned habits. For three weeks, u and v took i1 at seven and i2 at noon; u took i4 once, and i9
    in the end, at the same time as i4; "never" is u without i9.
    """
    client = stack.enter_context(httpx2.Client(base_url=habit_url))
    for user in ("u", "v", "never"):
        daily = [
            (user, f"i{n}", MONDAY + DAY * day + hour * HOUR) for day in range(21) for n, hour in ((1, 7), (2, 12))
        ]
        remember(client, *daily, (user, "i4", MONDAY + 21 * DAY))
    remember(client, ("u", "i9", MONDAY + 21 * DAY))
    return client


def took(client: httpx2.Client, user: str, *items: str) -> None:
    remember(client, *((user, item, 1.6e9 + 3600 * n) for n, item in enumerate(items)))


# ---------------------------------------------------------------------------------------- adding up


def test_the_parts_of_every_item_give_its_score(client):
    """Own and collective memories, repeats, items that the model never saw."""
    for user, items in {"u": "i1 i2 i3 new i5", "v": "i1 i2 new i6", "w": "i1 i2 new i6 i7"}.items():
        took(client, user, *items.split())
    for ask in (
        {"user_id": "u"},
        {"user_id": "u", "exclude_seen": False},
        {"user_id": "u", "scopes": ["own"]},
        {"user_id": "u", "scopes": []},
        {"sequence": ["i1", "i2"]},
        {"user_id": "u", "sequence": ["i9"], "k": 2},
        {"user_id": "u", "ignore_memories": ["i5"]},
    ):
        answer = recommend(client, **ask, explain=True, top_n=ITEMS + 5)
        memory, copied_in_all = answer["memory"], 0.0
        for item in answer["items"]:
            p = math.exp(item["score"])
            assert by_parts(item, memory) == pytest.approx(p, rel=1e-4), (ask, item)
            copied_in_all += item["parts"]["copied"] * p
        everything = not {"exclude_seen"}.isdisjoint(ask)  # otherwise what was copied may have been seen
        assert copied_in_all <= memory["copying"] + 1e-5
        assert not everything or copied_in_all == pytest.approx(memory["copying"], abs=1e-5)


def by_parts(item: dict, memory: dict) -> float:
    """The probability of an item, put together from the parts that are told."""
    parts, by_model = item["parts"], 0.0
    logits = [parts[name] for name in ("state", "calibration", "memories")]
    if None in logits:
        assert (item["item_id"], logits, parts["copied"]) == ("new", [None] * 3, pytest.approx(1.0))
    else:
        by_model = (1 - memory["copying"]) * math.exp(sum(logits) - memory["log_z"])
    return by_model + parts["copied"] * math.exp(item["score"])


def test_all_memories_retrieved_are_told_with_their_attention(client):
    for user, items in {"u": "i1 i2 i3", "v": "i1 i2 i6", "w": "i1 i2 i6 i7"}.items():
        took(client, user, *items.split())
    memory = recommend(client, user_id="u", explain=True)["memory"]
    scopes = [one["scope"] for one in memory["memories"]]
    assert [scopes.count("own"), scopes.count("collective")] == [
        memory["own"]["retrieved"],
        memory["collective"]["retrieved"],
    ]
    assert scopes == sorted(scopes, reverse=True)
    assert sum(one["weight"] for one in memory["memories"]) == pytest.approx(1, abs=1e-5)
    for scope in ("own", "collective"):
        similarity = [one["similarity"] for one in memory["memories"] if one["scope"] == scope]
        assert similarity == sorted(similarity, reverse=True)
    assert "memories" not in recommend(client, user_id="u")["memory"]
    assert recommend(client, explain=True)["memory"]["memories"] == []


def test_where_few_memories_were_retrieved_because_names_all_and_they_add_up(client):
    took(client, "u", "i1", "i2")
    took(client, "v", "i1", "i2", "i4")
    took(client, "w", "i4", "i8")
    answer = recommend(client, user_id="u", explain=True, top_n=ITEMS)
    memory = answer["memory"]
    assert memory["own"]["retrieved"] == 2
    assert memory["collective"]["retrieved"] == 1  # i4, that two others hold: v in a context that can be found
    for item in answer["items"]:
        because, parts = item["because"], item["parts"]
        assert {(one["item_id"], one["scope"]) for one in because} == {
            ("i1", "own"), ("i2", "own"), ("i4", "collective")
        }  # fmt: skip
        assert sum(one["weight"] for one in because) == pytest.approx(1.0, abs=1e-5)
        assert sum(one["logit"] for one in because) == pytest.approx(parts["memories"], abs=1e-5)
        assert sum(one["copied"] for one in because) == pytest.approx(parts["copied"], abs=1e-6)
        assert (parts["copied"] > 0) == (item["item_id"] == "i4")


def test_explaining_changes_no_answer_and_counts_no_access(client):
    took(client, "u", "i1", "i2", "i3")
    plain, told = recommend(client, user_id="u"), recommend(client, user_id="u", explain=True)
    assert scores(plain) == pytest.approx(scores(told), abs=1e-6)
    assert {"gate", "copying", "log_z"}.isdisjoint(plain["memory"])
    assert all(item.keys() == {"item_id", "score"} for item in plain["items"])
    remember(client, ("u", "i4"))
    accesses = [entry["access"] for entry in client.get("/users/u/memory").json()["entries"]]
    assert max(accesses) == 1  # the plain request


# --------------------------------------------------------------------------------------------- habits


def test_the_parts_add_up_where_people_come_back(habitual):
    """At times before, at, and long after the last event; at its very time i4 and i9 are taken and not to come back."""
    for ask in (
        {"user_id": "u", "timestamp": MONDAY + 21 * DAY + 7 * HOUR},
        {"user_id": "u", "timestamp": MONDAY + 21 * DAY},
        {"user_id": "u", "timestamp": MONDAY + 3 * DAY},
        {"user_id": "u"},
        {"user_id": "u", "scopes": ["own"], "k": 2},
        {"user_id": "u", "scopes": ["collective"]},
        {"user_id": "u", "scopes": []},
        {"user_id": "u", "sequence": ["i9", "i1"], "ignore_memories": ["i2"]},
        {"user_id": "stranger", "sequence": ["i9"]},
    ):
        answer = recommend(habitual, **ask, explain=True, top_n=ITEMS)
        assert len(answer["items"]) == ITEMS
        for item in answer["items"]:
            assert by_parts(item, answer["memory"]) == pytest.approx(math.exp(item["score"]), rel=1e-4), (ask, item)
            if len(answer["memory"]["memories"]) <= 3:
                told = sum(one["logit"] for one in item["because"])
                assert told == pytest.approx(item["parts"]["memories"], abs=1e-4), (ask, item)


def test_an_own_memory_tells_its_habit(habitual):
    at_seven, at_noon = (
        recommend(habitual, user_id="u", timestamp=MONDAY + 21 * DAY + hour * HOUR, explain=True, k=4)
        for hour in (7, 12)
    )
    said = {one["item_id"]: one["habit"] for one in at_seven["memory"]["memories"] if one["scope"] == "own"}
    assert said["i1"] == {
        "count": 21,
        "since_s": pytest.approx(DAY, rel=1e-4),
        "mean_gap_s": pytest.approx(DAY, rel=1e-4),
        "at_this_hour": True,
        "on_this_day": False,  # every day: no day is special
        "logit": pytest.approx(said["i1"]["logit"]),
    }
    assert (said["i2"]["at_this_hour"], said["i4"]["count"], said["i4"]["mean_gap_s"]) == (False, 1, None)
    assert said["i4"]["since_s"] == pytest.approx(7 * HOUR, rel=1e-4)
    for answer, usual, other in ((at_seven, "i1", "i2"), (at_noon, "i2", "i1")):
        assert ids(answer)[0] == usual
        logit = {one["item_id"]: one["habit"]["logit"] for one in answer["memory"]["memories"] if one["scope"] == "own"}
        assert logit[usual] > logit[other]
        reasons = {one["item_id"]: one for one in answer["items"][0]["because"] if one["scope"] == "own"}
        assert reasons[usual]["habit"]["logit"] == logit[usual]
        assert reasons[usual]["logit"] == pytest.approx(logit[usual], abs=1e-5)  # attention was left out, training
    assert all("habit" not in one for one in at_seven["memory"]["memories"] if one["scope"] == "collective")


def test_where_the_model_looks_at_no_habits_none_is_told(client):
    took(client, "u", "i1", "i2", "i1")
    answer = recommend(client, user_id="u", explain=True)
    assert "habit" not in json.dumps(answer)


def test_with_a_memory_ignored_its_habit_is_gone(habitual):
    ask = {"scopes": ["own"], "explain": True, "top_n": ITEMS, "timestamp": MONDAY + 22 * DAY}
    plain, without, never = (
        recommend(habitual, **ask, **one)
        for one in ({"user_id": "u"}, {"user_id": "u", "ignore_memories": ["i9"]}, {"user_id": "never"})
    )
    assert scores(without) == pytest.approx(scores(never), abs=1e-4)
    assert scores(plain) != pytest.approx(scores(never), abs=1e-2)
    habits = [[(one["item_id"], one["habit"]) for one in answer["memory"]["memories"]] for answer in (without, never)]
    for (item, habit), (wanted_item, wanted) in zip(*habits, strict=True):
        assert (item, habit) == (wanted_item, wanted | {"logit": pytest.approx(wanted["logit"], abs=1e-4)})
    usual = recommend(habitual, user_id="u", ignore_memories=["i1", "i2"], **ask)
    assert {one["item_id"] for one in usual["memory"]["memories"]} == {"i4", "i9"}
    assert scores(usual)["i1"] < scores(plain)["i1"] - 1


# --------------------------------------------------------------------------------- had I not taken it


def test_without_the_last_item_a_user_is_answered_as_one_who_never_took_it(client):
    took(client, "u", "i1", "i2", "i3", "i4", "i9")
    took(client, "never", "i1", "i2", "i3", "i4")
    ask = {"scopes": ["own"], "explain": True, "top_n": ITEMS, "exclude_seen": False}
    without = recommend(client, user_id="u", ignore_memories=["i9"], **ask)
    never = recommend(client, user_id="never", **ask)
    assert scores(without) == pytest.approx(scores(never), abs=1e-4)
    for name in ("entropy", "k", "bank_size", "own", "gate", "log_z"):
        assert without["memory"][name] == pytest.approx(never["memory"][name], abs=1e-4), name
    assert scores(without) != pytest.approx(scores(recommend(client, user_id="u", **ask)), abs=1e-2)


def test_the_state_is_that_of_the_log_without_the_items_however_long_it_is(client):
    """Longer than window (8) and bank (10), the items at several places; memories left out, the state shows."""
    items = [f"i{n % 25 + 1}" for n in range(40)]
    took(client, "u", *items)
    took(client, "never", *(item for item in items if item not in ("i3", "i14", "i15")))
    ask = {"scopes": [], "top_n": ITEMS, "exclude_seen": False}
    without = recommend(client, user_id="u", ignore_memories=["i15", "i3", "i14", "what?"], **ask)
    assert scores(without) == pytest.approx(scores(recommend(client, user_id="never", **ask)), abs=1e-4)


def test_what_is_ignored_stays_seen_and_may_come_back_only_if_seen_items_may(client):
    took(client, "u", "i1", "i2", "i3")
    assert {"i1", "i2", "i3"}.isdisjoint(ids(recommend(client, user_id="u", ignore_memories=["i3"], top_n=ITEMS)))
    again = recommend(client, user_id="u", ignore_memories=["i3"], top_n=ITEMS, exclude_seen=False)
    assert {"i1", "i2", "i3"} <= set(ids(again))


def test_ignoring_nothing_that_was_taken_changes_nothing(client):
    took(client, "u", "i1", "i2", "i3")
    plain = recommend(client, user_id="u", explain=True)
    same = recommend(client, user_id="u", explain=True, ignore_memories=["i9", "never heard of"])
    assert (same["items"], same["memory"]) == (plain["items"], plain["memory"])
    stranger = recommend(client, user_id="stranger", ignore_memories=["i1"])
    assert stranger["items"] == recommend(client)["items"]
    sequence = recommend(client, sequence=["i1", "i2"], ignore_memories=["i1"])
    assert sequence["items"] == recommend(client, sequence=["i1", "i2"])["items"]


def test_a_sequence_that_is_sent_stays_the_query(client):
    took(client, "u", "i1", "i2", "i3")
    took(client, "never", "i1", "i2")
    ask = {"sequence": ["i7", "i3"], "scopes": ["own"], "top_n": ITEMS, "exclude_seen": False}
    without = recommend(client, user_id="u", ignore_memories=["i3"], **ask)
    assert scores(without) == pytest.approx(scores(recommend(client, user_id="never", **ask)), abs=1e-4)


def test_without_everything_a_user_is_a_stranger_who_has_seen_things(client):
    took(client, "u", "i1", "i2")
    took(client, "v", "i5", "i6")
    answer = recommend(client, user_id="u", ignore_memories=["i1", "i2"], top_n=3, explain=True)
    assert (answer["source"], ids(answer)) == ("popularity", ["i3", "i4", "i5"])
    memory = answer["memory"]
    assert (memory["bank_size"], memory["own"], memory["collective"]) == (
        0, {"k": 0, "retrieved": 0}, {"k": 0, "retrieved": 0}
    )  # fmt: skip


def test_a_batch_mixes_those_who_ignore_with_others(client):
    took(client, "u", "i1", "i2", "i3")
    took(client, "v", "i4", "i5", "i6")
    asks = [
        {"user_id": "u", "ignore_memories": ["i3"]},
        {"user_id": "u"},
        {"sequence": ["i5"]},
        {"user_id": "u", "ignore_memories": ["i1", "i2"]},
        {"user_id": "v", "ignore_memories": ["i4", "i5", "i6"]},
        {},
        {"user_id": "v"},
    ]
    together = client.post("/recommend/batch", json={"requests": asks}).json()["results"]
    for ask, answer in zip(asks, together, strict=True):
        alone = recommend(client, **ask)
        assert (answer["source"], answer["memory"]) == (alone["source"], alone["memory"])
        assert scores(answer) == pytest.approx(scores(alone), abs=1e-4)


def test_an_item_that_only_another_api_has_heard_of_is_ignored_too(run, memory_url, stack):
    here, there = (
        stack.enter_context(
            httpx2.Client(base_url=stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url)))))
        )
        for _ in range(2)
    )
    took(here, "never", "i1", "i2")
    took(there, "u", "i1", "i2", "fresh")
    ask = {"scopes": ["own"], "top_n": ITEMS}
    without = recommend(here, user_id="u", ignore_memories=["fresh"], **ask)
    assert scores(without) == pytest.approx(scores(recommend(here, user_id="never", **ask)), abs=1e-4)


# ------------------------------------------------------------------------------------------ privacy


def test_what_one_user_took_shows_in_no_answer_until_a_second_took_it(client):
    took(client, "a", "i1", "i2", "secret", "i7")
    took(client, "b", "i1", "i2", "i3")
    ask = {"sequence": ["i1", "i2"], "explain": True, "top_n": ITEMS + 5}
    answer = recommend(client, **ask)
    assert answer["memory"]["collective"]["retrieved"] == 2  # i2, of both
    assert "secret" not in json.dumps(answer)
    assert {one["item_id"] for item in answer["items"] for one in item["because"]} == {"i2"}
    took(client, "c", "i1", "i2", "secret")
    answer = recommend(client, **ask)
    assert "secret" in ids(answer)
    assert "secret" in {one["item_id"] for item in answer["items"] for one in item["because"]}
    client.delete("/users/c/memory")
    assert "secret" not in json.dumps(recommend(client, **ask))


def test_beside_oneself_two_others_are_needed(client):
    took(client, "a", "i1", "i2", "rare")
    took(client, "me", "i1", "i2", "rare")
    mine = recommend(client, user_id="me", scopes=["collective"], explain=True, exclude_seen=False, top_n=ITEMS + 5)
    assert "rare" not in json.dumps(mine)
    took(client, "c", "i1", "i2", "rare")
    mine = recommend(client, user_id="me", scopes=["collective"], explain=True, exclude_seen=False, top_n=ITEMS + 5)
    assert "rare" in {one["item_id"] for item in mine["items"] for one in item["because"]}


def test_no_answer_says_whose_a_memory_is(client):
    names = [f"user-{n}-of-many" for n in range(12)]
    for n, name in enumerate(names):
        took(client, name, "i1", "i2", f"i{n % 3 + 4}")
    answer = recommend(client, sequence=["i1", "i2"], explain=True, top_n=ITEMS)
    assert answer["memory"]["collective"]["retrieved"] > 3
    assert not any(name in json.dumps(answer) for name in names)
    assert np.all([one.keys() == {"item_id", "scope", "similarity", "weight", "logit", "copied"}
                   for item in answer["items"] for one in item["because"]])  # fmt: skip
