"""Deadlines of requests, in the api and passed on to the memory service."""

import asyncio
import math
import time

import httpx2
import msgspec
import pytest
from fastapi import FastAPI, Request, Response

from api.http.app import create_app as create_api
from api.http.problems import DeadlineExceeded
from api.recommend.batching import MicroBatcher
from api.settings import ApiSettings
from memory_service.protocol.call.context import CALL, Call, timeout_s, together
from memory_service.protocol.structs import CONTENT_TYPE, CatalogueReply, RetrieveRequest
from memory_service.service.merging import Merged, TooLate
from tests.conftest import served

EVENT = {"interactions": [{"user_id": "u", "item_id": "i1"}]}


@pytest.fixture
def hanging(stack):
    """URL of a memory service that never answers the calls of requests, and the headers that it was sent."""
    app, heard = FastAPI(), []

    @app.get("/v1/catalogue")
    async def catalogue() -> Response:
        return Response(msgspec.msgpack.encode(CatalogueReply(1, 0, [], 0, [])), media_type=CONTENT_TYPE)

    @app.post("/v1/{call}")
    async def hang(call: str, request: Request) -> Response:
        heard.append(dict(request.headers))
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        return Response()

    return stack.enter_context(served(app)), heard


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/recommend", {"user_id": "u"}),
        ("/recommend/batch", {"requests": [{"user_id": "u"}, {"user_id": "v"}]}),
        ("/memories", EVENT),
    ],
)
def test_a_request_past_its_deadline_is_answered_503(run, hanging, stack, path, body):
    memory_url, heard = hanging
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url))))
    for within_ms in (200, 1000, 5000):  # a busy machine may let the first pass before the memory service is called
        asks = {"X-Request-Timeout-Ms": str(within_ms)}
        answer = httpx2.post(f"{url}{path}", json=body, headers=asks, timeout=30)
        assert (answer.status_code, answer.json()["code"]) == (503, "deadline_exceeded")
        assert answer.headers["retry-after"] == "1"
        if heard:
            break
    assert 1 <= int(heard[0]["x-request-timeout-ms"]) <= within_ms


def test_the_setting_is_the_deadline_of_those_who_name_none(run, hanging, stack):
    memory_url, _ = hanging
    settings = ApiSettings(run=run, memory_url=memory_url, request_timeout_s=0.2)
    url = stack.enter_context(served(create_api(settings)))
    for path, body in (("/recommend", {"user_id": "u"}), ("/memories", EVENT)):
        assert httpx2.post(f"{url}{path}", json=body, timeout=30).json()["code"] == "deadline_exceeded"


@pytest.mark.parametrize("sent", ["0", "-1", "60001", "1.5", "soon", "1" * 40, "²"])
def test_a_deadline_that_makes_no_sense_is_refused(api_url, sent):
    answer = httpx2.post(f"{api_url}/recommend", json={}, headers={"X-Request-Timeout-Ms": sent.encode()})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "X-Request-Timeout-Ms" in answer.json()["detail"]


def test_enough_time_changes_nothing(api_url):
    with httpx2.Client(base_url=api_url, headers={"X-Request-Timeout-Ms": "60000"}) as client:
        assert client.post("/memories", json=EVENT).json()["accepted"] == 1
        assert client.post("/recommend", json={"user_id": "u"}).json()["source"] == "memory"
        assert client.get("/users/u/memory").is_success


def test_what_waits_past_its_deadline_is_not_worked_on(go):
    worked = []

    async def work(asks):
        worked.extend(asks)
        await asyncio.sleep(0)
        return asks

    async def run() -> None:
        batcher = MicroBatcher(work, 8, 0.0, 256, lambda waited: None)
        CALL.set(Call("late", time.monotonic() - 1))
        late = asyncio.create_task(batcher.submit(["late"]))
        CALL.set(Call("fine", time.monotonic() + 60))
        fine = asyncio.create_task(batcher.submit(["fine"]))
        assert await fine == ["fine"]
        with pytest.raises(DeadlineExceeded):
            await late
        await batcher.stop()

    go(run())
    assert worked == ["fine"]


def test_the_caller_who_set_a_deadline_does_not_wait_for_the_batch(go):
    async def run() -> None:
        release = asyncio.Event()

        async def work(asks):
            await release.wait()
            return asks

        batcher = MicroBatcher(work, 8, 0.0, 256, lambda waited: None)
        patient = asyncio.create_task(batcher.submit(["patient"]))
        await asyncio.sleep(0)
        CALL.set(Call("hasty", time.monotonic(), timed=True))
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(["hasty", "hasty too"])
        release.set()
        assert await patient == ["patient"]
        await batcher.stop()

    go(run())


def test_a_batch_has_the_first_id_and_the_latest_deadline():
    calls = [Call("a", 5.0, traceparent="x"), None, Call("b", 9.0), Call("c", 7.0)]
    both = together(calls)
    assert (both.request_id, both.deadline, both.traceparent) == ("a", 9.0, "x")
    assert together(calls[:1]) is calls[0]
    assert together([None, calls[0]]) is None


def test_the_memory_service_drops_what_nobody_waits_for(go):
    async def run() -> list[str]:
        begun, worked = asyncio.Event(), []

        async def work(items):
            worked.extend(items)
            await begun.wait()
            return items

        merged = Merged(work, lambda item: item)
        first = [asyncio.create_task(merged([name])) for name in ("a", "b")]  # as many as are worked on at once
        await asyncio.sleep(0)
        CALL.set(Call("late", time.monotonic()))
        late = asyncio.create_task(merged(["late"]))
        await asyncio.sleep(0)
        begun.set()
        with pytest.raises(TooLate):
            await late
        assert await asyncio.gather(*first) == [["a"], ["b"]]
        return worked

    assert go(run()) == ["a", "b"]


def test_a_body_that_comes_in_too_late_is_not_worked_on(go, run, memory_url):
    async def slow() -> bytes:
        body = msgspec.msgpack.encode(RetrieveRequest("m", ["u"]))
        head = (
            f"POST /v1/retrieve HTTP/1.1\r\nHost: m\r\nContent-Length: {len(body)}\r\nX-Request-Timeout-Ms: 1\r\n\r\n"
        )
        host, port = memory_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body[:5])
        await writer.drain()
        end = time.monotonic() + 0.05
        while time.monotonic() < end:  # the time of the call passes before its body is whole
            await asyncio.sleep(0.01)
        writer.write(body[5:])
        answer = await asyncio.wait_for(reader.read(4096), 30)
        writer.close()
        return answer

    answer = go(slow())
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"deadline_exceeded" in answer


def test_what_is_said_of_time():
    assert timeout_s(None) is None
    assert timeout_s(b"1500") == 1.5
    assert Call("x").left_s == math.inf
    assert "X-Request-Timeout-Ms" not in Call("x").onward()
    assert Call("x", time.monotonic() - 5).onward()["X-Request-Timeout-Ms"] == "1"
