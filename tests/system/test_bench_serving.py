"""What the serving benchmark measures with: load generator, checks of answers, reports."""

import asyncio
import json
import socket
import threading

import httpx2
import pytest
from fastapi import FastAPI, Response

from api.http.schemas.recommend import RecommendRequest
from api.recommend.pipeline import recommend
from benchmarks.serving.asking import LoadError, Look, Probes, parsed, write_bodies
from benchmarks.serving.deployment import Deployment, is_empty, serving
from benchmarks.serving.floor import create_app as create_floor
from benchmarks.serving.in_process import with_memory_inside, with_memory_service
from benchmarks.serving.openloop import OpenLoop, http_requests
from benchmarks.serving.speed import Spent, profile
from tests.conftest import served
from tests.synthetic import cyclic_dataset

BODIES = [b'{"n": 1}', b'{"n": 2}']


def load(url, rate=400.0, seconds=0.25):
    host, port = url.removeprefix("http://").split(":")
    return OpenLoop((host, int(port)), http_requests(f"{host}:{port}", "/x", BODIES), rate, seconds).run().report()


def test_every_request_is_sent_and_counted_by_status():
    app, bodies = FastAPI(), []

    @app.post("/x")
    def answer(body: dict[str, int]) -> Response:
        bodies.append(body["n"])
        return Response("", 503, {"Retry-After": "1"}) if body["n"] == 2 else Response("x" * 300_000)

    with served(app) as url:
        report = load(url)
    assert sorted(bodies) == [1] * 50 + [2] * 50
    assert (report["sent"], report["broken"], report["unanswered"]) == (100, 0, 0)
    assert {status: one["count"] for status, one in report["answers"].items()} == {"200": 50, "503": 50}
    assert [report["answers"][status]["with_retry_after"] for status in ("200", "503")] == [0, 50]


def test_requests_do_not_wait_for_answers():
    app, arrived, all_there = FastAPI(), [], asyncio.Event()

    @app.post("/x")
    async def answer(body: dict[str, int]) -> str:
        arrived.append(body)
        if len(arrived) == 100:
            all_there.set()
        await all_there.wait()
        return "there"

    with served(app) as url:
        report = load(url)
    assert report["answers"]["200"]["count"] == 100
    assert report["connections"] == 100
    assert report["answers"]["200"]["max_ms"] >= 1e3 * 99 / 400  # the first waited for the last


def test_a_server_that_hangs_up_is_noted():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            for _ in range(20):
                listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        report = load(f"http://127.0.0.1:{listener.getsockname()[1]}", rate=200, seconds=0.1)
        thread.join()
    assert (report["sent"], report["broken"], report["answers"]) == (20, 20, {})


def test_wrk_reports():
    report = {"requests": 300, "seconds": 2.0, "p50_ms": 1.5, "p99_ms": 9.0, "failed": 0}
    found = parsed(f"Running 2s test\n\n{json.dumps(report)}\n", cpu_s=0.3)
    assert (found.rate, found.p99_ms, found.requests) == (150.0, 9.0, 300)
    with pytest.raises(LoadError, match="3 of 300"):
        parsed(json.dumps(report | {"failed": 3}), cpu_s=0.3)


def test_bodies_are_of_the_dataset(tmp_path):
    dataset = cyclic_dataset(users=5, items=60, length=70)
    write_bodies(tmp_path, dataset)
    users, sequences, batches = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("users", "sequences", "batches")
    )
    assert [one["user_id"] for one in users] == list(dataset.user_ids)
    had = [dataset.item_ids[item - 1] for item in dataset.items[:70]]
    taken = {tuple(one["sequence"]) for one in sequences}
    assert {len(one) for one in taken} == {50}
    assert tuple(had[20:]) in taken
    assert {len(one["requests"]) for one in batches} == {64}


def test_answers_that_are_not_whole_are_noticed(api_url, tmp_path):
    (tmp_path / "users").write_text('{"user_id": "me"}\n')
    look = Look(f"{api_url}/recommend", tmp_path / "users")
    with pytest.raises(LoadError, match="popularity"):
        look()
    httpx2.post(f"{api_url}/memories", json={"interactions": [{"user_id": "me", "item_id": "i1"}]}).raise_for_status()
    look()
    with pytest.raises(LoadError, match="422"):
        Look(f"{api_url}/recommend/batch", tmp_path / "users")()


def test_the_profile_is_of_the_requests_between():
    before = Spent({"api": 1.0}, {"queue": (1.0, 10.0), "score": (0.5, 5.0)})
    after = Spent({"api": 1.2}, {"queue": (2.0, 110.0), "score": (0.9, 25.0), "encode": (0.0, 0.0)})
    values = {one.name: one.value for one in profile(before, after)}
    assert values["profile: CPU a request, api"] == pytest.approx(2000)
    assert values["profile: time in stage score, 5.0 requests at a time"] == pytest.approx(20_000)
    assert not any("encode" in name for name in values)


def test_the_processes_of_a_service_are_found(run, tmp_path):
    with serving(run, tmp_path / "memories") as url:
        deployment = Deployment.at(url)
        assert is_empty(url)
        assert deployment.accepted() == 0
        assert deployment.redis_url == f"unix://{tmp_path / 'memories' / 'valkey.sock'}"
        assert min(deployment.cpu_s().values()) >= 0
        probes = Probes(url)
        probes()
        assert (probes.failed, [len(times) for times in probes.times.values()]) == (0, [1, 1])
    with pytest.raises(RuntimeError, match="no `python -m api`"):
        Deployment.at(url)


def test_answers_without_our_api_are_the_same(api_url, memory_url, valkey_url, run, go):
    events = [{"user_id": f"u{n % 3}", "item_id": f"i{n}"} for n in range(1, 16)]
    httpx2.post(f"{api_url}/memories", json={"interactions": events}).raise_for_status()
    served = [httpx2.post(f"{api_url}/recommend", json={"user_id": f"u{n}"}).json() for n in range(3)]

    async def asked(opening):
        models = await opening
        answers = await recommend(models, [RecommendRequest(user_id=f"u{n}") for n in range(3)])
        await models.serving.close()
        return answers

    for opening in (with_memory_inside(run, valkey_url), with_memory_service(run, memory_url)):
        for ours, theirs in zip(served, go(asked(opening)), strict=True):
            assert [item["item_id"] for item in ours["items"]] == [item["item_id"] for item in theirs["items"]]
            assert [item["score"] for item in ours["items"]] == pytest.approx(
                [i["score"] for i in theirs["items"]], abs=1e-5
            )
            assert ours["memory"] == theirs["memory"]


def test_the_floor_answers_like_the_api(api_url):
    with served(create_floor()) as url:
        fixed, real = (httpx2.post(f"{base}/recommend", json={"user_id": "a"}).json() for base in (url, api_url))
    assert fixed["user_id"] == "a"
    assert fixed.keys() == real.keys()
    assert fixed["memory"].keys() == real["memory"].keys()
    assert fixed["items"][0].keys() == real["items"][0].keys()
