"""The inspector page in a real headless Chromium, against the real services."""

import math
import re
import tomllib
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect

from api.access.keys import create_key
from api.access.scopes import needed
from api.http.app import create_app as create_api
from api.inspector.page import FILES
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from tests.api.commands.test_inspect import KEPT, NOW, habits_of_u, habitual
from tests.api.http.test_api import recommend, remember
from tests.browser import PATIENCE_MS, browser, needs_chromium, opened
from tests.conftest import served

pytestmark = needs_chromium
ROOT = Path(__file__).parents[3]
expect.set_options(timeout=PATIENCE_MS)
LAYOUT_SHIFT = """
  window.shifted = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
  }).observe({ type: "layout-shift", buffered: true });
"""
FOCUSED = "document.activeElement.tagName + ' ' + document.activeElement.getAttribute('class')"
BUDGET_BYTES = 300_000
AXE_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


@pytest.fixture(scope="module")
def chrome():
    with browser() as started:
        yield started


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


@pytest.fixture
def page(chrome: Browser, api_url: str, stack: ExitStack) -> Page:
    page, _ = stack.enter_context(opened(chrome, base_url=api_url))
    return page


@pytest.fixture
def habitual_url(tmp_path, valkey_url, stack) -> str:
    return habitual(tmp_path, valkey_url, stack)


def took(client: httpx2.Client, user: str, *items: str) -> None:
    remember(client, *((user, item, 1.6e9 + 86400 * n) for n, item in enumerate(items)))


def busy(client: httpx2.Client) -> None:
    """A user whose bank (10) is over-full, and others with memories for them."""
    took(client, "u", *(f"i{n}" for n in range(1, 15)))
    took(client, "v", "i1", "i2", "i20", "i21")
    took(client, "w", "i1", "i2", "i20", "i22")


def listed(page: Page) -> list[str]:
    return page.locator(".items .title").all_inner_texts()


def titles(answer: dict) -> list[str]:
    return [title(item["item_id"]) for item in answer["items"]]


def title(item_id: str) -> str:
    return {"i1": "One"}.get(item_id, item_id)


def show(page: Page, user: str) -> None:
    page.goto(f"/#/users/{quote(user, safe='')}")
    expect(page.locator(".headline h1")).to_be_visible()


# ------------------------------------------------------------------------------------------ a user


def test_a_user_is_found_and_shown_as_the_api_tells(page, client):
    busy(client)
    bank, answer = client.get("/users/u/memory").json(), recommend(client, user_id="u", explain=True)
    page.goto("/")
    page.get_by_label("User", exact=True).fill("u")
    page.get_by_role("list", name="Users found").get_by_role("link", name="u").click()
    expect(page.locator(".headline h1")).to_have_text("u")
    expect(page.locator(".facts")).to_contain_text(f"{bank['bank_size']} of 10 memories")
    dots = page.locator(".picture .dot")
    assert {dot.get_attribute("data-item") for dot in dots.all()} == {one["item_id"] for one in bank["entries"]}
    used = {one["item_id"] for one in answer["memory"]["memories"] if one["scope"] == "own"}
    assert {dot.get_attribute("data-item") for dot in page.locator(".picture .dot.used").all()} == used
    expect(page.locator(".picture line")).to_have_count(len(used))
    expect(page.locator(".adaptive .lead")).to_contain_text(f"entropy {bank['entropy']:.2f}")
    for scope in ("own", "collective"):
        expect(page.locator(f".sums .{scope} .result b")).to_have_text(str(bank["adaptive_k"][scope]["k"]))
    shares = [f"{100 * share:.0f} %" for share in sorted(bank["clusters"].values(), reverse=True)]
    assert page.locator(".adaptive .bars .value").all_inner_texts() == shares
    assert listed(page) == titles(answer)
    assert float(page.locator(".items .chance").first.inner_text().rstrip(" %")) == pytest.approx(
        100 * math.exp(answer["items"][0]["score"]), abs=0.5
    )
    expect(page.locator(".timeline rect.kept")).to_have_count(10)
    expect(page.locator(".timeline rect.gone")).to_have_count(4)
    gone = page.get_by_role("region", name="Forgotten memories").locator("tbody tr")
    assert gone.locator("th").all_inner_texts() == [title(one["item_id"]) for one in bank["pruned_items"]]
    assert "older than those kept" in gone.first.inner_text()


