"""A small log as a RecBole folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.data.logs import INTER, ITEMS, write


@pytest.fixture
def atomic(tmp_path: Path) -> Path:
    write(tmp_path / "tiny" / "tiny.inter", INTER)
    write(tmp_path / "tiny" / "tiny.item", ITEMS)
    return tmp_path / "tiny"
