"""The REST API end to end: api, memory service and Valkey over real HTTP."""

import asyncio
import json
import math
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import httpx2
import numpy as np
import pytest

from api.commands.supervisor import ServeError, data_dir_of, serve
from api.http.app import create_app as create_api
from api.http.middleware import BODY_LIMIT_BYTES
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.conftest import MONDAY, served
from tests.synthetic import random_checkpoint


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


def remember(client: httpx2.Client, *events: tuple) -> dict:
    """(user, item) or (user, item, timestamp) each."""
    names = ("user_id", "item_id", "timestamp")
    body = {"interactions": [dict(zip(names, event, strict=False)) for event in events]}
    response = client.post("/memories", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def recommend(client: httpx2.Client, **body) -> dict:
    response = client.post("/recommend", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(answer: dict) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def scores(answer: dict) -> dict[str, float]:
    return {item["item_id"]: item["score"] for item in answer["items"]}


# ------------------------------------------------------------------------------------- who gets what


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


# ------------------------------------------------------------------------------------------ memories


# ----------------------------------------------------------------------------------------- at what time


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
    monkeypatch.setattr("api.recommend.recommend.time", clock)
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


def test_repeating_a_request_is_harmless(client):
    events = [("u", "i1", 1.6e9), ("u", "i2", 1.6e9)]
    assert remember(client, *events)["accepted"] == 2
    again = remember(client, *events)
    assert (again["accepted"], again["duplicates"], again["versions"]) == (0, 2, {"u": 1})


def test_event_ids_make_untimed_events_repeatable(client):
    body = {"interactions": [{"user_id": "u", "item_id": "i1", "event_id": "order-1"}]}
    assert client.post("/memories", json=body).json()["accepted"] == 1
    assert client.post("/memories", json=body).json()["duplicates"] == 1


def test_interactions_that_make_no_sense_are_rejected_and_the_rest_kept(client):
    now = time.time()
    answer = remember(
        client, ("u", "i1", now * 1000), ("u", "i2", now + 9e5), ("u", "i3", -1.0), ("u", "i4", now - 5), ("v", "i5")
    )
    assert answer["accepted"] == 2
    assert [(one["index"], one["code"]) for one in answer["rejected"]] == [
        (0, "timestamp_in_milliseconds"),
        (1, "timestamp_in_future"),
        (2, "timestamp_negative"),
    ]
    assert set(answer["versions"]) == {"u", "v"}


def test_forgetting(client):
    remember(client, ("u", "i1", 1.6e9))
    assert client.delete("/users/u/memory").json() == {"user_id": "u", "existed": True}
    missing = client.get("/users/u/memory")
    assert (missing.status_code, missing.json()["code"]) == (404, "user_not_found")
    assert remember(client, ("u", "i1", 1.6e9))["rejected"][0]["code"] == "forgotten"
    assert recommend(client, user_id="u")["source"] == "popularity"
    assert client.delete("/users/u/memory").json()["existed"] is False


def test_a_bank_laid_open(client):
    remember(client, ("u", "i1", 1.6e9), ("u", "i2", 1.6e9 + 5), ("u", "i1", 1.6e9 + 9))
    bank = client.get("/users/u/memory").json()
    assert [(entry["item_id"], entry["frequency"]) for entry in bank["entries"]] == [("i1", 2), ("i2", 1)]
    assert [entry["item_id"] for entry in bank["log"]] == ["i1", "i2", "i1"]
    assert (bank["events"], bank["bank_size"], bank["seen"], bank["k"]) == (3, 2, 2, 2)
    assert sum(bank["clusters"].values()) == pytest.approx(1)


def test_a_bank_tells_habits(client):
    """One item at eight on Tuesdays, four times; another once, with the third; a third in between."""
    tuesdays = [("u", "i1", MONDAY + 86400 + 7 * 86400 * week + 8 * 3600) for week in range(4)]
    remember(client, *tuesdays, ("u", "i2", tuesdays[2][2]), ("u", "i3", tuesdays[2][2] + 60))
    first, second, _ = client.get("/users/u/memory").json()["entries"]
    assert (first["first_time"], first["mean_gap_s"], first["occasions_since"]) == (tuesdays[0][2], 7 * 86400, 0)
    assert first["usual_hour"] == pytest.approx(8, abs=1e-3)
    assert first["usual_day"] == pytest.approx(1 + 8 / 24, abs=1e-3)
    assert (second["item_id"], second["first_time"], second["occasions_since"]) == ("i2", tuesdays[2][2], 2)
    assert [second[name] for name in ("mean_gap_s", "usual_hour", "usual_day")] == [None] * 3


def test_a_bank_says_what_its_qualities_are_made_of_how_k_was_reached_and_what_has_gone(client, run):
    """Capacity 10, of which one more item than that was taken."""
    remember(client, *(("u", f"i{n}", 1.6e9 + 5e6 * n) for n in range(1, 12)), ("u", "i7", 1.66e9))
    bank, rules = client.get("/users/u/memory").json(), client.get("/model").json()["config"]["rules"]
    assert (bank["bank_size"], bank["pruned"]) == (10, 1)
    for entry in bank["entries"]:
        assert sum(entry["quality_parts"].values()) == pytest.approx(entry["quality"], abs=1e-6)
    worth = np.array([entry["quality"] for entry in bank["entries"]])
    assert bank["threshold"] == pytest.approx(worth.mean() - rules["prune_std"] * worth.std(), abs=1e-6)
    kept = {entry["item_id"] for entry in bank["entries"]}
    (gone,) = bank["pruned_items"]
    assert {gone["item_id"]} == {f"i{n}" for n in range(1, 12)} - kept
    assert (gone["frequency"], gone["timestamp"]) == (1, 1.6e9 + 5e6 * int(gone["item_id"][1:]))
    assert gone["quality"] == pytest.approx(sum(gone["quality_parts"].values()), abs=1e-6)
    assert gone["quality"] < worth.min()
    own = bank["adaptive_k"]["own"]
    wanted = own["base"] * (0.5 + bank["entropy"]) * own["growth"]
    assert own["k"] == bank["k"] == min(max(math.floor(wanted + 0.5), own["k_min"]), own["k_max"], 10)
    assert (own["base"], own["growth"]) == (rules["k_base"], 1.0)
    others = bank["adaptive_k"]["collective"]
    assert recommend(client, user_id="u")["memory"]["collective"]["k"] == others["k"]


def test_memories_are_drawn_where_their_keys_lie(client, run):
    """The first item of everybody was taken in one situation; whatever comes later moves nobody else's place."""
    remember(client, ("u", "i1", 1.6e9), ("u", "i2", 1.6e9 + 5), ("v", "i9", 1.6e9))
    before, other = client.get("/users/u/memory").json(), client.get("/users/v/memory").json()
    first, second = (entry["position"] for entry in before["entries"])
    assert first == pytest.approx(other["entries"][0]["position"])
    assert second != pytest.approx(first)
    remember(client, ("u", "i3", 1.6e9 + 9))
    after = client.get("/users/u/memory").json()
    assert [entry["position"] for entry in after["entries"][:2]] == [first, second]
    assert after["entries"][2]["position"] == pytest.approx(
        before["position"], abs=1e-3
    )  # where the user stood, in fp16


def test_users_are_found_by_how_they_begin(client):
    remember(client, *((f"{kind} {n}", "i1") for kind in ("ann", "bob") for n in range(300)))
    every = sorted(f"ann {n}" for n in range(300))
    assert client.get("/users?prefix=ann&limit=1000").json()["users"] == every
    some = client.get("/users?prefix=ann&limit=7").json()["users"]
    assert (len(some), some) == (7, sorted(some))
    assert set(some) <= set(every)
    assert client.get("/users?prefix=ann 299").json()["users"] == ["ann 299"]
    assert client.get("/users?prefix=ann*").json()["users"] == []


NAMES = ["a/b", "ü ñ", "{x}", "100%", "a?b#c", "..", "x/memory", "emoji 🦊", "a*[b", "a\nb", "a\n"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_may_hold_any_characters(client, name):
    remember(client, (name, "i1"), (name, name))
    assert recommend(client, user_id=name)["source"] == "memory"
    path = f"/users/{quote(name, safe='') if name != '..' else '%2E%2E'}/memory"
    if name != "..":  # clients and proxies resolve this one
        assert client.get(path).json()["user_id"] == name
        assert client.delete(path).json() == {"user_id": name, "existed": True}


# --------------------------------------------------------------------------------------------- items


def test_the_catalogue_over_rest(client):
    one = {"item_id": "i1", "title": "One", "metadata": {"title": "One"}}
    assert client.get("/items/i1").json() == one | {"hidden": False, "known_to_model": True, "cluster": 0}
    assert client.get("/items/nope").status_code == 404
    put = client.put("/items/new one", json={"metadata": {"title": "Brand new"}})
    assert (put.json()["known_to_model"], put.json()["cluster"]) == (False, None)
    named = client.get("/items", params={"id": ["new one", "nope", "i2"]}).json()["items"]
    assert [(item["item_id"], item["title"]) for item in named] == [("new one", "Brand new"), ("i2", "i2")]
    assert client.get("/items", params={"id": ["i1"] * 201}).status_code == 422
    assert [item["item_id"] for item in client.get("/items?query=BRAND").json()["items"]] == ["new one"]
    assert client.patch("/items/new one", json={"metadata": {"year": 2026}}).json()["metadata"] == {
        "title": "Brand new", "year": 2026
    }  # fmt: skip


def test_model_health_metrics_and_docs(client, run):
    model = client.get("/model").json()
    assert (model["model_version"], model["items"], model["scopes"]) == (
        load_checkpoint(run).version,
        30,
        ["own", "collective"],
    )
    assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
    recommend(client)
    assert 'ramrec_api_answers_total{source="popularity"} 1.0' in client.get("/metrics").text
    assert client.get("/openapi.json").json()["info"]["title"] == "RAMRec"


# ----------------------------------------------------------------------------------- when parts fail


def test_without_the_memory_service_answers_are_degraded_and_nothing_is_acknowledged(run, valkey_url, stack):
    with served(create_memory(MemorySettings(run=run, redis_url=valkey_url))) as memory_url:
        api_url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url))))
        client = stack.enter_context(httpx2.Client(base_url=api_url))
        remember(client, ("u", "i1"))
        port = int(memory_url.rsplit(":", 1)[1])
    answer = recommend(client, user_id="u")
    assert (answer["source"], answer["memory"]["degraded"]) == ("popularity", True)
    answer = recommend(client, user_id="u", sequence=["i1"])
    assert (answer["source"], answer["memory"]["degraded"]) == ("encoder", True)
    assert recommend(client, sequence=["i1"])["memory"]["degraded"]  # no memories of others
    own = recommend(client, sequence=["i1"], scopes=["own"])
    assert not own["memory"]["degraded"]  # nothing was asked of memory
    refused = client.post("/memories", json={"interactions": [{"user_id": "u", "item_id": "i2"}]})
    assert (refused.status_code, refused.json()["code"]) == (503, "memory_unavailable")
    assert refused.headers["retry-after"]
    assert refused.json()["committed"] == []
    for path in ("/users/u/memory", "/users", "/health/ready"):
        assert client.get(path).status_code == 503
    assert client.get("/health/live").status_code == 200
    with served(create_memory(MemorySettings(run=run, redis_url=valkey_url)), port):
        assert recommend(client, user_id="u")["source"] == "memory"  # recovery is automatic


