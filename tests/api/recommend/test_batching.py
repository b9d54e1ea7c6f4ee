import asyncio

import pytest

from api.http.problems import CallerGone, MemoryUnavailable, Overloaded
from api.recommend.batching import MicroBatcher


class Recorder:
    """Answers asks with their doubles once told to, and keeps the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()
        self.entered = asyncio.Event()

    async def __call__(self, asks):
        self.batches.append(list(asks))
        self.entered.set()
        await self.free.wait()
        if 13 in asks:
            raise ValueError("unlucky")
        return [2 * ask for ask in asks]


def batcher(work, size=4, limit=6, lanes=1, kind_of=lambda request: None) -> MicroBatcher[int, int]:
    return MicroBatcher(work, size, 0.0, limit, lambda seconds: None, 60.0, lanes, kind_of)


async def ask(made: MicroBatcher[int, int], number: int) -> int:
    async def gone() -> bool:
        return False

    return (await made.submit([number], gone))[0]


def test_requests_that_wait_together_are_answered_together():
    async def scenario():
        work = Recorder()
        made = batcher(work)
        first = asyncio.create_task(ask(made, 1))
        await work.entered.wait()
        rest = [asyncio.create_task(ask(made, n)) for n in (2, 3, 4, 5, 6)]
        await asyncio.sleep(0)
        work.free.set()
        assert await asyncio.gather(first, *rest) == [2, 4, 6, 8, 10, 12]
        assert work.batches == [[1], [2, 3, 4, 5], [6]]
        await made.stop()

    asyncio.run(scenario())


def test_a_second_batch_goes_under_way_beside_the_first_and_a_third_does_not():
    async def scenario():
        work = Recorder()
        made = batcher(work, lanes=2)
        asked = []
        for n in (1, 2, 3, 4):
            asked.append(asyncio.create_task(ask(made, n)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert work.batches == [[1], [2]]
        work.free.set()
        assert await asyncio.gather(*asked) == [2, 4, 6, 8]
        assert work.batches == [[1], [2], [3, 4]]
        await made.stop()

    asyncio.run(scenario())


def test_work_whose_caller_left_is_dropped_and_a_full_queue_refuses_at_once():
    async def scenario():
        work = Recorder()
        made = batcher(work, limit=2)
        first = asyncio.create_task(ask(made, 1))
        await work.entered.wait()
        gone, stays = asyncio.create_task(ask(made, 2)), asyncio.create_task(ask(made, 3))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await ask(made, 4)
        gone.cancel()
        work.free.set()
        assert (await first, await stays) == (2, 6)
        assert work.batches == [[1], [3]]
        await made.stop()

    asyncio.run(scenario())


def test_an_error_reaches_every_caller_of_its_batch_and_no_other():
    async def scenario():
        work = Recorder()
        made = batcher(work)
        first = asyncio.create_task(ask(made, 1))
        await work.entered.wait()
        failing = [asyncio.create_task(ask(made, n)) for n in (13, 14)]
        await asyncio.sleep(0)
        work.free.set()
        assert await first == 2
        for one in failing:
            with pytest.raises(ValueError, match="unlucky"):
                await one
        assert await ask(made, 5) == 10
        await made.stop()

    asyncio.run(scenario())


def test_a_batch_holds_one_kind_and_one_that_hangs_holds_up_no_other():
    async def scenario():
        work, hung = Recorder(), asyncio.Event()

        async def answer(asks):
            if asks[0] % 2:
                work.batches.append(list(asks))
                await hung.wait()
                return asks
            return await work(asks)

        made = batcher(answer, limit=20, lanes=2, kind_of=lambda ask: ask % 2)
        work.free.set()
        asked = asyncio.create_task(made.submit([1, 2, 3, 4, 5, 6]))
        assert await made.submit([8, 10]) == [16, 20]
        hung.set()
        assert await asked == [1, 4, 3, 8, 5, 12]
        assert [1, 3, 5] in work.batches
        assert all(len({ask % 2 for ask in batch}) == 1 for batch in work.batches)
        await made.stop()

    asyncio.run(scenario())


async def _doubled(numbers):
    return [2 * number for number in numbers]


def leaving_batcher(work=_doubled, limit=8, patience_s=60.0) -> MicroBatcher:
    return MicroBatcher(work, 4, 0.0, limit, lambda seconds: None, patience_s)


def test_callers_get_their_own_answers(go):
    async def scene():
        batches = leaving_batcher()
        answers = await asyncio.gather(*(batches.submit([n, 10 * n]) for n in range(4)))
        await batches.stop()
        return answers

    assert go(scene()) == [[0, 0], [2, 20], [4, 40], [6, 60]]


def test_requests_beyond_the_limit_are_refused_at_once_and_none_of_theirs_is_done(go):
    async def scene():
        batches = leaving_batcher(limit=3)
        waiting = asyncio.ensure_future(batches.submit([1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batches.submit([3, 4])
        answers = await waiting
        await batches.stop()
        return answers

    assert go(scene()) == [2, 4]


def test_no_work_is_done_for_those_who_left(go):
    done = []

    async def noted(numbers):
        done.extend(numbers)
        return numbers

    async def hung_up() -> bool:
        return True

    async def still_there() -> bool:
        return False

    async def scene():
        batches = leaving_batcher(noted, patience_s=0.0)
        left = asyncio.ensure_future(batches.submit([1], hung_up))
        cancelled = asyncio.ensure_future(batches.submit([2]))
        stays = asyncio.ensure_future(batches.submit([3], still_there))
        await asyncio.sleep(0)
        cancelled.cancel()
        outcomes = await asyncio.gather(left, cancelled, stays, return_exceptions=True)
        await batches.stop()
        return outcomes

    left, cancelled, stays = go(scene())
    assert isinstance(left, CallerGone)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert (stays, done) == ([3], [3])


def test_an_error_reaches_all_of_its_batch_and_the_next_batch_is_answered(go):
    async def picky(numbers):
        if 13 in numbers:
            raise MemoryUnavailable("out of luck")
        return numbers

    async def scene():
        batches = leaving_batcher(picky)
        first = await asyncio.gather(*(batches.submit([n]) for n in (13, 1)), return_exceptions=True)
        second = await batches.submit([2])
        await batches.stop()
        return first, second

    first, second = go(scene())
    assert [type(error) for error in first] == [MemoryUnavailable, MemoryUnavailable]
    assert second == [2]
