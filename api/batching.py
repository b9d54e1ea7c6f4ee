"""Micro-batching: requests that arrive together are answered by one retrieval call and one forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from api.problems import Overloaded

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


@dataclass
class _Waiting(Generic[Ask, Answer]):
    ask: Ask
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


class MicroBatcher(Generic[Ask, Answer]):
    """Collects up to `size` requests, waiting at most `wait_s` for more once it has one.

    Requests whose caller has gone are dropped before any work is done for them. An error of `work` reaches every caller
    of its batch. `observe_wait` is told how long each request queued, in seconds.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Ask]], Awaitable[Sequence[Answer]]],
        size: int,
        wait_s: float,
        limit: int,
        observe_wait: Callable[[float], None],
    ) -> None:
        self._work, self._size, self._wait_s, self._observe = work, size, wait_s, observe_wait
        self._queue: asyncio.Queue[_Waiting[Ask, Answer]] = asyncio.Queue(limit)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer. Call on the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Answer what was accepted, then end."""
        await self._queue.join()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def submit(self, ask: Ask) -> Answer:
        """The answer to one request. Raises Overloaded at once where the queue is full."""
        waiting: _Waiting[Ask, Answer] = _Waiting(ask, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            raise Overloaded(f"{self._queue.maxsize} requests are waiting already") from None
        return await waiting.answer

    async def _run(self) -> None:
        while True:
            taken = await self._collect()
            wanted = [one for one in taken if not one.answer.done()]  # a cancelled caller has a cancelled future
            try:
                await self._answer(wanted)
            finally:
                for _ in taken:
                    self._queue.task_done()

    async def _collect(self) -> list[_Waiting[Ask, Answer]]:
        taken = [await self._queue.get()]
        if self._queue.empty() and self._wait_s:
            await asyncio.sleep(self._wait_s)
        while len(taken) < self._size and not self._queue.empty():
            taken.append(self._queue.get_nowait())
        return taken

    async def _answer(self, wanted: list[_Waiting[Ask, Answer]]) -> None:
        if not wanted:
            return
        now = time.perf_counter()
        for one in wanted:
            self._observe(now - one.since)
        try:
            answers = await self._work([one.ask for one in wanted])
        except Exception as error:
            for one in wanted:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for one, answer in zip(wanted, answers, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)