def test_memories_that_speak_for_an_item_lead_to_the_picture(page, client):
    busy(client)
    page.goto("/#/users/u")
    reason = page.locator(".reason.own").first
    item = reason.locator(".name").inner_text()
    item = {"One": "i1"}.get(item, item)
    reason.hover()
    expect(page.locator(".picture .dot.pointed")).to_have_attribute("data-item", item)
    reason.click()
    expect(page.locator(".picture .dot:focus")).to_have_attribute("data-item", item)
    expect(page.get_by_role("tooltip")).to_contain_text("quality")
    answer = recommend(client, user_id="u", explain=True)
    others = {one["item_id"] for item in answer["items"] for one in item["because"] if one["scope"] == "collective"}
    shown = set(page.locator(".reason.collective .name").all_inner_texts())
    assert shown <= {title(item) for item in others}
    page.locator(".items details summary").first.click()
    expect(page.locator(".items details table").first).to_contain_text(f"{answer['items'][0]['score']:.3f}")


def test_what_if_is_the_question_asked_otherwise(page, client):
    busy(client)
    usual = recommend(client, user_id="u")
    page.goto("/#/users/u")
    first = page.locator(".picture .dot[tabindex='0']")
    left_out = first.get_attribute("data-item")
    first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".picture .dot:focus")).not_to_have_attribute("data-item", left_out)
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    expect(page.locator(".changes")).to_contain_text("Against the default list")
    expect(page.locator(".picture .dot.out")).to_have_attribute("data-item", left_out)
    assert listed(page) == titles(recommend(client, user_id="u", ignore_memories=[left_out]))
    page.get_by_label("memories of others").uncheck()
    expect(page.locator(".list .lead")).to_contain_text("0 of others")
    assert listed(page) == titles(recommend(client, user_id="u", ignore_memories=[left_out], scopes=["own"]))
    page.get_by_role("button", name="Back to the default").click()
    expect(page.locator(".changes")).to_have_count(0)
    assert listed(page) == titles(usual)
    page.get_by_label("as the entropy says").uncheck()
    page.get_by_label("K, own memories asked").fill("1")
    expect(page.locator(".list .lead")).to_contain_text("1 own memory")
    page.get_by_label("also what was taken already").check()
    wanted = recommend(client, user_id="u", k=1, exclude_seen=False)
    expect(page.locator(".items .title").first).to_have_text(titles(wanted)[0])
    expect(page.locator(".moved.new").first).to_be_visible()
    assert listed(page) == titles(wanted)


def test_lists_are_filtered_by_what_items_are(page, client):
    busy(client)
    for item, year in (("i23", 1990), ("i24", 2000), ("i25", 2010)):
        client.put(f"/items/{item}", json={"metadata": {"year": year, "genre": ["Comedy"]}})
    show(page, "u")
    page.get_by_text("What if").click()
    page.get_by_label("attribute").select_option("year")
    page.get_by_label("condition").select_option("gte")
    page.get_by_label("value").fill("2000")
    page.get_by_role("button", name="Only these").click()
    expect(page.locator(".items .title")).to_have_count(2)
    assert listed(page) == titles(recommend(client, user_id="u", filter={"year": {"gte": 2000}}))
    page.get_by_label("attribute").select_option("genre")
    page.get_by_label("value").fill("Drama")
    page.get_by_role("button", name="Only these").click()
    expect(page.locator(".list")).to_contain_text("Nothing is left to recommend")
    page.get_by_role("button", name="drop this condition").last.click()
    expect(page.locator(".items .title")).to_have_count(2)


def test_somebody_unknown_is_said_to_be_so_and_given_what_is_popular(page):
    show(page, "nobody")
    expect(page.locator(".headline")).to_contain_text("Nothing is remembered about this user")
    expect(page.locator(".list .lead")).to_contain_text("what is popular")
    expect(page.locator(".items .title").first).to_have_text("One")


def test_the_first_page_shows_users_from_narrow_to_diverse(page, client):
    for n in range(6):
        took(client, f"user {n}", *(f"i{4 * m + m % (n + 1) + 1}" for m in range(5)))
    page.goto("/")
    rows = page.locator("table.sample tbody tr")
    expect(rows).to_have_count(6)
    entropies = [float(text.split("\t")[1]) for text in rows.all_inner_texts()]
    assert entropies == sorted(entropies)
    rows.first.get_by_role("link").click()
    expect(page.locator(".facts")).to_contain_text(f"{entropies[0]:.2f} entropy")


# ------------------------------------------------------------------------------------------ habits


