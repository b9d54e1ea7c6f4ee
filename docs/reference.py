"""Writes the reference pages: `configuration.md` from the settings and configs, `commands.md` from the command line.

Run `python -m docs.reference` after a change to either; a test holds the pages to the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from api.cli import app
from api.settings import ApiSettings
from memory_service.settings import MemorySettings
from model.config import Config

FOLDER = Path(__file__).parent
MADE = "<!-- Written by `python -m docs.reference`; do not edit. -->\n"
BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))

SETTINGS_HEAD = """# Configuration

Services are configured by settings, training runs by a TOML file. This page lists all of both, with defaults and
bounds. It is written from the code (`python -m docs.reference`).

## Settings

A setting is an environment variable, or a file of that name in `/run/secrets` (another folder: `RAMREC_SECRETS_DIR`).
An empty variable counts as not set. Times are in seconds. `ramrec serve` has options for the most common settings
([commands](commands.md#ramrec-serve)) and passes all variables on to the processes that it starts.
"""
OTHER_VARIABLES = """
### Other variables

| variable | meaning |
|---|---|
| `RAMREC_SECRETS_DIR` | folder of secrets, instead of `/run/secrets` |
| `RAMREC_API_WORKERS`, `RAMREC_MEMORY_REPLICAS` | processes that `ramrec serve` starts |
| `RAMREC_KEY` | API key of `ramrec ingest` and `ramrec inspect` |
| `OTEL_EXPORTER_OTLP_ENDPOINT` | turns traces on (needs `pip install 'ramrec[otel]'`), with its other variables |
| `OMP_NUM_THREADS` | set it to 1 for services: threads of FAISS and NumPy cost more than they bring. The images do |
| `GLIBC_TUNABLES` | `glibc.malloc.hugetlb=1` gives the memory service huge pages. `ramrec serve` does |

Variables of `docker compose` are at the head of `docker-compose.yml`, values of the Helm chart in
`docker/helm/ramrec/values.yaml`.
"""
TRAINING_HEAD = """
## Training configuration

`ramrec train --config FILE` reads a TOML file with a table for each section below, a shipped file by its name
(`model/configs/`), or a RecBole YAML file ([coming from RecBole](recbole.md)). Unknown keys and values out of bounds
are errors that name the key. The whole config is saved beside the weights, with what training measured and decided.
"""

COMMANDS_HEAD = """# Commands

`ramrec COMMAND --help` says the same. Exit code 2, with one line on stderr, means that something expected went wrong,
such as a missing file or a service that does not answer. This page is written from the code
(`python -m docs.reference`).
"""


def configuration() -> str:
    """All settings of the services and all keys of a training run."""
    parts = [MADE, SETTINGS_HEAD]
    for title, settings in (("Memory service", MemorySettings), ("Api", ApiSettings)):
        prefix = str(settings.model_config.get("env_prefix", ""))
        names = {f"{prefix}{name.upper()}": field for name, field in settings.model_fields.items()}
        parts += [f"\n### {title}\n\n", *table("setting", names)]
    parts += [OTHER_VARIABLES, TRAINING_HEAD]
    for name, section in Config.model_fields.items():
        model = section.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        parts += [f"\n### {name}\n\n{model.__doc__}\n\n", *table("key", dict(model.model_fields))]
    return "".join(parts)


def table(first: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    """Rows of a table: name, default, values, meaning."""
    yield f"| {first} | default | values | meaning |\n|---|---|---|---|\n"
    for name, field in fields.items():
        meaning = field.description or ""
        yield f"| `{name}` | {default_of(field)} | {values_of(field)} | {cell(meaning)} |\n"


def default_of(field: FieldInfo) -> str:
    """The default as it stands in a table."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=field.default_factory is not None)
    if isinstance(value, Path):
        return "`~/.local/share/ramrec`"
    value = value.get_secret_value() if isinstance(value, SecretStr) else value
    if value in (None, "", {}):
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"{value}".lower()


def values_of(field: FieldInfo) -> str:
    """Kind and bounds of a field."""
    kind = field.annotation
    options = [part for part in get_args(kind) or (kind,) if part is not type(None)]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(kind))
    bounds = []
    for rule in field.metadata:
        bounds += [f"{mark} {getattr(rule, name)}" for form, name, mark in BOUNDS if isinstance(rule, form)]
        bounds += [f"{rule.min_length} characters or more"] if isinstance(rule, MinLen) else []
    return f"{kind_of(options[0])}{', ' if bounds else ''}{', '.join(bounds)}"


def kind_of(kind: Any) -> str:
    """What a value is, in a word."""
    names = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path", SecretStr: "secret"}
    return names.get(kind, "table of numbers")


def commands() -> str:
    """Every command of `ramrec` with its options."""
    return "".join([MADE, COMMANDS_HEAD, *_described(typer.main.get_command(app), ("ramrec",))])


def _described(command: Any, words: tuple[str, ...]) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from _described(inner, (*words, name))
        return
    yield f"\n## {' '.join(words)}\n\n{_paragraphs(command.help)}\n"
    shown = [one for one in command.params if one.name != "help"]
    if shown:
        yield "\n| option | default | meaning |\n|---|---|---|\n"
    for one in shown:
        yield f"| {_named(one)} | {_default(one)} | {cell(one.help or '')} |\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def _named(parameter: Any) -> str:
    argument = parameter.metavar or parameter.name.upper()
    names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else [argument]
    variable = f" or `{parameter.envvar}`" if parameter.envvar else ""
    return ", ".join(f"`{name}`" for name in names) + variable


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value == ():
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"{value}".lower()


def cell(text: str) -> str:
    """Text that fits into a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PAGES = {"configuration.md": configuration, "commands.md": commands}


def main() -> None:
    """Write all pages."""
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
