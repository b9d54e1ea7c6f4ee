"""A user on the inspector page, and somebody who tries it out."""

import math
import re

import pytest
from playwright.sync_api import expect

from tests.api.calls import recommend
from tests.api.inspector.pages import busy, listed, show, title, titles, took
from tests.browser import needs_chromium

pytestmark = needs_chromium


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
