"""What `ramrec inspect` says when the service refuses, fails or is none."""

import json
import re

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from api.access.keys import create_key
from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from tests.api.commands.inspect.output import harmless
from tests.api.recommend.test_explain import took
from tests.conftest import served
from tests.memory_service.service.test_degraded import Valkey


def test_keys_need_both_scopes_and_each_refusal_is_one_line(ask, run, memory_url, stack, tmp_path, monkeypatch):
    keys = tmp_path / "keys.json"
    both, one, other = (
        create_key(keys, name, scopes, None)
        for name, scopes in (("both", ("admin", "recommend")), ("one", ("recommend",)), ("other", ("admin",)))
    )
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url, keys=keys))))
    for key, wrong in ((one, "scope admin"), (other, "scope recommend"), ("wrong", "not known"), (None, "is required")):
        told = ask(url, "u", *(("--key", key) if key else ()))
        assert (told.code, told.out, told.err.count("\n")) == (2, "", 1)
        assert wrong in told.err
        assert not key or key not in told.err
    assert ask(url, "u", "--key", both).code == 1
    monkeypatch.setenv("RAMREC_KEY", both)
    assert ask(url, "u").code == 1
    told = ask(url, "u", "--key", "sécret\n")
    assert (told.code, told.err) == (2, "ramrec: the API key holds characters that are not allowed in a key\n")


def test_what_is_no_api_is_said_in_one_line(ask, stack):
    app, sent = FastAPI(), []

    @app.api_route("/{kind}/{rest:path}", methods=["GET", "POST"])
    def answer(kind: str, request: Request) -> Response:
        sent.append(dict(request.headers))
        if kind == "away":
            return RedirectResponse(str(request.base_url) + "html/x")
        bodies = {
            "html": "<html>",
            "list": "[]",
            "nan": '{"a": NaN}',
            "deep": "[" * 100_000,
            "not-utf-8": b"\xff",
            "none": "",
        }
        return Response(bodies.get(kind, "<p>\x1b[2J\n" * 9999), 418 if kind == "tea" else 200)

    url = stack.enter_context(served(app))
    for kind, says in {
        "html": "no JSON", "nan": "no JSON", "deep": "no JSON", "not-utf-8": "no JSON", "none": "no JSON",
        "list": "not understood", "tea": "answered 418", "away": "answered 307",
    }.items():  # fmt: skip
        told = ask(f"{url}/{kind}", "u", "--key", "secret")
        assert (told.code, told.out, told.err.count("\n"), "RAMRec api" in told.err) == (2, "", 1, True), kind
        assert says in told.err, kind
        assert harmless(told.err.replace(url, "")[:80])
    assert all(headers["authorization"] == "Bearer secret" for headers in sent)
    assert len(sent) == 9  # none was redirected; a list is no bank, and is found out once all has been asked


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "ftp://x", "x", "http://", "http://[::1", "http://a..b", "http://a b"]
)
def test_an_api_that_cannot_be_reached_is_said_in_one_line(ask, url):
    told = ask(url, "u")
    assert (told.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert told.err.startswith(("ramrec: cannot reach ", "ramrec: x is no URL", "ramrec: ftp://x is no URL"))


def test_ids_that_are_no_text_are_refused(ask, api_url):
    for words in (["\udcff"], ["u", "--ignore", "\udcff"]):
        told = ask(api_url, *words)
        assert (told.code, told.out, told.err) == (2, "", "ramrec: the id � is not valid Unicode\n")
    told = ask(api_url, "")
    assert (told.code, told.out, told.err.count("\n"), "422" in told.err) == (2, "", 1, True)


def test_while_the_bank_cannot_be_read_the_list_is_shown_and_called_degraded(ask, run, tmp_path, stack):
    valkey = Valkey(tmp_path)
    stack.callback(valkey.server.terminate)
    settings = MemorySettings(run=run, redis_url=valkey.url, redis_timeout_s=0.2)
    memory_url = stack.enter_context(served(create_memory(settings)))
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url))))
    client = stack.enter_context(httpx2.Client(base_url=url))
    took(client, "u", "i1", "i2", "i3")
    assert ask(url, "u").code == 0
    with valkey.out_of_reach("killed"):
        told = ask(url, "u")
        assert (told.code, told.err.count("\n"), "503" in told.err) == (2, 1, True)
        assert "!! The bank cannot be read now." in told.out
        assert "!! DEGRADED" in told.out
        assert len([row for row in told.out.split("\n") if re.match(r"\d ", row)]) == 5
        assert json.loads(ask(url, "u", "--json").out)["recommendations"]["memory"]["degraded"] is True
