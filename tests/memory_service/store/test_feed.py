"""News of Redis: of the database that the URL names, and of no other."""

import asyncio
from contextlib import suppress

import redis

from memory_service.protocol.hash_slots import user_key
from memory_service.store.feed import Feed
from memory_service.store.redis.connect import Connector


def test_only_the_configured_database_is_listened_to(go, valkey_url):
    heard, began = set(), []

    async def changed(users: set[str]) -> None:
        heard.update(users)

    async def missed() -> None:
        began.append(True)

    async def story() -> None:
        connector = Connector(f"{valkey_url}?db=1", 5.0)
        feed = Feed(connector, changed, missed)
        task = asyncio.create_task(feed.run())
        await asyncio.wait_for(feed.listening.wait(), 10)
        for database, user in ((0, "elsewhere"), (1, "here"), (11, "further off"), (1, "last {odd}*")):
            with redis.Redis.from_url(f"{valkey_url}?db={database}") as client:
                client.set(user_key(user), b"x", ex=60)
        while "last {odd}*" not in heard:
            await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await connector.close()

    go(story())
    assert heard == {"here", "last {odd}*"}
    assert began == [True]
