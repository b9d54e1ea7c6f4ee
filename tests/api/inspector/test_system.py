"""The system view, outages, and API keys."""

from contextlib import ExitStack

import httpx2
import pytest
from playwright.sync_api import expect

from api.access.keys import create_key
from api.http.app import create_app as create_api
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from tests.api.calls import recommend
from tests.api.inspector.pages import busy, took
from tests.browser import needs_chromium, opened
from tests.conftest import served

pytestmark = needs_chromium


def test_the_system_view_follows_the_metrics(page, client, run):
    busy(client)
    page.clock.install()
    page.goto("/#/system")
    expect(page.locator(".health .good")).to_have_count(3)
    for _ in range(5):
        recommend(client, user_id="u")
    page.clock.fast_forward(2000)
    expect(page.locator(".traffic")).to_contain_text("memory 100 %, encoder 0 %, popularity 0 % of 5 lists")
    expect(page.locator(".figures li").nth(1)).to_contain_text("ms")
    expect(page.locator(".figures")).to_contain_text("22interactions remembered")
    assert float(page.locator(".figures b").first.inner_text()) > 0
    expect(page.locator(".split .bars li")).to_have_count(5)
    memory = recommend(client, user_id="u")["memory"]
    for name, value in (("Entropy", memory["entropy"]), ("K, own", memory["k"]), ("Memories in a bank", 10)):
        expect(page.locator(".histograms figcaption", has_text=name)).to_contain_text(f"mean {value:.2f}")
    expect(page.locator(".model code")).to_have_text(client.get("/model").json()["model_version"])


def test_the_system_view_says_that_the_memory_is_out_of_reach(chrome, run, valkey_url, stack):
    memory = stack.enter_context(ExitStack())
    url = memory.enter_context(served(create_memory(MemorySettings(run=run, redis_url=valkey_url))))
    api = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=url))))
    page, _ = stack.enter_context(opened(chrome, base_url=api))
    page.clock.install()
    page.goto("/#/system")
    expect(page.locator(".health .good")).to_have_count(3)
    memory.close()
    httpx2.post(f"{api}/recommend", json={"user_id": "u"}, timeout=60)
    page.clock.fast_forward(2000)
    expect(page.locator(".health .bad").first).to_contain_text("memory service")
    expect(page.locator(".health .bad").last).to_contain_text("1 of 1 had to do without")


def test_the_api_goes_away_and_comes_back(chrome, run, memory_url, stack):
    app, port = ApiSettings(run=run, memory_url=memory_url), free_port()
    with served(create_api(app), port) as url:
        page, _ = stack.enter_context(opened(chrome, base_url=url))
        with httpx2.Client(base_url=url) as client:
            took(client, "u", "i1", "i2")
        page.goto("/#/users/u")
        expect(page.locator(".picture .dot")).to_have_count(2)
    page.get_by_text("What if").click()
    page.get_by_label("memories of others").uncheck()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
    expect(page.locator(".picture .dot")).to_have_count(2)  # what was shown stays
    with served(create_api(app), port) as url:
        with httpx2.Client(base_url=url) as client:
            took(client, "u", "i1", "i2", "i3")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator(".picture .dot")).to_have_count(3)
        expect(page.locator(".list .lead")).to_contain_text("0 of others")  # and what was asked is asked again


def test_the_system_view_opened_in_an_outage_follows_once_it_is_over(chrome, run, memory_url, stack):
    app, port = ApiSettings(run=run, memory_url=memory_url), free_port()
    with served(create_api(app), port) as url:
        page, _ = stack.enter_context(opened(chrome, base_url=url))
        page.goto("/")
        expect(page.locator("main h1:visible")).to_be_visible()
    page.get_by_role("link", name="System").click()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
    with served(create_api(app), port) as url:
        expect(page.get_by_role("alert")).to_be_hidden()
        httpx2.post(f"{url}/recommend", json={})
        expect(page.locator(".traffic")).to_contain_text("popularity 100 % of 1 list.")


def test_the_memory_goes_away_and_comes_back(chrome, run, valkey_url, stack):
    port = free_port()
    settings = MemorySettings(run=run, redis_url=valkey_url)
    with served(create_memory(settings), port) as memory:
        api = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory))))
        page, _ = stack.enter_context(opened(chrome, base_url=api))
        with httpx2.Client(base_url=api) as client:
            took(client, "u", "i1", "i2")
        page.goto("/#/try")
        expect(page.locator(".catalogue button").first).to_be_visible()
    page.locator(".catalogue button").first.click()
    expect(page.get_by_role("alert")).to_contain_text("Trying again")
    with served(create_memory(settings), port):
        expect(page.get_by_role("alert")).to_be_hidden()
        page.locator(".catalogue button").first.click()
        expect(page.locator(".heard")).to_contain_text("You took")


@pytest.fixture
def guarded(run, memory_url, tmp_path, stack):
    keys = tmp_path / "keys.json"
    made = {scope: create_key(keys, scope, (scope,), None) for scope in ("recommend", "admin")}
    made["all"] = create_key(keys, "all", ("recommend", "ingest", "admin"), None)
    return stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url, keys=keys)))), made


def test_with_api_keys_the_page_asks_for_one(chrome, guarded, stack):
    url, keys = guarded
    page, seen = stack.enter_context(opened(chrome, base_url=url))
    with httpx2.Client(base_url=url, headers={"X-API-Key": keys["all"]}) as client:
        took(client, "u", "i1", "i2")
    page.goto("/#/users/u")
    ask = page.get_by_role("dialog", name="API key")
    expect(ask).to_contain_text("an API key is required")

    def give(key: str) -> None:
        ask.locator("input").fill(key)
        ask.locator("input").press("Enter")

    give("rr_wrong")
    expect(ask).to_contain_text("this API key is not known")
    give(keys["recommend"])
    expect(ask).to_contain_text("needs an API key with the scope admin")
    give(keys["all"])
    expect(page.locator(".picture .dot")).to_have_count(2)
    expect(ask).to_be_hidden()
    assert keys["all"] not in page.content()
    assert page.evaluate("[Object.values(localStorage), document.cookie].join()").count(keys["all"]) == 0
    assert not any(keys["all"] in sent for _, sent in seen.requests)
    for leave in (lambda: page.keyboard.press("Escape"), ask.get_by_role("button", name="Cancel").click):
        page.get_by_role("button", name="API key").click()
        leave()
        expect(ask).to_be_hidden()
    page.reload()
    expect(page.locator(".picture .dot")).to_have_count(2)  # the key is still there
    page.get_by_role("button", name="API key").click()
    ask.get_by_role("button", name="Use it").click()
    expect(ask).to_contain_text("an API key is required")
