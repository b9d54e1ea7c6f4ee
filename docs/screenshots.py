"""`make screenshots`: takes the pictures of the inspector for the README and these pages.

Needs the run that `make quickstart` trained: starts `ramrec serve` with it and with its memories, and takes the
pictures in a headless Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, expect

from api.commands.quickstart import serving
from tests.browser import browser, chromium, opened

FOLDER = Path(__file__).parent
RUN = Path("runs/ml-100k")
WIDTH, HEIGHT = 1280, 1330
TAKEN = ("Alien", "Blade Runner", "Toy Story")


def main() -> int:
    """Take both pictures. Returns the exit code."""
    if chromium() is None or not (RUN / "checkpoint.json").exists():
        print("needs Chromium (Debian: apt-get install chromium) and the run of `make quickstart`", file=sys.stderr)
        return 2
    with serving(RUN) as url, browser() as started:
        options = {"viewport": {"width": WIDTH, "height": HEIGHT}, "base_url": url, "reduced_motion": "reduce"}
        with opened(started, **options) as (page, _):
            page.goto("/#/users/13")
            expect(page.locator(".picture .dot")).not_to_have_count(0)
            _save(page, "inspector-user.png")
        with opened(started, **options, color_scheme="dark") as (page, _):
            _be_a_new_user(page)
            _save(page, "inspector-try.png")
            page.get_by_role("button", name="Forget me").click()
            expect(page.locator(".heard")).to_contain_text("You are forgotten")
    return 0


def _be_a_new_user(page: Page) -> None:
    page.goto("/#/try")
    for title in TAKEN:
        page.get_by_label("Search the catalogue").fill(title)
        page.locator(".catalogue").get_by_role("button", name=f"Take {title}", exact=True).click()
        expect(page.locator(".heard")).to_contain_text(f"You took {title}")
    page.locator(".heard").hover()


def _save(page: Page, name: str) -> None:
    page.wait_for_load_state("networkidle")
    page.screenshot(path=FOLDER / name)
    print(FOLDER / name)


if __name__ == "__main__":
    sys.exit(main())
