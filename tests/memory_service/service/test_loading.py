"""Loading: what the collective index gets from Redis, at the start and later."""

import asyncio

import pytest

from tests.memory_service.calling import remember, service, took


@pytest.fixture
def pair(run, valkey_url, go):
    """A started memory service, and one over the same Redis that has not loaded anything."""
    writer, here = service(run, valkey_url), service(run, valkey_url)
    go(writer.start())
    go(here.models.start())
    yield writer, here
    for one in (writer, here):
        go(one.close())


def found(of) -> tuple[int, int]:
    """Users in the collective index, and residents."""
    return of.serving.collective.users, of.resident_users


def test_the_start_loads_all_and_makes_residents_later_comparisons_do_not(pair, go):
    writer, here = pair

    async def story():
        await remember(writer, "a", took(0, "i1"), took(1, "i2"))
        assert not here.serving.is_complete
        await here._loader.compare()
        assert here.serving.is_complete
        assert found(here) == (1, 1)
        here._loader.fills_residents = False
        await remember(writer, "b", took(0, "i1"), took(1, "i2"))
        await here._loader.compare()
        assert found(here) == (2, 1)
        await writer.forget("a")
        await here._loader.compare()
        assert found(here)[0] == 1

    go(story())


def test_users_who_changed_are_looked_at(pair, go):
    writer, here = pair

    async def story():
        for user in ("a", "b"):
            await remember(writer, user, took(0, "i1"), took(1, "i2"))
        await here._loader.look_at({"a", "nobody"})
        assert here.serving.collective.users == 1
        await asyncio.gather(here._loader.compare(), here._loader.compare())
        assert here.serving.collective.users == 2

    go(story())
