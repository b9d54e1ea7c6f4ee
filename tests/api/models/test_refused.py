"""Models that cannot be served are refused, and the one that serves stays."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest
import redis

from model.checkpoint import HEADER_FILE, WEIGHTS_FILE, load_checkpoint, save_checkpoint
from tests.api.models.changing import USERS, same, version
from tests.synthetic import random_checkpoint, small_config


def _flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-100])


def _of_another_format(folder: Path) -> None:
    header = json.loads((folder / HEADER_FILE).read_text())
    (folder / HEADER_FILE).write_text(json.dumps(header | {"format": 9}))


def _of_another_capacity(folder: Path) -> None:
    config = small_config()
    rules = config.rules.model_copy(update={"capacity": 20})
    save_checkpoint(folder, random_checkpoint(config.model_copy(update={"rules": rules}), seed=3))


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flipped, "content does not match version"),
        (_truncated, "cannot read"),
        (_of_another_format, "checkpoint format 9"),
        (_of_another_capacity, "rules.capacity 20, the serving model 10"),
        (_empty, "no checkpoint at"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_old_one_goes_on(service, run, other, tmp_path, damage, reason):
    before = service.answers(*USERS)
    save_checkpoint(tmp_path, load_checkpoint(other))
    damage(tmp_path)
    response = service.api.post("/model/reload", json={"run": str(tmp_path)})
    assert (response.status_code, response.json()["code"]) == (422, "checkpoint_refused")
    assert reason in response.json()["detail"]
    assert service.serving() == (version(run), version(run))
    same(service.answers(*USERS), before)
    assert service.take("u0", items=range(4, 5))["accepted"] == 1


def test_a_body_that_names_no_folder_is_refused(service):
    for body in ({"run": ""}, {"run": 5}, {"runs": "x"}):
        assert service.api.post("/model/reload", json=body).status_code == 422
    assert service.api.post("/model/reload", json={"run": "a\0b"}).json()["code"] == "checkpoint_refused"


def test_a_process_that_cannot_read_the_wanted_model_says_so_and_goes_on(service, run, other, valkey_url):
    with redis.Redis.from_url(valkey_url) as client:
        state = {"serving": version(run), "serving_run": str(run), "wanted": "f" * 16, "wanted_run": str(other)}
        client.set("ramrec:model", json.dumps(state | {"base": version(run)}))
    url = f"{service.memory_url}/v1/stale?version={'f' * 16}"
    assert httpx2.get(url).status_code == 409  # it looked
    ready = httpx2.get(f"{service.memory_url}/health/ready").json()
    assert f"holds model {version(other)}" in ready["trouble"]
    assert service.models(*USERS) == {version(run)}
    service.take("u0", items=range(4, 5))