def test_two_api_processes_writing_for_one_user_lose_nothing(run, valkey_url, memory_url, stack):
    urls = [stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url)))) for _ in range(2)]

    async def race() -> list[dict]:
        async with httpx2.AsyncClient() as client:
            calls = [
                client.post(
                    f"{urls[n % 2]}/memories", json={"interactions": [{"user_id": "u", "item_id": f"i{n + 1}"}]}
                )
                for n in range(8)
            ]
            return [response.json() for response in await asyncio.gather(*calls)]

    answers = asyncio.run(race())
    with httpx2.Client(base_url=urls[0]) as client:
        kept = {entry["item_id"] for entry in client.get("/users/u/memory").json()["entries"]}
        version = client.get("/users/u/memory").json()["version"]
    acknowledged = {f"i{n + 1}" for n, answer in enumerate(answers) if answer.get("accepted")}
    assert kept == acknowledged
    assert version == len(acknowledged) >= 1
    assert all(answer.get("accepted") or answer["code"] == "write_conflict" for answer in answers)


def test_a_retrained_model_takes_over_the_memories(run, valkey_url, memory_url, tmp_path, stack):
    with served(create_api(ApiSettings(run=run, memory_url=memory_url))) as url, httpx2.Client(base_url=url) as client:
        remember(client, ("u", "i1", 1.6e9), ("u", "i2", 1.6e9 + 9), ("v", "i3", 1.6e9))
    save_checkpoint(tmp_path, random_checkpoint(seed=1))
    memory = stack.enter_context(served(create_memory(MemorySettings(run=tmp_path, redis_url=valkey_url))))
    url = stack.enter_context(served(create_api(ApiSettings(run=tmp_path, memory_url=memory))))
    client = stack.enter_context(httpx2.Client(base_url=url))
    answer = recommend(client, user_id="u")
    assert (answer["source"], answer["memory"]["bank_size"]) == ("memory", 2)
    assert remember(client, ("v", "i4", 1.6e9 + 50))["accepted"] == 1
    bank = client.get("/users/v/memory").json()
    assert (bank["model_version"], bank["bank_size"]) == (answer["model_version"], 2)


