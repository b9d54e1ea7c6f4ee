"""Habits on the inspector page."""

import math

import httpx2
from playwright.sync_api import Route, expect

from tests.api.calls import recommend
from tests.api.commands.inspect.test_habits import KEPT, NOW, habits_of_u
from tests.api.inspector.pages import busy, listed, show, titles
from tests.browser import needs_chromium, opened

pytestmark = needs_chromium


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
