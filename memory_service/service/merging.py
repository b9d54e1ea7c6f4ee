"""Merging: calls that arrive while others are worked on are then worked on together, so that fixed costs are paid once.

An idle service works on a call at once; a busy one takes all calls that have arrived meanwhile as one group, as
databases do with commits. Calls that name the same user are never in one group.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from memory_service.protocol.call.context import CALL

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE = 2
"""Groups in progress at the same time: one is computed while another waits for Redis."""
LARGEST = 1000
"""Users in a group, unless a single call has more."""


class TooLate(RuntimeError):  # noqa: N818 - answered with 503
    """The caller's deadline passed before the work began."""


@dataclass(frozen=True)
class WaitingCall(Generic[Item, Result]):
    """One caller's items, the users that they name, the future of their results, and the deadline
    (`time.monotonic()`).
    """

    items: Sequence[Item]
    users: frozenset[str]
    done: asyncio.Future[list[Result]]
    deadline: float


class Merged(Generic[Item, Result]):
    """Does `work` on the items of many calls; `work` returns results in the order of the items."""

    def __init__(self, work: Callable[[list[Item]], Awaitable[list[Result]]], user_of: Callable[[Item], str]) -> None:
        self._work, self._user_of = work, user_of
        self._waiting: deque[WaitingCall[Item, Result]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """The results of these items. Raises what `work` raises on them, and TooLate if the deadline has passed."""
        caller = CALL.get()
        deadline = math.inf if caller is None else caller.deadline
        call: WaitingCall[Item, Result] = WaitingCall(
            items, frozenset(map(self._user_of, items)), asyncio.Future(), deadline
        )
        self._waiting.append(call)
        self._start()
        return await call.done

    def _start(self) -> None:
        while self._waiting and len(self._running) < AT_ONCE:
            group = self._group()
            if not group:
                return
            task = asyncio.create_task(self._run(group))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    def _group(self) -> list[WaitingCall[Item, Result]]:
        """The next calls that fit into one group; calls whose caller left or whose deadline has passed are dropped."""
        group: list[WaitingCall[Item, Result]] = []
        users: set[str] = set()
        for _ in range(len(self._waiting)):
            call = self._waiting.popleft()
            if call.done.cancelled():
                continue
            if call.deadline <= time.monotonic():
                _fail(call, TooLate("the deadline passed while the call waited for others"))
                continue
            if group and (not users.isdisjoint(call.users) or len(users) + len(call.users) > LARGEST):
                self._waiting.append(call)
                continue
            group.append(call)
            users |= call.users
        return group

    async def _run(self, group: list[WaitingCall[Item, Result]]) -> None:
        try:
            results = await self._work([item for call in group for item in call.items])
        except Exception as error:
            await self._one_by_one(group, error)
            return
        at = 0
        for call in group:
            _resolve(call, results[at : at + len(call.items)])
            at += len(call.items)

    async def _one_by_one(self, group: list[WaitingCall[Item, Result]], error: Exception) -> None:
        """Work on each call alone: the group may have failed because of one of them."""
        if len(group) == 1:
            _fail(group[0], error)
            return
        for call in group:
            try:
                _resolve(call, await self._work(list(call.items)))
            except Exception as own:
                _fail(call, own)


def _resolve(call: WaitingCall[Item, Result], results: list[Result]) -> None:
    if not call.done.done():
        call.done.set_result(results)


def _fail(call: WaitingCall[Item, Result], error: Exception) -> None:
    if not call.done.done():
        call.done.set_exception(error)
