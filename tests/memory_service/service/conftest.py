"""What tests of several memory replicas share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.memory_service.plain_memory import (
    RESIDENT,
    RULES,
)
from tests.memory_service.replica import Replica
from tests.synthetic import random_checkpoint, small_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    """A model whose banks hold few entries."""
    folder = tmp_path_factory.mktemp("small-banks")
    save_checkpoint(folder, random_checkpoint(small_config().model_copy(update={"rules": RULES})))
    return load_checkpoint(folder, with_weights=False)


@pytest.fixture
def pair(valkey_url, checkpoint, go) -> Iterator[tuple[Replica, Replica]]:
    """Two replicas over an empty Valkey; the second has to drop banks all the time."""
    both = [go(Replica(valkey_url, checkpoint, limit).started()) for limit in RESIDENT]
    yield both[0], both[1]
    for one in both:
        go(one.close())
