"""Services with one model, and users who took something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.models.changing import USERS, Service


@pytest.fixture
def service(run, valkey_url, stack) -> Service:
    """The old model serves, and all users have memories."""
    one = Service(stack, run, valkey_url)
    one.take(*USERS)
    return one


@pytest.fixture
def fresh(valkey_url, stack) -> Iterator[object]:
    """A service of one model over an empty Redis of its own, where some users have taken the same."""
    numbers = iter(range(1, 16))

    def started(run: Path, *users: str) -> Service:
        one = Service(stack, run, f"{valkey_url}?db={next(numbers)}")
        one.take(*users)
        return one

    return started
