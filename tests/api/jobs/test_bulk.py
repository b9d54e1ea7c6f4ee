"""Work on all users, by slot ranges of a Redis Cluster: in this process and on Ray."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
import redis
from pyarrow import parquet

from api.http.app import create_app as create_api
from api.jobs.backfill import backfill
from api.jobs.bulk import LOCAL, BulkError, RayRunner, split
from api.jobs.recommend_all import FEWEST_FILES, recommend_all
from api.jobs.reembed import ReembedError, reembed
from api.memory.client import MemoryClient
from api.recommend.pipeline import recommend
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.hash_slots import slot_of
from memory_service.settings import MemorySettings
from tests.api.jobs.test_backfill import remembered
from tests.api.models.changing import version
from tests.conftest import MONDAY, served
from tests.redis_cluster import until
from tests.replicas import Replicas

USERS = [f"u{n}" for n in range(300)] + ["a}b", "{a", "}x", "é"]


@pytest.fixture
def known_url(api_url) -> str:
    """The api, where all users have taken something."""
    make_known(api_url)
    return api_url


def make_known(api_url: str) -> None:
    events = [
        {"user_id": user, "item_id": f"i{1 + (n + 3 * step) % 30}", "timestamp": 1.6e9 + step}
        for n, user in enumerate(USERS)
        for step in range(1 + n % 4)
    ]
    for at in range(0, len(events), 1000):
        answer = httpx2.post(f"{api_url}/memories", json={"interactions": events[at : at + 1000]}, timeout=60)
        assert answer.status_code == 200, answer.text


async def users_in(memory_url: str, slots: range) -> list[str]:
    client, found, cursor = MemoryClient(memory_url, 30), [], 0
    try:
        while True:
            page = await client.walk(cursor, 50, slots)
            cursor, found = page.cursor, found + page.users
            if cursor == 0:
                return found
    finally:
        await client.close()


@pytest.mark.usefixtures("known_url")
def test_slot_ranges_part_all_users(memory_url, valkey_url, go):
    with redis.Redis.from_url(valkey_url) as client:
        for user in USERS:
            assert slot_of(user) == client.execute_command("CLUSTER KEYSLOT", b"ramrec:{" + user.encode() + b"}")
    parts = [go(users_in(memory_url, slots)) for slots in (range(100), range(100, 9000), range(9000, 16_384))]
    assert sorted(set().union(*parts)) == sorted(USERS)
    for part, slots in zip(parts, (range(100), range(100, 9000), range(9000, 16_384)), strict=True):
        assert part
        assert all(slot_of(user) in slots for user in part)


def files_of(out: Path) -> dict[str, list[dict]]:
    return {file.name: parquet.read_table(file).to_pylist() for file in sorted(out.glob("*.parquet"))}


def close(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The same, scores to 1e-5: who else is asked about at the moment shows in the digits behind."""
    return {
        name: [row | {"scores": pytest.approx(row["scores"], abs=1e-5)} for row in part] for name, part in rows.items()
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayRunner]:
    """Two workers of Ray on loopback."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'ramrec[ray]'")
    with RayRunner(workers=2) as started:
        yield started


# ------------------------------------------------------------------------------ recommendations for everybody


def test_everybody_is_answered_as_over_http(known_url, memory_url, run, tmp_path):
    written = recommend_all(run, memory_url, tmp_path / "out", top_n=5)
    assert (written.files, written.users, written.before) == (FEWEST_FILES, len(USERS), 0)
    rows = [row for part in files_of(tmp_path / "out").values() for row in part]
    assert sorted(row["user_id"] for row in rows) == sorted(USERS)
    for at in range(0, len(rows), 200):
        some = rows[at : at + 200]
        asks = {"requests": [{"user_id": row["user_id"], "top_n": 5} for row in some]}
        answers = httpx2.post(f"{known_url}/recommend/batch", json=asks, timeout=60).json()["results"]
        for row, answer in zip(some, answers, strict=True):
            assert row["items"] == [item["item_id"] for item in answer["items"]]
            assert row["scores"] == pytest.approx([item["score"] for item in answer["items"]], abs=1e-5)
            assert (row["source"], row["model_version"]) == (answer["source"], answer["model_version"])
            assert row["version"] == answer["memory"]["version"]


def test_everybody_is_answered_for_one_time_and_as_the_data_says(habit_url, habit_memory_url, habit_run, tmp_path):
    """u of whom i1 is usual at seven, i2 at noon; what one had comes, unless that is not wanted."""
    daily = [(n, MONDAY + 86400 * day + 3600 * hour) for day in range(14) for n, hour in ((1, 7), (2, 12))]
    events = [{"user_id": "u", "item_id": f"i{n}", "timestamp": when} for n, when in daily]
    httpx2.post(f"{habit_url}/memories", json={"interactions": events}, timeout=60).raise_for_status()
    for hour, usual in ((7, "i1"), (12, "i2")):
        out, when = tmp_path / str(hour), MONDAY + 14 * 86400 + 3600 * hour
        recommend_all(habit_run, habit_memory_url, out, timestamp=when)
        (row,) = (row for part in files_of(out).values() for row in part)
        ask = {"user_id": "u", "timestamp": when, "explain": True}
        answer = httpx2.post(f"{habit_url}/recommend", json=ask, timeout=60).json()
        assert row["items"] == [item["item_id"] for item in answer["items"]]
        assert row["scores"] == pytest.approx([item["score"] for item in answer["items"]], abs=1e-5)
        assert row["items"][0] == usual
        assert recommend_all(habit_run, habit_memory_url, out).before == FEWEST_FILES  # whenever it was for
    with pytest.raises(BulkError, match="holds other recommendations"):
        recommend_all(habit_run, habit_memory_url, tmp_path / "7", timestamp=when)
    recommend_all(habit_run, habit_memory_url, tmp_path / "new", exclude_seen=True)
    (row,) = (row for part in files_of(tmp_path / "new").values() for row in part)
    assert {"i1", "i2"}.isdisjoint(row["items"])
    with pytest.raises(BulkError, match="is not a time in seconds"):
        recommend_all(habit_run, habit_memory_url, tmp_path / "ms", timestamp=when * 1000)


def test_broken_off_it_goes_on_with_the_files_that_are_missing(known_url, memory_url, run, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    for folder in (whole, out):
        recommend_all(run, memory_url, folder)
    lost = sorted(out.glob("*.parquet"))[3:9:2]
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet") if file not in lost}
    for file in lost:
        file.rename(file.with_suffix(".partial"))
    written = recommend_all(run, memory_url, out)
    assert (written.files, written.before) == (len(lost), len(kept))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert files_of(out) == close(files_of(whole))
    assert not list(out.glob("*.partial"))
    with pytest.raises(BulkError, match=r"holds other recommendations .* choose another --out"):
        recommend_all(run, memory_url, out, top_n=3)


def test_it_does_not_count_as_a_use(known_url, memory_url, run, tmp_path, valkey_url):
    recommend_all(run, memory_url, tmp_path / "out")
    with httpx2.Client(base_url=known_url, timeout=60) as client:
        event = {"user_id": "u3", "item_id": "i9", "timestamp": 1.7e9}
        assert client.post("/memories", json={"interactions": [event]}).json()["accepted"] == 1
        assert {entry["access"] for entry in client.get("/users/u3/memory").json()["entries"]} == {0}


def test_half_a_memory_is_no_answer(memory_url, run, tmp_path, monkeypatch, known_url):
    """A service that loses Redis under way: nothing wrong is written."""
    monkeypatch.setattr("api.jobs.recommend_all.PAUSE_S", 0.0)
    monkeypatch.setattr("api.jobs.recommend_all.recommend", degraded)
    with pytest.raises(BulkError, match="without all of its memories"):
        recommend_all(run, memory_url, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


# ----------------------------------------------------------------------------------------------- on Ray


def test_the_cluster_that_is_started_listens_on_loopback_alone(cluster):
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    assert cluster.workers == 2


def test_on_ray_recommendations_are_the_same(known_url, memory_url, run, tmp_path, cluster):
    here = recommend_all(run, memory_url, tmp_path / "here")
    there = recommend_all(run, memory_url, tmp_path / "there", runner=cluster)
    assert here == there
    assert files_of(tmp_path / "there") == close(files_of(tmp_path / "here"))


@pytest.mark.parametrize("timed", [True, False])
def test_on_ray_histories_arrive_the_same(run, valkey_url, tmp_path, stack, cluster, monkeypatch, timed):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / ("log.csv" if timed else "log.txt")
    taken = {user: [f"i{1 + (n * 7 + step * step) % 30}" for step in range(60)] for n, user in enumerate(USERS[:40])}
    rows = [f"{user},{item},{1_600_000_000 + n}" for user, items in taken.items() for n, item in enumerate(items)]
    if timed:
        random.Random(0).shuffle(rows)
        file.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    else:
        file.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in taken.items()))
    found = []
    for number, runner in enumerate((LOCAL, cluster)):
        settings = MemorySettings(run=run, redis_url=f"{valkey_url}?db={number}")
        memory = stack.enter_context(served(create_memory(settings)))
        url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory))))
        first, again = (backfill(url, file, runner=runner) for _ in range(2))
        assert (first.tally.accepted, first.tally.rows, first.before) == (len(rows), len(rows), 0)
        assert (again.tally, again.before) == (first.tally, len(rows))
        assert backfill(url, file, runner=runner, again=True).tally.duplicates == len(rows)
        with httpx2.Client(base_url=url) as client:
            found.append({user: remembered(client, user, timed) for user in taken})
    assert found[0] == found[1]


def test_on_ray_everybody_moves(known_url, memory_url, run, other, cluster):
    with httpx2.Client(base_url=known_url, timeout=60) as client:
        assert client.post("/model/reload", json={"run": str(other)}).json()["state"] == "moving"
        assert reembed(other, memory_url, runner=cluster) == len(USERS)
        assert client.get("/health/ready").status_code == 200  # an api that finds the memory service ahead follows it
        state = client.get("/model").json()
        assert state["model_version"] == state["wanted"] == version(other)
        asks = {"requests": [{"user_id": user} for user in USERS[:200]]}
        answers = client.post("/recommend/batch", json=asks).json()["results"]
        assert {(one["model_version"], one["memory"]["degraded"]) for one in answers} == {(version(other), False)}


def lists_of(out: Path) -> dict[str, dict[str, object]]:
    """Items and scores of each user."""
    rows = [row for part in files_of(out).values() for row in part]
    return {row["user_id"]: score_of(zip(row["items"], row["scores"], strict=True)) for row in rows}


def score_of(pairs: Iterable[tuple[str, float]]) -> dict[str, object]:
    return {item: pytest.approx(score, abs=1e-5) for item, score in pairs}


def lists_over_http(url: str) -> dict[str, dict[str, object]]:
    asks = {"requests": [{"user_id": user, "top_n": 30, "explain": True} for user in USERS[:200]]}
    answers = httpx2.post(f"{url}/recommend/batch", json=asks, timeout=60).json()["results"]
    return {
        user: score_of((item["item_id"], item["score"]) for item in answer["items"])
        for user, answer in zip(USERS, answers, strict=False)
    }


def test_over_a_redis_cluster_and_a_group_of_replicas_it_is_all_the_same(
    known_url, memory_url, run, other, tmp_path, stack, cluster, valkey_cluster
):
    valkey_cluster.flush()
    replicas = Replicas(run, valkey_cluster.url, stack, collective_users=2)
    replicas.add(), replicas.add()
    replicas.settle()
    api = replicas.api()
    make_known(str(api.base_url))
    until(
        lambda: lists_over_http(str(api.base_url)) == lists_over_http(known_url)
    )  # holders are counted within a second
    recommend_all(run, memory_url, tmp_path / "alone", top_n=30)
    for name, runner in (("here", LOCAL), ("on ray", cluster)):
        written = recommend_all(run, api.memory_url, tmp_path / name, top_n=30, runner=runner)
        assert written.users == len(USERS)
        assert lists_of(tmp_path / name) == lists_of(tmp_path / "alone")
    assert api.post("/model/reload", json={"run": str(other)}).json()["state"] == "moving"
    assert reembed(other, api.memory_url, runner=cluster) == len(USERS)
    until(lambda: api.get("/model").json()["model_version"] == version(other))
    moved = api.post("/recommend/batch", json={"requests": [{"user_id": user} for user in USERS[:200]]}).json()
    assert {one["model_version"] for one in moved["results"]} == {version(other)}


def test_what_goes_wrong_in_a_worker_is_said_here(memory_url, other, cluster):
    with pytest.raises(ReembedError, match="POST /model/reload first"):
        reembed(other, memory_url, runner=cluster)
    with pytest.raises(BulkError, match=r"a Ray worker failed: TypeError.*divmod"):
        list(cluster.run(divmod, split(3), lambda looked_at, done: None))  # workers know no module of the tests


async def degraded(models, asked):
    answers = await recommend(models, asked)
    for answer in answers[-1:]:
        answer["memory"]["degraded"] = True
    return answers