def test_the_page_says_habits_as_the_command_does(page):
    page.goto("/")
    kept, now = page.evaluate(
        """async ([kept, now]) => {
          const { habitKept, habitNow } = await import("/inspector/habit.js");
          const entry = ([frequency, mean_gap_s, since, usual_hour, usual_day]) => habitKept(
            { frequency, mean_gap_s, usual_hour, usual_day, timestamp: 1.7e9 - since, first_time: 1e9 }, 1.7e9);
          const habit = ([count, since_s, at_this_hour, on_this_day]) =>
            habitNow({ count, since_s, at_this_hour, on_this_day });
          return [kept.map(entry), now.map(habit)];
        }""",
        [[list(one) for one in KEPT], [list(one) for one in NOW]],
    )
    assert kept == list(KEPT.values())
    assert now == list(NOW.values())


def raised_by_61_percent(route: Route) -> None:
    """Weights here are random: let own memories speak for the items."""
    answer = route.fetch().json()
    for item in answer["items"]:
        item["because"] = [one | {"logit": math.log(1.61), "copied": 0.0} for one in item["because"]]
    route.fulfill(json=answer)


def test_habits_are_told_in_the_bank_and_where_they_speak_for_an_item(chrome, habitual_url, stack):
    client = stack.enter_context(httpx2.Client(base_url=habitual_url))
    hour = habits_of_u(client)
    kept = f"7 times, every 6 days, last 3 days ago, usually around {hour}"
    page, _ = stack.enter_context(opened(chrome, base_url=habitual_url, viewport={"width": 390, "height": 844}))
    page.route("**/recommend", raised_by_61_percent)
    page.goto("/#/users/u")
    dot = page.locator(".picture .dot[data-item=i2]")
    dot.focus()
    expect(page.get_by_role("tooltip")).to_contain_text(f"taken {kept}")
    assert f"taken {kept}" in dot.get_attribute("aria-label")
    page.get_by_text("All memories as a table").click()
    rows = page.get_by_role("region", name="All memories").locator("tbody tr")
    expect(rows.filter(has_text="i2")).to_contain_text(kept)
    expect(rows.filter(has_text="i4")).to_contain_text("once, 26 hours ago")
    shown = page.locator(".reason.own.habit").filter(has_text="i2")
    expect(shown).to_have_text("i2, 7 times, last 3 days ago, usually at this hour: +61 %")
    assert "i2, own memory, taken 7 times, last 3 days ago" in shown.get_attribute("aria-label")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert shown.evaluate("one => one.scrollWidth <= one.clientWidth + 1")  # nothing of it is cut


def test_where_people_come_back_lists_hold_what_was_taken_unless_they_are_asked_not_to(chrome, habitual_url, stack):
    client = stack.enter_context(httpx2.Client(base_url=habitual_url))
    habits_of_u(client)
    page, _ = stack.enter_context(opened(chrome, base_url=habitual_url))
    show(page, "u")
    page.get_by_text("What if").click()
    taken_too = page.get_by_label("also what was taken already")
    expect(taken_too).to_be_checked()
    expect(page.locator(".changes")).to_have_count(0)
    with page.expect_request(lambda sent: "exclude_seen" in (sent.post_data or "")) as sent:
        taken_too.uncheck()
    assert sent.value.post_data_json["exclude_seen"] is True
    expect(page.locator(".changes")).to_contain_text("Against the default list")
    assert {"i2", "i3", "i4"}.isdisjoint(listed(page))
    page.get_by_role("button", name="Back to the default").click()
    expect(page.locator(".changes")).to_have_count(0)
    expect(taken_too).to_be_checked()
    expect(page.get_by_role("button", name="Back to the default")).to_be_disabled()


def test_the_question_is_asked_as_of_another_time(chrome, habitual_url, stack):
    client = stack.enter_context(httpx2.Client(base_url=habitual_url))
    habits_of_u(client)
    page, _ = stack.enter_context(opened(chrome, base_url=habitual_url))
    show(page, "u")
    page.get_by_text("What if").click()
    asked = page.get_by_label("Ask as of")
    expect(asked).to_have_accessible_description("UTC; empty: now")
    with page.expect_request(lambda sent: "timestamp" in (sent.post_data or "")) as sent:
        asked.fill("2024-02-29T13:30")
    assert sent.value.post_data_json["timestamp"] == 1709213400
    expect(page.locator(".changes")).to_contain_text("Against the default list")
    assert listed(page) == titles(recommend(client, user_id="u", timestamp=1709213400))
    page.get_by_role("button", name="Back to the default").click()
    expect(page.locator(".changes")).to_have_count(0)
    expect(asked).to_have_value("")
    asked.fill("0002-02-02T10:00")  # half typed
    expect(page.locator(".changes")).to_have_count(0)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_service_before_habits_is_shown_as_ever(page, client):
    busy(client)
    names = {"first_time", "mean_gap_s", "occasions_since", "usual_hour", "usual_day"}

    def older(route: Route) -> None:
        bank = route.fetch().json()
        bank["entries"] = [{name: one for name, one in e.items() if name not in names} for e in bank["entries"]]
        route.fulfill(json=bank)

    page.route("**/users/u/memory", older)
    page.goto("/#/users/u")
    page.locator(".picture .dot").first.focus()
    expect(page.get_by_role("tooltip")).to_contain_text("taken 1× · retrieved")  # noqa: RUF001
    expect(page.locator(".reason.habit")).to_have_count(0)


