"""Who knows little gets an answer all the same: what is sent, what answers, which items come, what memory says."""

from collections.abc import Iterator

import httpx2
import pytest
import redis

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import save_checkpoint
from tests.api.calls import ids, recommend, remember
from tests.conftest import served
from tests.synthetic import random_checkpoint

ALL = [f"i{n}" for n in range(1, 31)]
NEW = ["new-a", "new-b"]
"""Items that users took and that the model never saw."""
NOTHING = {"k": 0, "retrieved": 0}


@pytest.fixture(scope="module")
def client(_valkey, tmp_path_factory) -> Iterator[httpx2.Client]:
    """A service with two users of known items, three of unknown ones, one hidden item, and nothing else."""
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run, random_checkpoint())
    with redis.Redis.from_url(_valkey) as store:
        store.flushall()
    with (
        served(create_memory(MemorySettings(run=run, redis_url=_valkey))) as memory_url,
        served(create_api(ApiSettings(run=run, memory_url=memory_url))) as url,
        httpx2.Client(base_url=url) as client,
    ):
        for user, items in {
            "known": ["i1", "i2", "i3"],
            "single": ["i5"],
            "new-only": NEW,
            "new-too": [*NEW, "i6"],
            "new-three": ["i1", *NEW],
        }.items():
            remember(client, *((user, item, 1.6e9 + n) for n, item in enumerate(items)))
        assert client.patch("/items/i30", json={"hidden": True}).status_code == 200
        yield client


def without(*left_out: str) -> set[str]:
    """All items of the model that may be shown, but these."""
    return set(ALL) - {"i30"} - set(left_out)


# what is sent → source; items that must come (all of them, asked for everything), items that may come besides;
# collective memories; entropy
TABLE = {
    "nobody": ({}, "popularity", without(), set()),
    "new user": ({"user_id": "stranger"}, "popularity", without(), set()),
    "new user, empty sequence": ({"user_id": "stranger", "sequence": []}, "popularity", without(), set()),
    "empty sequence": ({"sequence": []}, "popularity", without(), set()),
    "new user with a sequence": ({"user_id": "x", "sequence": ["i1", "i2"]}, "memory", without("i1", "i2"), set(NEW)),
    "sequence": ({"sequence": ["i1", "i2"]}, "memory", without("i1", "i2"), set(NEW)),
    "sequence, own scope only": (
        {"sequence": ["i1", "i2"], "scopes": ["own"]}, "encoder", without("i1", "i2"), set()),
    "sequence, no scopes": ({"sequence": ["i1", "i2"], "scopes": []}, "encoder", without("i1", "i2"), set()),
    "sequence with unknown items": (
        {"sequence": ["what?", "i1", "why?"]}, "memory", without("i1"), set(NEW)),
    "sequence of unknown items": ({"sequence": ["what?", "why?"]}, "popularity", without(), set()),
    "sequence of items that only others took": ({"sequence": NEW}, "popularity", without(), set()),
    "known user, sequence of unknown items": (
        {"user_id": "known", "sequence": ["what?"]}, "memory", without("i1", "i2", "i3"), set(NEW)),
    "known user, empty sequence": (
        {"user_id": "known", "sequence": []}, "memory", without("i1", "i2", "i3"), set(NEW)),
    "user of one item": ({"user_id": "single"}, "memory", without("i5"), set(NEW)),
    "user of unknown items": ({"user_id": "new-only"}, "memory", without(), set()),
    "known user, no scopes": ({"user_id": "known", "scopes": []}, "memory", without("i1", "i2", "i3"), set()),
    "known user, own scope": ({"user_id": "known", "scopes": ["own"]}, "memory", without("i1", "i2", "i3"), set()),
    "known user, collective scope": (
        {"user_id": "known", "scopes": ["collective"]}, "memory", without("i1", "i2", "i3"), set(NEW)),
    "new user, no scopes": ({"user_id": "stranger", "scopes": []}, "popularity", without(), set()),
    "new user, k": ({"user_id": "stranger", "k": 100}, "popularity", without(), set()),
    "known user, k beyond the bank": ({"user_id": "known", "k": 100}, "memory", without("i1", "i2", "i3"), set(NEW)),
    "bank empty but for what is ignored": (
        {"user_id": "single", "ignore_memories": ["i5"]}, "popularity", without("i5"), set()),
    "seen items wanted": ({"user_id": "known", "exclude_seen": False}, "memory", without(), set(NEW)),
}  # fmt: skip


