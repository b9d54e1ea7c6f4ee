"""A Python client that is made from the api's OpenAPI document works against the running service."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import httpx2
import pytest

PACKAGE = "ramrec_client"


@pytest.fixture
def generated(api_url, tmp_path, monkeypatch) -> Path:
    """The folder of the generated package, on the import path."""
    document = tmp_path / "openapi.json"
    document.write_bytes(httpx2.get(f"{api_url}/openapi.json").content)
    options = ["--path", str(document), "--output-path", str(tmp_path / PACKAGE), "--meta", "none", "--fail-on-warning"]
    (tmp_path / "config.json").write_text(json.dumps({"post_hooks": []}))  # these would only format
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "openapi_python_client",
            "generate",
            *options,
            "--config",
            str(tmp_path / "config.json"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / PACKAGE
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def part(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def test_a_generated_client_works(generated, api_url):
    models = part("models")
    with part("client").Client(base_url=api_url, raise_on_unexpected_status=True) as client:
        taken = [models.Interaction(user_id="a/b", item_id=item, rating=5.0) for item in ("i1", "i2", "new one")]
        kept = part("api.memory.remember").sync(client=client, body=models.IngestRequest(interactions=taken))
        assert (kept.accepted, kept.versions.to_dict()) == (3, {"a/b": 1})
        bank = part("api.memory.user_memory").sync("a/b", client=client)
        assert [entry.item_id for entry in bank.entries] == ["i1", "i2", "new one"]

        asked = models.RecommendRequest(user_id="a/b", top_n=4, explain=True)
        answer = part("api.recommend.recommend_one").sync(client=client, body=asked)
        assert (answer.source, len(answer.items), answer.memory.bank_size) == ("memory", 4, 3)
        assert answer.items[0].because
        both = models.RecommendBatchRequest(requests=[asked, models.RecommendRequest(sequence=["i3"], top_n=2)])
        answers = part("api.recommend.recommend_batch").sync(client=client, body=both)
        assert [len(one.items) for one in answers.results] == [4, 2]

        about = models.ItemPutMetadata.from_dict({"title": "Alien", "year": 1979})
        part("api.catalogue.put_item").sync("new one", client=client, body=models.ItemPut(metadata=about))
        found = part("api.catalogue.items").sync(client=client, query="alien")
        assert [(item.item_id, item.metadata["year"]) for item in found.items] == [("new one", 1979)]
        assert part("api.memory.users").sync(client=client, prefix="a").users == ["a/b"]
        assert part("api.memory.forget").sync("a/b", client=client).existed
        assert part("api.model.model").sync(client=client).items == 30
        assert part("api.probes.ready").sync(client=client).status == "ready"


def test_a_generated_client_gives_problems_as_such(generated, api_url):
    models = part("models")
    with part("client").Client(base_url=api_url, raise_on_unexpected_status=True) as client:
        nobody = part("api.memory.user_memory").sync_detailed("nobody", client=client)
        assert (nobody.status_code, type(nobody.parsed), nobody.parsed.code) == (404, models.Problem, "user_not_found")
        too_many = models.RecommendRequest(top_n=100_000)
        refused = part("api.recommend.recommend_one").sync(client=client, body=too_many)
        assert (refused.status, refused.code, refused.errors[0].field) == (422, "invalid_request", "top_n")
