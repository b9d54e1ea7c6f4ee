"""The pages are true: their code blocks run, their links lead somewhere, and what is generated is up to date."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from api.cli import app
from benchmarks.ports import free_port
from docs.reference import PAGES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL, GUIDE, README = DOCS / "tutorial.md", DOCS / "api.md", ROOT / "README.md"
RUN_HERE = (TUTORIAL, GUIDE, README)
"""Pages whose blocks run, in this order, against the service that the tutorial starts."""
NOT_RUN_LIMIT = 5
README_LIMIT_BYTES = 9_000

FAILING_CURL = 'curl() { command curl --fail-with-body "$@"; }\n'
"""An error of the service fails the script."""

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)(?: title=\"(?P<title>.+?)\")?\n(?P<text>.*?)^```$",
    re.M | re.S,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the line that it begins at."""

    page: Path
    line: int
    language: str
    text: str
    title: str | None
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks that name a language."""
    text = page.read_text()
    return [
        Block(page, text[: found.start()].count("\n") + 1, *found.group("language", "text", "title", "reason"))
        for found in BLOCK.finditer(text)
    ]


def lines_of(script: str) -> list[str]:
    """Commands of a script, one a line, without comments."""
    whole = script.replace("\\\n", " ")
    return [line for raw in whole.splitlines() if (line := re.sub(r"(^|\s)#.*", "", raw).strip())]


ALL = [block for page in RUN_HERE for block in blocks(page)]
SCRIPTS = [block for block in ALL if block.language == "bash"]


# ------------------------------------------------------------------------------------------- running the blocks


class Shell:
    """A working folder, and a service on ports that are free instead of the usual ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.memory_port = free_port(), free_port()
        api, memory = f"http://localhost:{self.port}", f"http://localhost:{self.memory_port}"
        self.more = {
            "ramrec serve": f"--port {self.port} --memory-port {self.memory_port} --data-dir {folder / 'data'}",
            "ramrec ingest": f"--url {api}",
            "ramrec inspect": f"--url {api}",
            "ramrec recommend": f"--memory-url {memory}",
        }
        tools = Path(sys.executable).parent
        self.environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "localhost,127.0.0.1",
            "XDG_STATE_HOME": str(folder / "state"),
        }
        self.server: subprocess.Popen[str] | None = None

    def run(self, block: Block) -> str:
        """Run a script as it stands on the page. Returns what it prints."""
        lines = lines_of(block.text)
        if all(line.startswith(("make ", "source ")) for line in lines):
            return self.dry_run(lines)
        script = block.text.replace("localhost:8000", f"localhost:{self.port}")
        for command, options in self.more.items():
            script = re.sub(rf"^{command}\b", f"{command} {options}", script, flags=re.M)
        if lines[0].startswith("ramrec serve"):
            return self.serve(script)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", FAILING_CURL + script],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{block}: {done.stdout}{done.stderr}"
        return done.stdout

    def dry_run(self, lines: list[str]) -> str:
        """Check that targets of make exist, without making them."""
        for line in lines:
            if line.startswith("make "):
                subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, check=True, timeout=30)
        return ""

    def serve(self, script: str) -> str:
        """Start the service and wait until it is ready."""
        self.server = subprocess.Popen(
            ["bash", "-c", f"exec {script}"], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line.startswith("RAMRec serves on"), line
        return line

    def stop(self) -> None:
        """Stop the service, if one was started."""
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            self.server.wait(30)
            assert self.server.stdout is not None
            self.server.stdout.close()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Block, str]]:
    """What each script of the pages printed, when all were run in order."""
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    shell = Shell(tmp_path_factory.mktemp("docs"))
    outputs = {}
    try:
        for block in ALL:
            if block.title is not None:
                (shell.folder / block.title).write_text(block.text)
            elif block.language == "bash" and block.reason is None:
                outputs[block] = shell.run(block)
        yield outputs
    finally:
        shell.stop()


def test_every_script_of_the_pages_runs(printed: dict[Block, str]) -> None:
    assert len(printed) > 20
    assert {block.page for block in printed} == set(RUN_HERE)


def test_answers_have_the_shape_that_the_pages_show(printed: dict[Block, str]) -> None:
    """Of a JSON block that follows a script: all its fields are in the answer, of the same type."""
    shown = [(script, answer) for script, answer in pairwise(ALL) if answer.language == "json"]
    assert len(shown) > 5
    for script, answer in shown:
        compare(json.loads(answer.text), json.loads(printed[script]), str(answer))


