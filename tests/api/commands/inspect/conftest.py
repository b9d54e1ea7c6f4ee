"""`ramrec inspect` as its entry point runs it."""

import sys
from collections.abc import Callable, Iterator

import httpx2
import pytest

from api import cli
from tests.api.commands.inspect.output import Told


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


@pytest.fixture
def ask(monkeypatch, capsys) -> Iterator[Callable[..., Told]]:
    """The command, as its entry point runs it."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "RAMREC_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(url: str, *words: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["ramrec", "inspect", "--url", url, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Told(int(ended.value.code or 0), *capsys.readouterr())

    return run
