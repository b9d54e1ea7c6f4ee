"""Pages of the inspector in a real headless Chromium, against the real services."""

from contextlib import ExitStack

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.api.commands.inspect.test_habits import habitual
from tests.browser import PATIENCE_MS, browser, opened

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def chrome():
    with browser() as started:
        yield started


@pytest.fixture
def page(chrome: Browser, api_url: str, stack: ExitStack) -> Page:
    page, _ = stack.enter_context(opened(chrome, base_url=api_url))
    return page


@pytest.fixture
def habitual_url(tmp_path, valkey_url, stack) -> str:
    return habitual(tmp_path, valkey_url, stack)
