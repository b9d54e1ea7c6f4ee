"""Malformed and hostile requests are refused with a clear error, before anything is stored."""

import json
import time

import httpx2
import pytest

from api.http.app import create_app as create_api
from api.http.middleware import BODY_LIMIT_BYTES
from api.settings import ApiSettings
from tests.conftest import served

INTERACTION = {"user_id": "u", "item_id": "i"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/recommend", b"{", 400, "invalid_json"),
        ("/recommend", b"", 422, "invalid_request"),
        ("/recommend", b"\xff\xfe", 400, "invalid_json"),
        ("/recommend", [], 422, "invalid_request"),
        ("/recommend", {"user_id": ""}, 422, "invalid_request"),
        ("/recommend", {"user_id": 7}, 422, "invalid_request"),
        ("/recommend", {"user_id": "x" * 257}, 422, "invalid_request"),
        ("/recommend", {"user_id": "ü" * 129}, 422, "invalid_request"),
        ("/recommend", {"user_id": "a\0b"}, 422, "invalid_request"),
        ("/recommend", b'{"user_id": "\\ud800"}', 400, "invalid_json"),
        ("/recommend", {"top_n": 0}, 422, "invalid_request"),
        ("/recommend", {"top_n": 1001}, 422, "invalid_request"),
        ("/recommend", {"top_n": 2.5}, 422, "invalid_request"),
        ("/recommend", {"top_n": "10"}, 422, "invalid_request"),
        ("/recommend", {"k": 0}, 422, "invalid_request"),
        ("/recommend", {"k": 101}, 422, "invalid_request"),
        ("/recommend", {"sequence": ["i"] * 1001}, 422, "invalid_request"),
        ("/recommend", {"sequence": "i1"}, 422, "invalid_request"),
        ("/recommend", {"sequence": [None]}, 422, "invalid_request"),
        ("/recommend", {"colour": "red"}, 422, "invalid_request"),
        ("/recommend", {"scopes": ["everything"]}, 422, "invalid_request"),
        ("/recommend/batch", {"requests": []}, 422, "invalid_request"),
        ("/recommend/batch", {"requests": [{}] * 257}, 422, "invalid_request"),
        ("/memories", {"interactions": []}, 422, "invalid_request"),
        ("/memories", {"interactions": [INTERACTION] * 1001}, 422, "invalid_request"),
        ("/memories", {"interactions": [{"user_id": "u"}]}, 422, "invalid_request"),
        ("/memories", {"interactions": [INTERACTION | {"timestamp": "noon"}]}, 422, "invalid_request"),
        ("/memories", b'{"interactions": [{"user_id": "u", "item_id": "i", "rating": NaN}]}', 422, "invalid_request"),
        (
            "/memories",
            b'{"interactions": [{"user_id": "u", "item_id": "i", "timestamp": 1e999}]}',
            422,
            "invalid_request",
        ),
        ("/memories", {"interactions": [INTERACTION | {"extra": 1}]}, 422, "invalid_request"),
        ("/nowhere", {}, 404, "not_found"),
        ("/health/live", {}, 405, "method_not_allowed"),
    ],
)
def test_malformed_input_gets_a_clear_error(client, path, body, status, code):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"]
    assert client.get("/users").json() == {"users": []}


@pytest.mark.parametrize("declared", [True, False])
def test_a_giant_body_is_refused(client, declared):
    def stream():
        for _ in range(BODY_LIMIT_BYTES // 65536 + 2):
            yield bytes(65536)

    content = bytes(BODY_LIMIT_BYTES + 1) if declared else stream()
    response = client.post("/memories", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


JSON = {"Content-Type": "application/json"}


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


def test_a_problem_is_json_even_with_odd_characters(client):
    response = client.post("/recommend", content=json.dumps({"ü🦊": 1}).encode(), headers=JSON)
    assert response.json()["errors"][0]["field"] == "ü🦊"