# ------------------------------------------------------------------------------------------ try it


def test_trying_it_from_the_first_item_to_being_forgotten(page, client):
    took(client, "v", "i3", "i5", "i7", "i9")
    took(client, "w", "i3", "i5", "i7", "i8")
    page.goto("/#/try")
    expect(page.locator(".list .lead")).to_contain_text("what is popular")
    expect(page.get_by_role("button", name="Forget me")).to_be_disabled()
    before = listed(page)
    page.get_by_label("Search the catalogue").fill("i3")
    page.locator(".catalogue").get_by_role("button", name="Take i3", exact=True).click()
    expect(page.locator(".heard")).to_contain_text("You took i3: 1 memory")
    visitor = page.locator(".headline h1").inner_text()
    assert re.fullmatch(r"visitor-[0-9a-f]{12}", visitor)
    page.get_by_label("Search the catalogue").fill("i5")
    page.locator(".catalogue").get_by_role("button", name="Take i5", exact=True).click()
    expect(page.locator(".heard")).to_contain_text("2 memories, entropy 0.50 → ")
    third = listed(page)[2]
    page.locator(".items").get_by_role("button", name=f"Take {third}", exact=True).click()
    expect(page.locator(".heard")).to_contain_text(f"You took {third}: 3 memories")
    expect(page.locator(".picture .dot")).to_have_count(3)
    assert page.evaluate("document.activeElement.dataset.focus") == "act-2"  # the next one can be taken at once
    bank = client.get(f"/users/{visitor}/memory").json()
    assert [entry["item_id"] for entry in bank["log"]][:2] == ["i3", "i5"]
    expect(page.locator(".sums .own .result b")).to_have_text(str(bank["k"]))
    expect(page.locator(".adaptive .lead")).to_contain_text(f"entropy {bank['entropy']:.2f}")
    assert listed(page) == titles(recommend(client, user_id=visitor)) != before
    page.reload()
    expect(page.locator(".picture .dot")).to_have_count(3)
    page.get_by_role("button", name="Forget me").click()
    expect(page.locator(".heard")).to_contain_text("You are forgotten")
    expect(page.locator(".picture .dot")).to_have_count(0)
    assert client.get(f"/users/{visitor}/memory").status_code == 404
    expect(page.locator(".headline h1")).not_to_have_text(visitor)
    assert listed(page) == before


# ------------------------------------------------------------------------------------------ system


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


# --------------------------------------------------------------------------------- what goes wrong


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
    expect(ask).to_contain_text("an API key is wanted")

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
    expect(ask).to_contain_text("an API key is wanted")


# ----------------------------------------------------------------------------------------- hostile

HOSTILE = [
    "<img src=x onerror=window.broken=1>",
    "\"><script>window.broken=1</script>",
    "</bdi></li><iframe srcdoc='<script>parent.broken=1</script>'>",
    "javascript:window.broken=1",
    "' onmouseover='window.broken=1",
    "{{constructor.constructor('window.broken=1')()}}",
    "\u202egnitanigami\u202c\u2066 and \u0007 \u001b[31m",
    "wide" * 250,
    "é" * 100 + "\u0300" * 100,
]  # fmt: skip


