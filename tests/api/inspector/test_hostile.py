"""Hostile titles and ids stay text, and the page asks nothing but the public API."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx2
from playwright.sync_api import expect

from api.http.app import ROUTERS
from api.http.policy import RouteTable
from api.inspector.files import FOLDER, read_files
from tests.api.calls import remember
from tests.api.inspector.pages import busy, show
from tests.browser import needs_chromium, opened

pytestmark = needs_chromium


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
        for name, file in read_files().items():
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


PAGE = {"/", *(f"/inspector/{name}" for name in read_files())}


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
    table = RouteTable(ROUTERS, [])
    asked = {(method, table.find(method, path)[0]) for method, path in seen.paths if path not in PAGE}
    assert {(method, path.replace(":id}", "}")) for method, path in asked} <= documented
    assert len(asked) >= 8


ROOT = Path(__file__).parents[3]


def test_the_package_holds_the_page():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["api"]
    files = {path.name for path in FOLDER.iterdir()}
    assert files == set(read_files())
    assert all(any(fnmatch(f"inspector/static/{name}", pattern) for pattern in told) for name in files)
