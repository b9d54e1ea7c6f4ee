"""Calls that wait are worked on together."""

import asyncio

import pytest

from memory_service.service.merging import LARGEST, Merged


class Work:
    """Answers with the items doubled, once the gate is open; remembers what was taken together."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = asyncio.Event()

    async def __call__(self, items: list[int]) -> list[int]:
        self.groups.append(items)
        await self.gate.wait()
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]


def calls(*groups: list[int]):
    async def together():
        work = Work()
        merged = Merged(work, lambda item: str(item))
        tasks = []
        for group in groups:
            tasks.append(asyncio.create_task(merged(group)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        work.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True), work.groups

    return together()


def test_the_first_goes_at_once_and_those_that_wait_go_together(go):
    results, groups = go(calls([1], [2], [3, 4], [5]))
    assert results == [[2], [4], [6, 8], [10]]
    assert groups == [[1], [2], [3, 4, 5]]


def test_calls_about_the_same_user_are_never_taken_together(go):
    results, groups = go(calls([1], [2], [3], [3], [4]))
    assert results == [[2], [4], [6], [6], [8]]
    assert groups == [[1], [2], [3, 4], [3]]


def test_what_fails_together_fails_only_for_its_own_caller(go):
    results, _ = go(calls([1], [2], [3], [13], [4]))
    assert [results[n] for n in (0, 1, 2, 4)] == [[2], [4], [6], [8]]
    with pytest.raises(ValueError, match="thirteen"):
        raise results[3]


def test_groups_stay_within_a_size_but_a_large_call_goes_through(go):
    large = list(range(10, 10 + LARGEST + 5))
    large.remove(13)
    results, groups = go(calls([1], [2], large, [3]))
    assert [len(result) for result in results] == [1, 1, len(large), 1]
    assert [len(group) for group in groups] == [1, 1, len(large), 1]


def test_a_caller_that_left_is_not_worked_for(go):
    async def left():
        work = Work()
        merged = Merged(work, str)
        tasks = [asyncio.create_task(merged([n])) for n in range(4)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.sleep(0)
        work.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return work.groups

    assert 3 not in [item for group in go(left()) for item in group]
