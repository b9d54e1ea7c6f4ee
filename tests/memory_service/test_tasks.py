"""Tasks that are told to end do, also where a cancellation is lost on the way."""

import asyncio

import pytest
import redis.asyncio as redis

from memory_service.tasks import cancel_and_wait


def test_who_calls_redis_all_the_time_ends_whenever_it_is_told_to(go, valkey_url):
    async def story() -> int:
        client = redis.Redis.from_url(valkey_url, socket_timeout=30)

        async def forever() -> None:
            while True:
                await client.ping()

        tasks = []
        for turns in range(48):  # cancelled at every point of a call, some of them where the cancellation is lost
            tasks.append(asyncio.create_task(forever()))
            for _ in range(turns % 24):
                await asyncio.sleep(0)
            tasks[-1].cancel()
        await cancel_and_wait(tasks)
        await client.aclose()
        return sum(task.cancelled() for task in tasks)

    assert go(story()) == 48


def test_an_end_that_is_interrupted_still_ends_all(go):
    async def stubborn(deaf: int) -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                deaf -= 1
                if deaf < 0:
                    raise

    async def failing() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError

    async def story() -> None:
        tasks = [asyncio.create_task(one) for one in (stubborn(0), stubborn(2), failing())]
        await asyncio.sleep(0)
        ending = asyncio.create_task(cancel_and_wait(tasks))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert all(task.done() for task in tasks)
        await cancel_and_wait(tasks)
        await cancel_and_wait([])

    go(story())
