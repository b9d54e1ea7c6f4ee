"""Logs of both services: JSON lines under the request id, which name no user."""

import json
import logging
from contextlib import ExitStack

import httpx2
import pytest
from fastapi import Request

from api.access.keys import create_key
from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.call.context import CALL, Call, request_id
from memory_service.protocol.call.logs import LINES_PER_S, AccessLog, JsonLines
from memory_service.settings import MemorySettings
from tests.api.commands.test_serve import start  # noqa: F401 - a fixture
from tests.conftest import served

USER = "somebody-in-particular"


def listen(stack: ExitStack, *names: str) -> list[dict]:
    """The lines that these loggers write from now on."""
    lines = []

    class Hear(logging.Handler):
        def emit(self, record):
            lines.append(json.loads(JsonLines().format(record)))

    for name in names:
        handler = Hear()
        logging.getLogger(name).addHandler(handler)
        stack.callback(logging.getLogger(name).removeHandler, handler)
    return lines


def lines_of(caplog, logger: str) -> list[dict]:
    return [record.fields for record in caplog.records if record.name == logger]


def test_a_whole_run_names_no_user(start):  # noqa: F811
    """With the real processes at info level: a user's memories are written, used, inspected and forgotten."""
    process, client = start()
    event = {"user_id": USER, "item_id": "i1", "timestamp": 5.0}
    assert client.post("/memories", json={"interactions": [event]}).is_success
    assert client.post("/memories", json={"interactions": [event | {"rating": "bad"}]}).status_code == 422
    assert client.post("/recommend", json={"user_id": USER, "explain": True}).is_success
    assert client.get(f"/users/{USER}/memory").is_success
    assert client.get("/users", params={"prefix": USER}).json()["users"] == [USER]
    assert client.get(f"/users/{USER}/memory/no-such-page").status_code == 404
    assert client.delete(f"/users/{USER}/memory", headers={"X-Request-Id": "forget-7"}).json()["existed"]
    assert client.get(f"/users/{USER}/memory").status_code == 404
    process.terminate()
    text = process.communicate(timeout=60)[0]
    lines = [json.loads(line) for line in text.splitlines()]
    assert USER not in text
    answered = [(line["logger"], line["method"], line["route"], line["status"]) for line in lines]
    assert ("api.access", "DELETE", "/users/{user_id:id}/memory", 200) in answered
    assert ("api.access", "POST", "/memories", 422) in answered
    assert ("api.access", "GET", "unknown", 404) in answered
    assert not [one for one in answered if one[2] in ("/recommend", "/health/ready")]
    both = {line["logger"] for line in lines if line["request_id"] == "forget-7"}
    assert both == {"api.access", "memory_service.access"}


def test_an_answer_carries_the_request_id(api_url):
    with httpx2.Client(base_url=api_url) as client:
        assert client.post("/recommend", json={}, headers={"X-Request-Id": "abc.1"}).headers["x-request-id"] == "abc.1"
        made = [client.get("/model").headers["x-request-id"] for _ in range(3)]
        assert len(set(made)) == 3
        for hostile in ("a b", "x" * 65, "é".encode(), 'a"b'):
            answer = client.post("/recommend", json={"top_n": 0}, headers={"X-Request-Id": hostile})
            assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]
            assert answer.headers["x-request-id"] != hostile


def test_an_unexpected_failure_carries_the_request_id_too_and_is_logged(run, stack):
    app = create_api(ApiSettings(run=run))

    @app.get("/broken")
    async def broken(request: Request) -> None:
        raise RuntimeError("inside")

    with served(app) as url:
        heard = listen(stack, "uvicorn.error")  # after uvicorn has configured it
        answer = httpx2.get(f"{url}/broken", headers={"X-Request-Id": "r-1"})
    assert (answer.status_code, answer.json()["request_id"], answer.headers["x-request-id"]) == (500, "r-1", "r-1")
    (failure,) = [line for line in heard if "exception" in line]
    assert (failure["logger"], failure["level"], failure["request_id"]) == ("uvicorn.error", "error", "r-1")
    assert 'RuntimeError("inside")' in failure["exception"]


def test_the_memory_service_logs_under_the_request_id_of_the_api(run, valkey_url, stack, caplog):
    caplog.set_level(logging.DEBUG)
    heard = listen(stack, "api.access", "memory_service.access")
    memory = served(create_memory(MemorySettings(run=run, redis_url=valkey_url)))
    body = {"interactions": [{"user_id": USER, "item_id": "i1"}]}
    with memory as memory_url, served(create_api(ApiSettings(run=run, memory_url=memory_url))) as url:
        httpx2.post(f"{url}/memories", json=body, headers={"X-Request-Id": "r-2"})
    found = {(line["logger"], line["route"]) for line in heard if line.get("request_id") == "r-2"}
    wanted = {("memory_service.access", "/v1/plan"), ("memory_service.access", "/v1/write")}
    assert found == wanted | {("api.access", "/memories")}
    assert USER not in json.dumps(heard)


def test_calls_are_logged_with_the_name_of_the_key(run, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    secret = create_key(tmp_path / "keys.json", "the-web-shop", ("recommend",), None)
    with served(create_api(ApiSettings(run=run, keys=tmp_path / "keys.json"))) as url:
        httpx2.get(f"{url}/items/none", headers={"X-API-Key": secret})
    (line,) = lines_of(caplog, "api.access")
    assert (line["key"], line["status"], line["route"]) == ("the-web-shop", 404, "/items/{item_id:id}")
    assert secret not in caplog.text


def test_lines_are_json_whatever_the_message():
    record = logging.LogRecord("x", logging.WARNING, "", 0, 'a "b"\n%s', ("\ud800",), None)
    record.fields = {"n": 1, "odd": object}
    CALL.set(Call("r-3"))
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"], found["request_id"], found["n"]) == ("warning", 'a "b"\n\ud800', "r-3", 1)


@pytest.mark.parametrize("sent", [None, b"", b"a" * 65, b"a\nb", b"<x>"])
def test_invalid_request_ids_are_replaced(sent):
    assert len(request_id(sent)) > 16
    assert request_id(sent) != request_id(sent)


def test_most_lines_of_a_flood_of_refusals_are_counted_only(caplog):
    caplog.set_level(logging.INFO)
    access = AccessLog(logging.getLogger("flood"), clock=lambda: now)
    now = 0.0
    for _ in range(LINES_PER_S + 50):
        access.note("POST", "/recommend", 503, 0.0, notable=False)
    assert len(caplog.records) == LINES_PER_S
    access.note("DELETE", "/users", 200, 0.0, notable=True)
    assert caplog.records[-1].fields["left_out"] == 50
    now = 1.0
    access.note("POST", "/recommend", 503, 0.0, notable=False)
    assert "left_out" not in caplog.records[-1].fields


def test_ordinary_successes_are_not_logged_at_info_level(caplog):
    caplog.set_level(logging.INFO, logger="flood")
    AccessLog(logging.getLogger("flood")).note("POST", "/recommend", 200, 0.0, notable=False)
    assert not caplog.records
