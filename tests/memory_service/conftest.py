"""What tests of the memory service share."""

import pytest

from model.checkpoint import load_checkpoint
from tests.memory_service.calling import Caller, opened


@pytest.fixture
def caller(run, valkey_url, stack) -> Caller:
    """A memory service over an empty Valkey."""
    return Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)
