"""API keys, scopes, the token of the memory service: who is let in, and what the files and answers tell."""

import json
import logging
import threading

import httpx2
import pytest
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.routing import Route
from typer.testing import CliRunner

from api.access.keys import LOOK_S, KeyFileError, KeyRing, create_key, read_keys, revoke_key
from api.cli import app as cli
from api.http.app import ROUTERS
from api.http.app import create_app as create_api
from api.http.policy import UNDECLARED, RouteTable, policy_of
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.config import describe
from tests.conftest import served

TOKEN = "a-token-of-the-memory-service"
EVENT = {"interactions": [{"user_id": "u", "item_id": "i1"}]}
CALLS = [
    ("recommend", "POST", "/recommend", {}),
    ("recommend", "POST", "/recommend/batch", {"requests": [{}]}),
    ("recommend", "GET", "/items", None),
    ("recommend", "GET", "/items/i1", None),
    ("recommend", "GET", "/model", None),
    ("ingest", "POST", "/memories", EVENT),
    ("admin", "GET", "/users", None),
    ("admin", "GET", "/users/u/memory", None),
    ("admin", "DELETE", "/users/u/memory", None),
    ("admin", "PUT", "/items/i1", {}),
    ("admin", "PATCH", "/items/i1", {"hidden": False}),
    ("admin", "GET", "/metrics", None),
]


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def guarded(run, memory_url, keys, stack):
    """A client of an api with one key for each scope, and the keys."""
    made = {scope: create_key(keys, f"the-{scope}", (scope,), None) for scope in ("recommend", "ingest", "admin")}
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url, keys=keys))))
    return stack.enter_context(httpx2.Client(base_url=url)), made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --------------------------------------------------------------------------------------------- scopes


def test_every_route_has_a_declared_scope(run):
    app = create_api(ApiSettings(run=run))
    routes = [route for router in ROUTERS for route in router.routes]
    assert len(routes) > 15
    assert all(isinstance(route, APIRoute) and policy_of(route.endpoint) is not UNDECLARED for route in routes)
    described = {(m.upper(), path) for path, methods in app.openapi()["paths"].items() for m in methods}
    assert described <= {(method, route.path_format) for route in routes for method in route.methods}


