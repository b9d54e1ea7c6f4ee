"""Everybody can use the inspector page: accessibility, sizes, keyboard."""

from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from api.inspector.files import read_files
from tests.api.inspector.pages import busy
from tests.browser import needs_chromium, opened

pytestmark = needs_chromium


LAYOUT_SHIFT = """
  window.shifted = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
  }).observe({ type: "layout-shift", buffered: true });
"""


FOCUSED = "document.activeElement.tagName + ' ' + document.activeElement.getAttribute('class')"


BUDGET_BYTES = 300_000


PAGE = {"/", *(f"/inspector/{name}" for name in read_files())}
AXE_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


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
