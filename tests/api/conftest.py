"""What the tests of the api share."""

import httpx2
import pytest


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))