def test_the_documents_pages_need_no_key(run):
    app, table = create_api(ApiSettings(run=run)), RouteTable(ROUTERS, ["/docs"])
    pages = {route.path for route in app.routes if isinstance(route, Route)}
    assert pages == {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
    assert table.find("GET", "/docs")[1].scope is None


def test_what_is_not_declared_needs_admin():
    table = RouteTable(ROUTERS, ["/docs"])

    def needed(method: str, path: str) -> tuple[str, str | None]:
        template, policy = table.find(method, path)
        return template, policy.scope

    assert needed("GET", "/secrets") == ("unknown", "admin")
    assert needed("HEAD", "/docs") == ("unknown", "admin")
    assert needed("GET", "/users/a\n/memory") == ("/users/{user_id:id}/memory", "admin")
    assert needed("GET", "/users/a/b/memory") == ("/users/{user_id:id}/memory", "admin")
    assert needed("GET", "/items/users/x/memory") == ("/items/{item_id:id}", "recommend")


@pytest.mark.parametrize(("scope", "method", "path", "body"), CALLS)
def test_a_key_opens_what_its_scope_says_and_nothing_else(guarded, scope, method, path, body):
    client, made = guarded
    client.post("/memories", json=EVENT, headers=bearer(made["ingest"]))
    for mine, key in made.items():
        response = client.request(method, path, json=body, headers=bearer(key))
        if mine == scope:
            assert response.status_code == 200, response.text
        else:
            assert response.status_code == 403
            assert response.json()["code"] == "forbidden"
            assert scope in response.json()["detail"]


def test_without_a_known_key_the_answer_is_401(guarded):
    client, made = guarded
    for headers in ({}, {"Authorization": f"Basic {made['admin']}"}):
        response = client.get("/items", headers=headers)
        assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    for headers in (bearer("ramrec_wrong"), {"X-API-Key": made["admin"][:-1]}):
        response = client.get("/items", headers=headers)
        assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
        assert "invalid_token" in response.headers["www-authenticate"]
    assert client.get("/no-such-page").status_code == 401


def test_both_headers_take_a_key_and_probes_take_none(guarded):
    client, made = guarded
    assert client.post("/recommend", json={}, headers={"X-API-Key": made["recommend"]}).status_code == 200
    assert client.post("/recommend", json={}, headers={"authorization": f"bearer {made['recommend']}"}).is_success
    for path in ("/health/live", "/health/ready", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_refusals_are_counted(guarded):
    client, made = guarded
    client.post("/recommend", json={})
    client.post("/recommend", json={}, headers=bearer(made["ingest"]))
    text = client.get("/metrics", headers=bearer(made["admin"])).text
    for status in (401, 403):
        assert f'ramrec_api_requests_total{{route="/recommend",status="{status}"}} 1.0' in text


def test_the_document_tells_which_key_is_wanted_where_keys_are_wanted(guarded, run):
    document = guarded[0].get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey"}
    assert document["paths"]["/memories"]["post"]["security"] == [{"bearer": ["ingest"]}, {"apiKey": ["ingest"]}]
    assert {"401", "403"} <= set(document["paths"]["/memories"]["post"]["responses"])
    assert "security" not in document["paths"]["/health/live"]["get"]
    assert "securitySchemes" not in create_api(ApiSettings(run=run)).openapi()["components"]


# ------------------------------------------------------------------------------------------- the file


def test_only_hashes_are_kept_and_nobody_else_may_read_them(keys):
    secret = create_key(keys, "web", ("recommend", "ingest"), 50)
    text = keys.read_text()
    assert secret not in text
    assert len(secret) > 43  # 256 bits
    assert keys.stat().st_mode & 0o077 == 0
    key = read_keys(keys)[0]
    assert (key.name, key.scopes, key.per_second) == ("web", ("ingest", "recommend"), 50)
    assert KeyRing(keys).find(secret.encode()) == key


def test_keys_made_at_the_same_time_are_all_kept(keys):
    writers = [threading.Thread(target=create_key, args=(keys, f"k{n}", ("recommend",), None)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {key.name for key in read_keys(keys)} == {f"k{n}" for n in range(8)}


def test_a_revoked_key_ends_and_a_new_one_begins_within_a_look(keys):
    now = 0.0
    old = create_key(keys, "old", ("admin",), None).encode()
    ring = KeyRing(keys, lambda: now)
    revoke_key(keys, "old")
    new = create_key(keys, "new", ("admin",), None).encode()
    assert ring.find(old) is not None
    assert ring.find(new) is None
    now += LOOK_S
    assert ring.find(old) is None
    assert ring.find(new).name == "new"


@pytest.mark.parametrize("text", ["{", '{"keys": [{"name": "x"}]}', '{"keys": 1}', None, "\ud800"])
def test_a_broken_file_keeps_the_old_keys_and_is_logged(keys, caplog, text):
    now = 0.0
    key = create_key(keys, "one", ("admin",), None).encode()
    ring = KeyRing(keys, lambda: now)
    if text is None:
        keys.unlink()
    else:
        keys.write_bytes(text.encode(errors="surrogatepass"))
    now += LOOK_S
    with caplog.at_level(logging.ERROR):
        assert ring.find(key).name == "one"
    assert "API keys stay as they were" in caplog.text
    caplog.clear()
    now += LOOK_S
    assert ring.find(key).name == "one"
    assert not caplog.records  # said once
    keys.unlink(missing_ok=True)
    create_key(keys, "two", ("admin",), None)
    now += LOOK_S
    assert ring.find(key) is None


def test_a_file_that_cannot_be_used_stops_the_start(keys, run):
    for text in (None, "{}", '{"keys": [], "more": 1}'):
        if text is not None:
            keys.write_text(text)
        with pytest.raises(KeyFileError, match=r"keys\.json"):
            create_api(ApiSettings(run=run, keys=keys))


def test_two_keys_of_one_name_are_refused(keys):
    create_key(keys, "web", ("admin",), None)
    twice = json.loads(keys.read_text())["keys"] * 2
    with pytest.raises(KeyFileError, match="already holds a key 'web'"):
        create_key(keys, "web", ("admin",), None)
    keys.write_text(json.dumps({"keys": twice}))
    with pytest.raises(KeyFileError, match="two keys"):
        read_keys(keys)


def test_keys_from_the_command_line(keys):
    shell = CliRunner()
    words = ["--name", "web", "--scope", "recommend", "--scope", "ingest", "--per-second", "100"]
    made = shell.invoke(cli, ["keys", "create", "--file", str(keys), *words])
    assert made.exit_code == 0, made.output
    assert KeyRing(keys).find(made.stdout.strip().encode()).scopes == ("ingest", "recommend")
    listed = shell.invoke(cli, ["keys", "list", "--file", str(keys)]).stdout
    assert listed.split("\t")[:3] == ["web", "ingest,recommend", "100/s"]
    assert made.stdout.strip() not in listed
    assert shell.invoke(cli, ["keys", "revoke", "--file", str(keys), "--name", "web"]).exit_code == 0
    assert shell.invoke(cli, ["keys", "list", "--file", str(keys)]).stdout == ""
    for words in (["revoke", "--name", "web"], ["create", "--name", "a b", "--scope", "admin"]):
        assert isinstance(shell.invoke(cli, ["keys", *words, "--file", str(keys)]).exception, KeyFileError)


# -------------------------------------------------------------------------------- listening and tokens


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_beyond_loopback_a_guard_or_an_explicit_word_is_wanted(run, keys, host):
    with pytest.raises(ValidationError, match="needs API keys") as refused:
        ApiSettings(run=run, host=host)
    assert "\n" not in describe(refused.value)
    with pytest.raises(ValidationError, match="needs a token"):
        MemorySettings(run=run, host=host)
    assert ApiSettings(run=run, host=host, keys=keys)
    assert ApiSettings(run=run, host=host, open=True)
    assert MemorySettings(run=run, host=host, token=TOKEN)
    assert MemorySettings(run=run, host=host, open=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_on_loopback_everything_is_open_unless_told_otherwise(run, host):
    assert ApiSettings(run=run, host=host).keys is None
    assert MemorySettings(run=run, host=host).token is None


def test_a_token_is_not_shown(run, monkeypatch):
    monkeypatch.setenv("RAMREC_MEMORY_TOKEN", "too-short")
    with pytest.raises(ValidationError) as refused:
        MemorySettings(run=run)
    assert "too-short" not in describe(refused.value) + str(refused.value)
    monkeypatch.setenv("RAMREC_MEMORY_TOKEN", TOKEN)
    monkeypatch.setenv("RAMREC_MEMORY_REDIS_URL", "redis://:password@somewhere")
    settings = MemorySettings(run=run)
    assert TOKEN not in repr(settings)
    assert "somewhere" not in repr(settings)
    monkeypatch.setenv("RAMREC_MEMORY_TOKEN", "")  # as a compose file says it
    assert MemorySettings(run=run).token is None


@pytest.fixture
def shut_memory(run, valkey_url, stack):
    """URL of a memory service that wants a token."""
    return stack.enter_context(served(create_memory(MemorySettings(run=run, redis_url=valkey_url, token=TOKEN))))


def test_the_memory_service_takes_calls_only_with_its_token(shut_memory):
    with httpx2.Client(base_url=shut_memory) as client:
        for headers in ({}, bearer("x" * 20), {"Authorization": TOKEN}, bearer(TOKEN + "x")):
            for method, path in (("POST", "/v1/retrieve"), ("GET", "/v1/users"), ("GET", "/metrics"), ("GET", "/v2")):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/users", headers=bearer(TOKEN)).status_code == 200
        assert "ramrec_memory_requests" in client.get("/metrics", headers=bearer(TOKEN)).text
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").json()["authorized"] is False
        assert client.get("/health/ready", headers=bearer(TOKEN)).json()["authorized"] is True
        assert client.get("/health/ready", headers=bearer("wrong")).status_code == 401


@pytest.mark.parametrize(("token", "said"), [(None, "wants a token"), ("y" * 20, "401"), (TOKEN, None)])
def test_an_api_with_another_token_is_not_ready_and_says_why(run, shut_memory, stack, token, said):
    settings = ApiSettings(run=run, memory_url=shut_memory, memory_token=token)
    url = stack.enter_context(served(create_api(settings)))
    ready = httpx2.get(f"{url}/health/ready")
    remembered = httpx2.post(f"{url}/memories", json=EVENT)
    if said is None:
        assert (ready.status_code, remembered.status_code) == (200, 200)
    else:
        assert ready.status_code == 503
        assert said in ready.json()["status"]
        assert (remembered.status_code, remembered.json()["code"]) == (503, "memory_unavailable")
