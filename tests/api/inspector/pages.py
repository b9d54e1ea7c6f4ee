"""What tests of the inspector page do and read."""

from urllib.parse import quote

import httpx2
from playwright.sync_api import Page, expect

from tests.api.calls import remember


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