@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explained"])
@pytest.mark.parametrize(("ask", "source", "wanted", "besides"), TABLE.values(), ids=TABLE)
def test_every_cold_path_has_its_answer(client, ask, source, wanted, besides, explain):
    answer = recommend(client, **ask, top_n=1000, explain=explain)
    assert answer["source"] == source
    found = ids(answer)
    assert len(found) == len(set(found))
    assert wanted <= set(found) <= wanted | besides
    values = [item["score"] for item in answer["items"]]
    assert values == sorted(values, reverse=True)
    assert all(value <= 0 for value in values)
    if source == "popularity":
        assert found == [item for item in ALL if item in wanted]
        assert all(item.get("because", []) == [] for item in answer["items"])
    memory, scopes = answer["memory"], ask.get("scopes", ["own", "collective"])
    for scope in ("own", "collective"):
        assert memory[scope]["retrieved"] <= memory[scope]["k"]
        assert scope in scopes or memory[scope] == NOTHING
    assert 0 <= memory["entropy"] <= 1
    assert memory["degraded"] is False
    assert answer["unknown_items"] == [item for item in ask.get("sequence", []) if item not in ALL]


@pytest.mark.parametrize(
    "ask", [{}, {"user_id": "known"}, {"user_id": "stranger"}, {"sequence": ["i4"]}, {"user_id": "new-only"}]
)
@pytest.mark.parametrize(
    "barred",
    [
        {"candidates": []},
        {"candidates": ["never heard of"]},
        {"candidates": ["i30"]},
        {"candidates": ["i9"], "exclude_items": ["i9"]},
        {"exclude_items": [*ALL, *NEW]},
        {"filter": {"title": {"eq": "no such title"}}},
    ],
    ids=["none", "unknown", "hidden", "excluded", "all excluded", "filtered"],
)
def test_where_nothing_is_left_to_recommend_nothing_is(client, ask, barred):
    for explain in (False, True):
        answer = recommend(client, **ask, **barred, explain=explain)
        assert answer["items"] == []
        assert answer["memory"]["degraded"] is False


def test_a_user_who_has_had_everything_gets_nothing(client):
    remember(client, *(("everything", item, 1.6e9 + n) for n, item in enumerate([*ALL, *NEW])))
    try:
        assert recommend(client, user_id="everything", top_n=1000)["items"] == []
        assert len(ids(recommend(client, user_id="everything", top_n=1000, exclude_seen=False))) >= 29
    finally:
        client.delete("/users/everything/memory")


def test_a_new_user_with_a_sequence_is_answered_as_the_sequence_is(client):
    answers = [
        recommend(client, **ask) for ask in ({"sequence": ["i1", "i2"]}, {"user_id": "x", "sequence": ["i1", "i2"]})
    ]
    assert answers[0]["items"] == answers[1]["items"]
    assert client.get("/users/x/memory").status_code == 404  # asking makes nobody known


def test_unknown_items_in_a_sequence_change_nothing_but_what_is_listed(client):
    plain = recommend(client, sequence=["i1", "i2"])
    mixed = recommend(client, sequence=["what?", "i1", "why?", "i2", "what?"])
    assert mixed["items"] == plain["items"]
    assert mixed["unknown_items"] == ["what?", "why?"]


def test_a_user_of_items_that_the_model_never_saw_has_a_bank_that_answers(client):
    answer = recommend(client, user_id="new-only", explain=True)
    assert answer["memory"]["own"]["retrieved"] == answer["memory"]["bank_size"] == 2
    assert answer["memory"]["entropy"] == 0.5
    assert {one["item_id"] for one in answer["items"][0]["because"]} & set(NEW)


def test_the_first_interaction_turns_a_stranger_into_somebody(client):
    before = recommend(client, user_id="fresh")
    remember(client, ("fresh", "i8"))
    after = recommend(client, user_id="fresh")
    assert (before["source"], after["source"]) == ("popularity", "memory")
    assert (after["memory"]["version"], after["memory"]["bank_size"], after["memory"]["own"]["k"]) == (1, 1, 1)
    client.delete("/users/fresh/memory")
    assert recommend(client, user_id="fresh")["items"] == before["items"]
