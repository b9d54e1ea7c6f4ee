"""Calls that wait while others are worked on are worked on together: what every call costs is paid once for many.

An idle service answers a call at once; a busy one takes all that have come meanwhile as one (as databases commit in
groups). Calls that name the same user are never taken together.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from memory_service.protocol.telemetry import CALL

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE = 2
"""Groups under way: one is computed while another waits for Redis."""
LARGEST = 1000
"""Users in a group, unless a single call has more."""


class TooLate(RuntimeError):  # noqa: N818 - answered with 503
    """The caller's deadline passed before the work began."""


@dataclass(frozen=True)
class Call(Generic[Item, Result]):
    """One caller's items, the users they are about, where the results go, and until when they are wanted."""

    items: Sequence[Item]
    users: frozenset[str]
    done: asyncio.Future[list[Result]]
    deadline: float


class Merged(Generic[Item, Result]):
    """`work` on the items of many calls; its results are in the order of the items."""

    def __init__(self, work: Callable[[list[Item]], Awaitable[list[Result]]], user_of: Callable[[Item], str]) -> None:
        self._work, self._user_of = work, user_of
        self._waiting: deque[Call[Item, Result]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Results of these items. Raises what `work` raises on them."""
        caller = CALL.get()
        deadline = math.inf if caller is None else caller.deadline
        call: Call[Item, Result] = Call(items, frozenset(map(self._user_of, items)), asyncio.Future(), deadline)
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

    def _group(self) -> list[Call[Item, Result]]:
        """The next calls that fit together; those whose caller left or waits no longer are dropped."""
        group: list[Call[Item, Result]] = []
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

    async def _run(self, group: list[Call[Item, Result]]) -> None:
        try:
            results = await self._work([item for call in group for item in call.items])
        except Exception as error:
            await self._one_by_one(group, error)
            return
        at = 0
        for call in group:
            _resolve(call, results[at : at + len(call.items)])
            at += len(call.items)

    async def _one_by_one(self, group: list[Call[Item, Result]], error: Exception) -> None:
        """What failed together may have failed for one of them."""
        if len(group) == 1:
            _fail(group[0], error)
            return
        for call in group:
            try:
                _resolve(call, await self._work(list(call.items)))
            except Exception as own:
                _fail(call, own)


def _resolve(call: Call[Item, Result], results: list[Result]) -> None:
    if not call.done.done():
        call.done.set_result(results)


def _fail(call: Call[Item, Result], error: Exception) -> None:
    if not call.done.done():
        call.done.set_exception(error)
