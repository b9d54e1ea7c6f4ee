"""What the container tests measure, kept with `--results FILE`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.commands.report import measured_with
from benchmarks.measures import Measure, measured, store


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="file to put measurements into")


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Takes down a figure: name, value, unit, bounds."""
    found: list[Measure] = []

    def take(name: str, value: float, unit: str, **bounds: float) -> None:
        found.append(measured(name, value, unit, **bounds))

    yield take
    file = request.config.getoption("--results")
    if file is not None:
        about = measured_with() | {"command": "make test-compose", "kernel": platform.release()}
        store("compose", found, about, file)
