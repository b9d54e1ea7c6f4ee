"""Where the REST API could break: hostile values, overload, callers that leave, strangers in place of the memory
service, and the processes of `ramrec serve`.
"""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import msgspec
import numpy as np
import pytest
from fastapi import FastAPI, Response

from api.catalogue.catalogue import CatalogueMirror
from api.commands.supervisor import ServeError, serve
from api.http.app import create_app as create_api
from api.http.problems import CallerGone, MemoryUnavailable, Overloaded
from api.memory.client import MemoryClient
from api.recommend.batching import MicroBatcher
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.protocol.structs import CatalogueReply, Columns, Item, RetrieveReply, RetrieveRequest
from tests.conftest import served

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


# ------------------------------------------------------------------------------------- hostile values

EVENT = '{"interactions": [{"user_id": "u", "item_id": "i1", %s}]}'


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/recommend", b'{"user_id": "\xff"}', 400, "invalid_json"),
        ("POST", "/recommend", b"[" * 100_000, 400, "invalid_json"),
        ("POST", "/recommend", b'{"\\ud800": 1}', 400, "invalid_json"),
        ("POST", "/recommend", b'{"filters": {}}', 422, "invalid_request"),
        ("POST", "/recommend", b'{"explain": 1}', 422, "invalid_request"),
        ("POST", "/recommend", b'{"top_n": true}', 422, "invalid_request"),
        ("POST", "/recommend/batch", b'{"requests": [{}, {"top_n": 0}]}', 422, "invalid_request"),
        ("POST", "/recommend", b'{"timestamp": "12.5"}', 422, "invalid_request"),
        ("POST", "/recommend", b'{"timestamp": true}', 422, "invalid_request"),
        ("POST", "/recommend", b'{"timestamp": Infinity}', 422, "invalid_request"),
        ("POST", "/recommend", b'{"timestamp": 1%s}' % (b"0" * 400), 422, "invalid_request"),
        ("POST", "/memories", EVENT % '"timestamp": "12.5"', 422, "invalid_request"),
        ("POST", "/memories", EVENT % '"timestamp": true', 422, "invalid_request"),
        ("POST", "/memories", EVENT % f'"timestamp": 1{"0" * 400}', 422, "invalid_request"),
        ("POST", "/memories", EVENT % '"rating": 1e300', 422, "invalid_request"),
        ("POST", "/memories", EVENT % '"rating": Infinity', 422, "invalid_request"),
        ("POST", "/memories", EVENT % '"event_id": ""', 422, "invalid_request"),
        ("PUT", "/items/x", b'{"metadata": {"a": NaN}}', 422, "invalid_request"),
        ("PUT", "/items/x", b'{"metadata": {"a": "\\ud800"}}', 422, "invalid_request"),
        ("PUT", "/items/x", f'{{"metadata": {{"a": 1{"0" * 30}}}}}', 422, "invalid_request"),
        ("PUT", "/items/x", b'{"metadata": {"a": %s}}' % (b"[" * 100 + b"]" * 100), 422, "invalid_request"),
        ("PUT", "/items/x", b'{"metadata": {"a": "%s"}}' % (b"x" * 70_000), 422, "invalid_request"),
        ("PATCH", "/items/i1", b'{"metadata": {"a": [Infinity]}}', 422, "invalid_request"),
        ("PATCH", "/items/nope", b'{"hidden": true}', 404, "item_not_found"),
        ("GET", "/users/%00/memory", b"", 422, "invalid_request"),
        ("GET", "/users//memory", b"", 422, "invalid_request"),
        ("GET", "/users?limit=0", b"", 422, "invalid_request"),
        ("GET", f"/users?prefix={'x' * 300}", b"", 422, "invalid_request"),
        ("GET", "/items?limit=1001", b"", 422, "invalid_request"),
    ],
)
def test_hostile_values_are_refused_before_anything_is_stored(client, method, path, body, status, code):
    content = body if isinstance(body, bytes) else body.encode()
    response = client.request(method, path, content=content, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert client.get("/users/u/memory").status_code == 404
    assert client.get("/items/x").status_code == 404


def test_an_error_names_the_field(client):
    found = client.post("/memories", json={"interactions": [{"user_id": "u", "item_id": "i", "rating": "good"}]}).json()
    assert [error["field"] for error in found["errors"]] == ["interactions.0.rating"]


@pytest.mark.parametrize(
    "stamp", [-1.0, time.time() * 1000, time.time() + 2 * 86400], ids=["negative", "milliseconds", "two days ahead"]
)
def test_a_time_of_a_request_is_refused_in_the_words_in_which_that_of_an_event_is(client, stamp):
    event = {"user_id": "u", "item_id": "i1", "timestamp": stamp}
    (rejected,) = client.post("/memories", json={"interactions": [event]}).json()["rejected"]
    for path, body, field in (
        ("/recommend", {"timestamp": stamp}, "timestamp"),
        ("/recommend/batch", {"requests": [{}, {"timestamp": stamp}]}, "requests.1.timestamp"),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 422
        (error,) = response.json()["errors"]
        assert (error["field"], error["message"]) == (field, f"Value error, {rejected['detail']}")


def test_numbers_without_a_fraction_are_numbers(client):
    event = {"user_id": "u", "item_id": "i1", "timestamp": 1_600_000_000, "rating": 5}
    assert client.post("/memories", json={"interactions": [event]}).json()["accepted"] == 1


def test_what_should_not_happen_is_a_problem_document_too(run, memory_url, stack):
    app = create_api(ApiSettings(run=run, memory_url=memory_url))
    app.add_api_route("/broken", lambda: 1 // 0)
    url = stack.enter_context(served(app))
    response = httpx2.get(f"{url}/broken")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "division" not in response.text
    metrics = httpx2.get(f"{url}/metrics").text
    assert 'ramrec_api_requests_total{route="/broken",status="500"} 1.0' in metrics


def test_metadata_is_merged_and_hiding_can_be_undone(client):
    client.put("/items/i2", json={"metadata": {"title": "Two"}, "hidden": True})
    assert client.patch("/items/i2", json={"metadata": {"year": 2000}}).json()["hidden"]
    shown = client.patch("/items/i2", json={"hidden": False}).json()
    assert (shown["hidden"], shown["metadata"]) == (False, {"title": "Two", "year": 2000})


# --------------------------------------------------------------------------- overload, callers that leave


async def _doubled(numbers):
    return [2 * number for number in numbers]


def batcher(work=_doubled, limit=8, patience_s=60.0) -> MicroBatcher:
    return MicroBatcher(work, 4, 0.0, limit, lambda seconds: None, patience_s)


def test_callers_get_their_own_answers(go):
    async def scene():
        batches = batcher()
        answers = await asyncio.gather(*(batches.submit([n, 10 * n]) for n in range(4)))
        await batches.stop()
        return answers

    assert go(scene()) == [[0, 0], [2, 20], [4, 40], [6, 60]]


def test_requests_beyond_the_limit_are_refused_at_once_and_none_of_theirs_is_done(go):
    async def scene():
        batches = batcher(limit=3)
        waiting = asyncio.ensure_future(batches.submit([1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batches.submit([3, 4])
        answers = await waiting
        await batches.stop()
        return answers

    assert go(scene()) == [2, 4]


def test_no_work_is_done_for_those_who_left(go):
    done = []

    async def noted(numbers):
        done.extend(numbers)
        return numbers

    async def hung_up() -> bool:
        return True

    async def still_there() -> bool:
        return False

    async def scene():
        batches = batcher(noted, patience_s=0.0)
        left = asyncio.ensure_future(batches.submit([1], hung_up))
        cancelled = asyncio.ensure_future(batches.submit([2]))
        stays = asyncio.ensure_future(batches.submit([3], still_there))
        await asyncio.sleep(0)
        cancelled.cancel()
        outcomes = await asyncio.gather(left, cancelled, stays, return_exceptions=True)
        await batches.stop()
        return outcomes

    left, cancelled, stays = go(scene())
    assert isinstance(left, CallerGone)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert (stays, done) == ([3], [3])


def test_an_error_reaches_all_of_its_batch_and_the_next_batch_is_answered(go):
    async def picky(numbers):
        if 13 in numbers:
            raise MemoryUnavailable("out of luck")
        return numbers

    async def scene():
        batches = batcher(picky)
        first = await asyncio.gather(*(batches.submit([n]) for n in (13, 1)), return_exceptions=True)
        second = await batches.submit([2])
        await batches.stop()
        return first, second

    first, second = go(scene())
    assert [type(error) for error in first] == [MemoryUnavailable, MemoryUnavailable]
    assert second == [2]


def test_a_closed_connection_is_noticed_through_the_whole_application(run, memory_url, stack):
    """While the model is busy two callers queue; the second hangs up and is never worked for."""
    app, free = (
        create_api(ApiSettings(run=run, memory_url=memory_url, batch_size=1, batch_lanes=1, patience_s=0)),
        threading.Event(),
    )

    @app.get("/busy")
    async def busy() -> None:
        await app.state.engine.compute(free.wait)

    url = stack.enter_context(served(app))
    client = stack.enter_context(httpx2.Client(base_url=url))
    blocker, stays = sent(url, "GET", "/busy"), sent(url, "POST", "/recommend", b"{}")
    assert client.get("/health/live").status_code == 200  # by now the two are under way
    sent(url, "POST", "/recommend", b"{}").close()
    assert client.get("/health/live").status_code == 200
    free.set()
    for waiting in (blocker, stays):
        assert waiting.recv(12) == b"HTTP/1.1 200"
        waiting.close()
    assert client.post("/recommend", json={}).status_code == 200
    metrics = client.get("/metrics").text
    assert 'ramrec_api_requests_total{route="/recommend",status="499"} 1.0' in metrics
    assert 'ramrec_api_answers_total{source="popularity"} 2.0' in metrics


def sent(url: str, method: str, path: str, body: bytes = b"") -> socket.socket:
    """A request under way on a connection of its own."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 30)
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


# ------------------------------------------------------------------------ strangers as memory service


@pytest.fixture
def stranger_url(stack) -> str:
    """A web server that answers everything with 200 and something else than msgpack."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def hello(path: str) -> Response:
        return Response(b"<html>hello</html>", media_type="text/html")

    return stack.enter_context(served(app))


def test_a_stranger_in_place_of_the_memory_service_is_recognised(run, stranger_url, stack):
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=stranger_url))))
    client = stack.enter_context(httpx2.Client(base_url=url))
    answer = client.post("/recommend", json={"user_id": "u"}).json()
    assert (answer["source"], answer["memory"]["degraded"]) == ("popularity", True)
    assert client.post("/memories", json={"interactions": [{"user_id": "u", "item_id": "i1"}]}).status_code == 503
    assert client.get("/users/u/memory").status_code == 503
    ready = client.get("/health/ready")
    assert (ready.status_code, "not a memory service?" in ready.json()["status"]) == (503, True)


def test_columns_that_do_not_fit_are_recognised(stack, go):
    none = Columns(b"", b"", b"", b"", b"", b"")
    odd = RetrieveReply(0, False, b"\1", b"123", b"", b"", b"", b"", b"", none, none, b"", b"", [])
    app = FastAPI()

    @app.post("/v1/retrieve")
    async def retrieve() -> Response:
        return Response(msgspec.msgpack.encode(odd))

    url = stack.enter_context(served(app))

    async def scene():
        memory = MemoryClient(url, 5)
        try:
            with pytest.raises(MemoryUnavailable, match="rows of a reply cannot be"):
                await memory.retrieve(RetrieveRequest("v", ["u"]))
        finally:
            await memory.close()

    go(scene())


def test_the_catalogue_mirror_grows_and_changes_step_by_step():
    mirror = CatalogueMirror({"a": 1, "b": 2})
    mirror.take(CatalogueReply(1, 0, [Item("a")], 3))
    before = mirror.model_index
    mirror.take(CatalogueReply(2, 0, [Item("new"), Item("b", None, True)], 3))
    assert before.tolist() == [0, 1]  # the model's thread may still be reading it
    assert mirror.model_index.tolist() == [0, 1, 0, 2]
    assert mirror.number_of == {"a": 1, "new": 2, "b": 3}
    assert mirror.hidden.tolist() == [3]
    assert mirror.indices(np.array([[1, 3]])).tolist() == [[1, 2]]
    mirror.take(CatalogueReply(4, 2, [Item("c")], 4, [(1, Item("a", {"n": 1}, True)), (3, Item("b"))]))
    assert mirror.numbers(["a", "no", "c"]) == [1, 4]
    assert [item.metadata for item in mirror.items] == [{"n": 1}, None, None, None]
    assert (mirror.hidden.tolist(), mirror.revision) == ([1], 2)


# ------------------------------------------------------------------------------------- ramrec serve


class Served:
    """`ramrec serve` as a process of its own; waits until it says that it serves."""

    def __init__(self, run: Path, data_dir: Path, **environment: str) -> None:
        self.port, memory_port = free_port(), free_port()
        words = ["serve", "--run", str(run), "--port", str(self.port), "--memory-port", str(memory_port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", *words, "--data-dir", str(data_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        self.url = f"http://127.0.0.1:{self.port}"

    def children(self) -> dict[str, int]:
        """Process ids of api, memory service and Valkey."""
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in found}
        return {words[2] if "-m" in words else "valkey": child for child, words in commands.items()}

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code and stderr after a signal."""
        self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=60)
        return self.process.returncode, complaints


@pytest.fixture
def serving(run, tmp_path, stack):
    def start(**environment: str) -> Served:
        started = Served(run, tmp_path / "data", **environment)
        stack.callback(started.process.communicate)
        stack.callback(started.process.kill)
        assert started.url in started.greeting
        return started

    return start


def test_serve_comes_up_behind_a_proxy_setting_and_stops_cleanly(serving):
    both = serving(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    with httpx2.Client(base_url=both.url, trust_env=False) as client:
        assert client.get("/health/ready").status_code == 200
    children = both.children()
    assert set(children) == {"api", "memory_service", "valkey"}
    assert both.end(signal.SIGTERM) == (0, "")
    assert not any(Path(f"/proc/{child}").exists() for child in children.values())


def test_when_the_api_dies_serve_stops_the_memory_service_and_says_so(serving):
    both = serving()
    children = both.children()
    os.kill(children["api"], signal.SIGKILL)
    _, complaints = both.process.communicate(timeout=60)
    assert both.process.returncode == 2
    assert complaints.splitlines()[-1].startswith("ramrec: the api ended")
    assert not any(Path(f"/proc/{child}").exists() for child in children.values())


def test_when_serve_is_killed_its_processes_end_and_nothing_is_lost(serving):
    both = serving()
    event = {"user_id": "u", "item_id": "i1"}
    with httpx2.Client(base_url=both.url) as client:
        assert client.post("/memories", json={"interactions": [event]}).json()["accepted"] == 1
    watches = [os.pidfd_open(child) for child in both.children().values()]
    both.process.kill()
    for watch in watches:
        _wait_for_end(watch)
    again = serving(RAMREC_API_LOG_LEVEL="warning")  # same data folder; what is answered is not written
    with httpx2.Client(base_url=again.url) as client:
        assert client.get("/users/u/memory").json()["bank_size"] == 1
    assert again.end(signal.SIGTERM) == (0, "")


def _wait_for_end(watch: int) -> None:
    ended, _, _ = select.select([watch], [], [], 60)
    os.close(watch)
    assert ended


def test_one_port_for_two_services_is_refused(run):
    port = free_port()
    with pytest.raises(ServeError, match=f"cannot both listen on port {port}"):
        serve(run, "127.0.0.1", port, port, None, None, None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--run", "nowhere"], "no checkpoint at nowhere"), (["--port", "99999"], "port"), ([], "run")],
)
def test_the_api_alone_fails_with_one_line(words, complaint):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAMREC_")}
    ended = subprocess.run(
        [sys.executable, "-m", "api", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert complaint in ended.stderr


def test_a_problem_is_json_even_with_odd_characters(client):
    response = client.post("/recommend", content=json.dumps({"ü🦊": 1}).encode(), headers=JSON)
    assert response.json()["errors"][0]["field"] == "ü🦊"


def test_interactions_beyond_the_limit_are_answered_429_and_nothing_of_them_is_kept(memory_url, run, stack):
    app = create_api(ApiSettings(run=run, memory_url=memory_url, ingest_limit=5))
    client = stack.enter_context(httpx2.Client(base_url=stack.enter_context(served(app))))
    three = {"interactions": [{"user_id": "u", "item_id": f"i{n}", "timestamp": 1e9 + n} for n in range(1, 4)]}
    with app.state.intake.admitted(3):  # as another request's, under way
        refused = client.post("/memories", json=three)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["code"] == "ingestion_full"
    assert client.get("/users/u/memory").status_code == 404
    assert client.post("/memories", json=three).json()["accepted"] == 3
    assert app.state.intake.under_way == 0


def test_a_single_large_request_is_taken_where_nothing_else_is_written(memory_url, run, stack):
    app = create_api(ApiSettings(run=run, memory_url=memory_url, ingest_limit=2))
    client = stack.enter_context(httpx2.Client(base_url=stack.enter_context(served(app))))
    three = {"interactions": [{"user_id": "u", "item_id": f"i{n}", "timestamp": 1e9 + n} for n in range(1, 4)]}
    assert client.post("/memories", json=three).json()["accepted"] == 3
