"""The memory service is away, is something else, or callers leave."""

import socket
import threading

import httpx2
import msgspec
import pytest
from fastapi import FastAPI, Request, Response

from api.http.app import create_app as create_api
from api.http.problems import MemoryUnavailable
from api.http.services import Services
from api.memory.client import MemoryClient
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.columns import Columns
from memory_service.protocol.question import Question
from memory_service.protocol.structs import RetrieveReply
from memory_service.settings import MemorySettings
from tests.api.calls import recommend, remember
from tests.conftest import served


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
            with pytest.raises(MemoryUnavailable, match="invalid reply: rows"):
                await memory.retrieve(Question("v", ["u"]))
        finally:
            await memory.close()

    go(scene())


def test_a_closed_connection_is_noticed_through_the_whole_application(run, memory_url, stack):
    """While the model is busy two callers queue; the second hangs up and is never worked for."""
    app, free = (
        create_api(ApiSettings(run=run, memory_url=memory_url, batch_size=1, batch_lanes=1, patience_s=0)),
        threading.Event(),
    )

    @app.get("/busy")
    async def busy(request: Request) -> None:
        await Services.of(request).engine.compute(free.wait)

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