def test_hostile_titles_and_ids_are_text_and_nothing_else(page, client):
    bound = [text.encode()[:256].decode(errors="ignore") for text in HOSTILE]
    for n, text in enumerate(HOSTILE):
        metadata = {"title": text, HOSTILE[n][:60]: [text[:200]], "year": 1990 + n}
        assert client.put(f"/items/i{n + 1}", json={"metadata": metadata}).status_code == 200
        assert client.put(f"/items/{quote(bound[n], safe='')}", json={"metadata": {"title": text}}).status_code == 200
    for user in (*bound, "v"):
        events = [(user, f"i{m}", 1.6e9 + 86400 * m) for m in range(1, 10)]
        remember(client, *events, *((user, item, 1.7e9 + 60 * m) for m, item in enumerate(bound)))
    for user in bound:
        show(page, user)
        expect(page.locator(".picture .dot")).not_to_have_count(0)
        expect(page.locator(".headline h1")).to_have_text(user)
        for reason in page.locator(".reason.own").all()[:2]:
            reason.hover()
    page.get_by_text("What if").click()
    page.get_by_text("All memories as a table").click()
    shown = " ".join(page.locator(".name").all_text_contents())
    assert HOSTILE[0] in shown
    for view in ("/#/", "/#/try", "/#/system"):
        page.goto(view)
        expect(page.locator("main h1:visible")).to_be_visible()
    page.goto("/#/try")
    page.get_by_label("Search the catalogue").fill("window.broken")
    expect(page.locator(".catalogue button")).not_to_have_count(0)
    page.locator(".catalogue button").first.click()
    expect(page.locator(".heard")).to_contain_text("You took")
    assert page.evaluate("window.broken") is None
    assert page.locator("main :is(img, iframe, script, [onerror], [onmouseover])").count() == 0
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_browser_would_run_no_script_of_a_title_anyway(api_url):
    """Were the page to make markup of a title, its policy would stop it."""
    with httpx2.Client(base_url=api_url) as client:
        policy = client.get("/").headers["content-security-policy"]
        for name, file in FILES.items():
            answer = client.get(f"/inspector/{name}")
            assert answer.headers["content-security-policy"] == policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert (answer.content, answer.headers["etag"]) == (file.content, file.tag)
            assert client.get(f"/inspector/{name}", headers={"If-None-Match": file.tag}).status_code == 304
        for name in ("nope.js", "..%2Fapp.py", "%2e%2e"):
            assert client.get(f"/inspector/{name}").status_code in (404, 307)
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


# ------------------------------------------------------------------------------ everybody can use it


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_every_view_is_accessible_fits_and_does_not_shift(chrome, api_url, client, stack, scheme, width):
    axe = Axe()
    busy(client)
    options = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    for view in ("/", "/#/users/u", "/#/try", "/#/system"):
        page, seen = stack.enter_context(opened(chrome, base_url=api_url, **options))
        page.add_init_script(LAYOUT_SHIFT)
        page.goto(view)
        expect(page.locator("main h1:visible")).to_be_visible()
        expect(page.locator(".waiting:visible")).to_have_count(0)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
        assert page.evaluate("window.shifted") < 0.05, view
        for details in page.locator("details:visible > summary").all():
            details.click()
        found = axe.run(page, options=AXE_RULES).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in found] == [], view
        page_bytes = sum(len(answer.body()) for answer in seen.answers if urlsplit(answer.url).path in PAGE)
        assert 0 < page_bytes < BUDGET_BYTES


PAGE = {"/", *(f"/inspector/{name}" for name in FILES)}


def test_the_page_asks_nothing_but_the_public_api_of_its_own_host(chrome, api_url, client, stack):
    busy(client)
    page, seen = stack.enter_context(opened(chrome, base_url=api_url))
    for view in ("/", "/#/users/u", "/#/try", "/#/system"):
        page.goto(view)
        expect(page.locator("main h1:visible")).to_be_visible()
    page.goto("/#/try")
    page.locator(".catalogue button").first.click()
    expect(page.locator(".heard")).to_contain_text("You took")
    page.get_by_role("button", name="Forget me").click()
    expect(page.locator(".heard")).to_contain_text("You are forgotten")
    assert {urlsplit(sent).netloc for _, sent in seen.requests} == {urlsplit(api_url).netloc}
    documented = {
        (method.upper(), path)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    asked = {(method, needed(method, path)[0]) for method, path in seen.paths if path not in PAGE}
    assert {(method, path.replace(":id}", "}")) for method, path in asked} <= documented
    assert len(asked) >= 8


def test_everything_is_reached_by_keyboard(page, client):
    busy(client)
    page.goto("/#/users/u")
    expect(page.locator(".picture .dot")).to_have_count(10)
    page.locator("body").press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(FOCUSED))
    text = " ".join(map(str, reached))
    for part in ("dot", "reason own", "timeline", "scroll", "SUMMARY"):
        assert part in text, (part, reached)
    page.get_by_role("button", name="Theme").press("Enter")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    page.get_by_role("button", name="Theme").press("Enter")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


def test_the_package_holds_the_page():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["api"]
    files = {path.name for path in (ROOT / "api" / "inspector").iterdir()}
    assert files == set(FILES)
    assert all(any(fnmatch(f"inspector/{name}", pattern) for pattern in told) for name in files)