def test_an_api_serves_the_memory_services_model_and_says_so_where_it_cannot(valkey_url, run, tmp_path, stack):
    save_checkpoint(tmp_path, random_checkpoint(seed=2))
    theirs = tmp_path / "theirs"
    save_checkpoint(theirs, load_checkpoint(run))
    memory_url = stack.enter_context(served(create_memory(MemorySettings(run=theirs, redis_url=valkey_url))))
    follows = stack.enter_context(served(create_api(ApiSettings(run=tmp_path, memory_url=memory_url))))
    assert httpx2.get(f"{follows}/health/ready").json()["model_version"] == load_checkpoint(run).version
    save_checkpoint(theirs, random_checkpoint(seed=3))  # what the memory service has loaded is not there any more
    url = stack.enter_context(served(create_api(ApiSettings(run=tmp_path, memory_url=memory_url))))
    ready = httpx2.get(f"{url}/health/ready")
    assert (ready.status_code, "serves model" in ready.json()["status"]) == (503, True)
    refused = httpx2.post(f"{url}/memories", json={"interactions": [{"user_id": "u", "item_id": "i1"}]})
    assert (refused.status_code, "model_mismatch" in refused.json()["detail"]) == (503, True)


# ------------------------------------------------------------------------------------ malformed input

INTERACTION = {"user_id": "u", "item_id": "i"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/recommend", b"{", 400, "invalid_json"),
        ("/recommend", b"", 422, "invalid_request"),
        ("/recommend", b"\xff\xfe", 400, "invalid_json"),
        ("/recommend", [], 422, "invalid_request"),
        ("/recommend", {"user_id": ""}, 422, "invalid_request"),
        ("/recommend", {"user_id": 7}, 422, "invalid_request"),
        ("/recommend", {"user_id": "x" * 257}, 422, "invalid_request"),
        ("/recommend", {"user_id": "ü" * 129}, 422, "invalid_request"),
        ("/recommend", {"user_id": "a\0b"}, 422, "invalid_request"),
        ("/recommend", b'{"user_id": "\\ud800"}', 400, "invalid_json"),
        ("/recommend", {"top_n": 0}, 422, "invalid_request"),
        ("/recommend", {"top_n": 1001}, 422, "invalid_request"),
        ("/recommend", {"top_n": 2.5}, 422, "invalid_request"),
        ("/recommend", {"top_n": "10"}, 422, "invalid_request"),
        ("/recommend", {"k": 0}, 422, "invalid_request"),
        ("/recommend", {"k": 101}, 422, "invalid_request"),
        ("/recommend", {"sequence": ["i"] * 1001}, 422, "invalid_request"),
        ("/recommend", {"sequence": "i1"}, 422, "invalid_request"),
        ("/recommend", {"sequence": [None]}, 422, "invalid_request"),
        ("/recommend", {"colour": "red"}, 422, "invalid_request"),
        ("/recommend", {"scopes": ["everything"]}, 422, "invalid_request"),
        ("/recommend/batch", {"requests": []}, 422, "invalid_request"),
        ("/recommend/batch", {"requests": [{}] * 257}, 422, "invalid_request"),
        ("/memories", {"interactions": []}, 422, "invalid_request"),
        ("/memories", {"interactions": [INTERACTION] * 1001}, 422, "invalid_request"),
        ("/memories", {"interactions": [{"user_id": "u"}]}, 422, "invalid_request"),
        ("/memories", {"interactions": [INTERACTION | {"timestamp": "noon"}]}, 422, "invalid_request"),
        ("/memories", b'{"interactions": [{"user_id": "u", "item_id": "i", "rating": NaN}]}', 422, "invalid_request"),
        (
            "/memories",
            b'{"interactions": [{"user_id": "u", "item_id": "i", "timestamp": 1e999}]}',
            422,
            "invalid_request",
        ),
        ("/memories", {"interactions": [INTERACTION | {"extra": 1}]}, 422, "invalid_request"),
        ("/nowhere", {}, 404, "not_found"),
        ("/health/live", {}, 405, "method_not_allowed"),
    ],
)
def test_malformed_input_gets_a_clear_error(client, path, body, status, code):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"]
    assert client.get("/users").json() == {"users": []}


@pytest.mark.parametrize("declared", [True, False])
def test_a_giant_body_is_refused(client, declared):
    def stream():
        for _ in range(BODY_LIMIT_BYTES // 65536 + 2):
            yield bytes(65536)

    content = bytes(BODY_LIMIT_BYTES + 1) if declared else stream()
    response = client.post("/memories", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


# -------------------------------------------------------------------------------------------- ramrec serve


def test_serving_fails_clearly_without_a_checkpoint_or_a_port(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        serve(tmp_path, "127.0.0.1", free_port(), free_port(), None, None, None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}"):
            serve(run, "127.0.0.1", port, free_port(), None, None, None)
        with pytest.raises(ServeError, match=f"127.0.0.1:{port}"):
            serve(run, "127.0.0.1", free_port(), port, None, None, None)


def test_each_run_has_a_data_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_dir_of(Path("runs/a")) != data_dir_of(Path("other/a"))
    assert data_dir_of(Path("runs/a")).is_relative_to(tmp_path)