def compare(shown: Any, given: Any, where: str) -> None:
    """Fail where the answer lacks a field that the page shows, or has another type there."""
    if isinstance(shown, dict):
        assert isinstance(given, dict), where
        missing = shown.keys() - given.keys()
        assert not missing, f"{where}: {missing} of {sorted(given)}"
        for name, value in shown.items():
            compare(value, given[name], f"{where} {name}")
        assert shown.get("source") == given.get("source") or "source" not in shown, where
    elif isinstance(shown, list):
        assert isinstance(given, list), where
        assert bool(shown) == bool(given), f"{where}: {given}"
        for value in shown:
            compare(value, given[0], where)
    elif isinstance(shown, float | int) and not isinstance(shown, bool):
        assert isinstance(given, float | int), f"{where}: {given}"
    else:
        assert type(shown) is type(given), f"{where}: {given}"


def test_few_scripts_are_not_run_and_each_says_why() -> None:
    skipped = [block for block in SCRIPTS if block.reason is not None]
    assert len(skipped) <= NOT_RUN_LIMIT, [*map(str, skipped)]


@cache
def commands() -> dict[str, set[str]]:
    """Every command of `ramrec`, by its words, and its options."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, set[str]]]:
        options = [one for parameter in command.params for one in (*parameter.opts, *parameter.secondary_opts)]
        yield " ".join(words), set(options)
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*words, name))

    return dict(walk(typer.main.get_command(app), ("ramrec",)))


EVERY_PAGE = [README, *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_a_page_exist_with_their_options(page: Path) -> None:
    scripts = [line for block in blocks(page) if block.language == "bash" for line in lines_of(block.text)]
    for line in scripts:
        for command in re.findall(r"\bramrec\s(?!-)[^|;&]*", line):
            words, options = command.split(), re.findall(r"(?<=\s)--[\w-]+", command)
            known = max((name for name in commands() if words[: name.count(" ") + 1] == name.split()), key=len)
            assert known != "ramrec" or "helm" in line, f"{page.name}: {line}"
            assert set(options) <= commands()[known] | {"--help"} or "helm" in line, f"{page.name}: {line}"


# ------------------------------------------------------------------------------------------ links and reference


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w -]", "", re.sub(r"[`*]", "", title).lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return {slug(title) for title in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    make: Callable[[], str] = PAGES[name]
    assert (DOCS / name).read_text() == make(), "run `python -m docs.reference`"


def test_every_key_of_the_reference_says_what_it_means() -> None:
    for name in PAGES:
        rows = re.findall(r"^\| `.+\|$", (DOCS / name).read_text(), re.M)
        assert rows
        assert not [row for row in rows if row.endswith("|  |")]


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= README_LIMIT_BYTES


@pytest.mark.parametrize(("call", "limit"), [("/recommend", 15), ("/memories", 18)])
def test_each_step_of_a_walk_is_a_module_that_exists(call: str, limit: int) -> None:
    page = (DOCS / "how-it-works.md").read_text()
    walk = re.split(r"^#", page.split(f"### The walk of `POST {call}`\n")[1], flags=re.M)[0]
    steps = re.findall(r"^\d+\. (.+(?:\n   .+)*)", walk, re.M)
    assert 1 <= len(steps) <= limit
    modules = [re.findall(r"`(\w+(?:/\w+)+\.py)`", step) for step in steps]
    assert all(len(named) == 1 for named in modules), [*zip(steps, modules, strict=True)]
    assert len({*map(tuple, modules)}) == len(modules), "a module is named twice"
    for (module,) in modules:
        assert (ROOT / module).is_file(), module


def test_every_decision_is_listed_with_its_date() -> None:
    folder = DOCS / "decisions"
    index = (folder / "README.md").read_text()
    for page in sorted(folder.glob("[0-9]*.md")):
        number, title = re.match(r"# (\d+)\. (.+)\n", page.read_text()).groups()  # type: ignore[union-attr]
        date = re.search(r"^Date: (\d{4}-\d\d-\d\d)", page.read_text(), re.M)[1]  # type: ignore[index]
        assert page.name.startswith(f"{int(number):04}-")
        assert f"| {date} | [{title}]({page.name}) |" in index, page.name


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="no MkDocs here (pip install 'ramrec[docs]')")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists()
