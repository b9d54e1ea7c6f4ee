"""A real headless Chromium for tests, and what a page did in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Response, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000


def chromium() -> str | None:
    """Where the browser is: as RAMREC_CHROMIUM says, or on the path."""
    return os.environ.get("RAMREC_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium here (Debian: apt-get install chromium)")


@contextmanager
def browser() -> Iterator[Browser]:
    """Started without a sandbox where the user is root, for whom it has none."""
    arguments = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        try:
            yield opened
        finally:
            opened.close()


@dataclass
class Seen:
    """What happened on a page: errors of scripts, dialogs of the browser, answers received, requests sent."""

    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """From now on."""
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", self._dismiss)
        page.on("response", lambda answer: self.answers.append(answer))
        page.on("request", lambda request: self.requests.append((request.method, request.url)))

    def _dismiss(self, dialog: object) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    @property
    def paths(self) -> set[tuple[str, str]]:
        """Method and path of every request."""
        return {(method, urlsplit(url).path) for method, url in self.requests}


@contextmanager
def opened(within: Browser, **options: object) -> Iterator[tuple[Page, Seen]]:
    """A page in a profile of its own. No error of a script and no dialog of the browser may come."""
    context = within.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(PATIENCE_MS)
    try:
        page, seen = context.new_page(), Seen()
        seen.watch(page)
        yield page, seen
        assert not seen.errors
        assert not seen.dialogs
    finally:
        context.close()
