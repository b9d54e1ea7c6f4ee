"""docs/operations.md and docs/configuration.md are complete: settings with their defaults, metrics, alerts, links."""

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from api.cli import app
from api.http.metrics import ApiMetrics
from api.settings import ApiSettings
from memory_service.http.metrics import Metrics as MemoryMetrics
from memory_service.settings import MemorySettings
from tests.operations.test_observability import ROOT, alerts

PAGE = ROOT / "docs" / "operations.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
MODELS = (MemorySettings, ApiSettings)


def section(title: str, page: Path = PAGE) -> str:
    """The text below a heading of the second level."""
    return re.split(r"^## ", page.read_text().split(f"\n## {title}\n")[1], flags=re.M)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows that begin with a name in backticks."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]


def default_of(field: FieldInfo) -> str:
    """A field's default as the table shows it."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "`~/.local/share/ramrec`"
    value = field.default.get_secret_value() if hasattr(field.default, "get_secret_value") else field.default
    if value is None or value == "":
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"{value}".lower()


def test_every_setting_is_listed_with_its_default_and_no_other():
    found = {cells[0].strip("`"): cells for cells in rows(section("Settings", CONFIGURATION)) if len(cells) == 4}
    wanted = {
        f"{model.model_config['env_prefix']}{name.upper()}": default_of(field)
        for model in MODELS
        for name, field in model.model_fields.items()
    }
    assert {name: cells[1] for name, cells in found.items()} == wanted
    assert all(len(cells[3]) > 10 for cells in found.values())


def test_exactly_the_metrics_that_exist_are_listed():
    found = {cells[0].strip("`"): cells[1] for cells in rows(section("Metrics"))}
    families = [one for metrics in (ApiMetrics(), MemoryMetrics()) for one in metrics.registry.collect()]
    assert found == {one.name: one.type for one in families if one.name.startswith("ramrec_")}
    for one in families:
        assert f"`{one.name}`" in section("Metrics")


def test_the_runbook_has_a_section_for_each_alert_and_no_others():
    headings = re.findall(r"^### (.+)$", section("Runbook"), re.M)
    assert len(headings) == len(set(headings))
    assert set(headings) == {rule["alert"] for rule in alerts()}
    for part in re.split(r"^### ", section("Runbook"), flags=re.M)[1:]:
        assert "*Look:*" in part, part
        assert "*Do:*" in part, part


def test_links_within_the_page_have_a_target():
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links
    assert set(links) <= anchors


@pytest.mark.parametrize(
    "words", sorted(set(re.findall(r"ramrec (memory export|memory import|\w+)", PAGE.read_text())))
)
def test_commands_that_are_named_exist_with_their_options(words):
    """A name after `ramrec` in the page is a command, unless it is that of the Helm chart."""
    import typer

    group, *rest = words.split()
    command = typer.main.get_command(app).commands.get(group)
    assert command is not None or f"helm install ramrec {group}" in PAGE.read_text(), words
    if rest:
        command = command.commands[rest[0]]
    if group == "keys":
        command = command.commands["create"]
    known = {option for one in getattr(command, "params", []) for option in one.opts}
    for line in re.findall(rf"^(?:RAMREC_\S+ )?ramrec {words}(?: create)?\b([^#\n]*)", PAGE.read_text(), re.M):
        assert set(re.findall(r"--[\w-]+", line)) <= known, line


def test_variables_that_are_named_are_read_by_the_code():
    settings = {f"{model.model_config['env_prefix']}{name.upper()}" for model in MODELS for name in model.model_fields}
    modules = [file for folder in ("api", "memory_service") for file in (ROOT / folder).rglob("*.py")]
    sources = "".join(file.read_text() for file in [*modules, ROOT / "docker-compose.yml"])
    for name in set(re.findall(r"RAMREC_[A-Z_]+", PAGE.read_text() + CONFIGURATION.read_text())) - settings:
        assert name in sources, name
