"""Interactions are stored, looked at and forgotten, end to end."""

import asyncio
import math
import time
from urllib.parse import quote

import httpx2
import numpy as np
import pytest

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from tests.api.calls import recommend, remember
from tests.api.services import with_services
from tests.conftest import MONDAY, served


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


def test_interactions_beyond_the_limit_are_answered_429_and_nothing_of_them_is_kept(memory_url, run, stack):
    app = create_api(ApiSettings(run=run, memory_url=memory_url, ingest_limit=5))
    started = with_services(app)
    client = stack.enter_context(httpx2.Client(base_url=stack.enter_context(served(app))))
    (services,) = started
    three = {"interactions": [{"user_id": "u", "item_id": f"i{n}", "timestamp": 1e9 + n} for n in range(1, 4)]}
    with services.intake.admitted(3):  # as another request's, under way
        refused = client.post("/memories", json=three)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["code"] == "ingestion_full"
    assert client.get("/users/u/memory").status_code == 404
    assert client.post("/memories", json=three).json()["accepted"] == 3
    assert services.intake.under_way == 0


def test_a_single_large_request_is_taken_where_nothing_else_is_written(memory_url, run, stack):
    app = create_api(ApiSettings(run=run, memory_url=memory_url, ingest_limit=2))
    client = stack.enter_context(httpx2.Client(base_url=stack.enter_context(served(app))))
    three = {"interactions": [{"user_id": "u", "item_id": f"i{n}", "timestamp": 1e9 + n} for n in range(1, 4)]}
    assert client.post("/memories", json=three).json()["accepted"] == 3
