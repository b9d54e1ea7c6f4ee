"""The catalogue, the model, the probes and the metrics, end to end."""

import httpx2

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import load_checkpoint, save_checkpoint
from tests.api.calls import recommend, remember
from tests.conftest import served
from tests.synthetic import random_checkpoint


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


def test_metadata_is_merged_and_hiding_can_be_undone(client):
    client.put("/items/i2", json={"metadata": {"title": "Two"}, "hidden": True})
    assert client.patch("/items/i2", json={"metadata": {"year": 2000}}).json()["hidden"]
    shown = client.patch("/items/i2", json={"hidden": False}).json()
    assert (shown["hidden"], shown["metadata"]) == (False, {"title": "Two", "year": 2000})
