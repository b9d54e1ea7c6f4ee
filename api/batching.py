"""Micro-batching: requests that arrive together are answered by one retrieval call and one forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from api.problems import CallerGone, DeadlineExceeded, Overloaded
from memory_service.telemetry import CALL, Call, together

PATIENCE_S = 0.05
"""Callers rarely leave sooner than this."""

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")
Gone = Callable[[], Awaitable[bool]]


@dataclass(slots=True)
class _Waiting(Generic[Ask, Answer]):
    ask: Ask
    gone: Gone | None
    answer: asyncio.Future[Answer]
    call: Call | None = field(default_factory=CALL.get)
    since: float = field(default_factory=time.perf_counter)


class MicroBatcher(Generic[Ask, Answer]):
    """Collects up to `size` requests. Several batches (`lanes`) may be under way, so that one is computed while the
    memory is asked for another. A batch waits for more, at most `wait_s`, only where the one before it held several:
    a lone caller is answered at once.

    A request whose deadline has passed is refused: at once where its caller set one, else when its turn comes or its
    answer. A batch has the latest deadline of its requests. Requests whose caller has gone are dropped before any
    work is done for them: the future is cancelled, or after `patience_s` in the queue the connection turns out to be
    closed. An error of `work` reaches every caller of its batch. `observe_wait` is told how long each request queued,
    in seconds.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Ask]], Coroutine[Any, Any, Sequence[Answer]]],
        size: int,
        wait_s: float,
        limit: int,
        observe_wait: Callable[[float], None],
        patience_s: float = PATIENCE_S,
        lanes: int = 1,
    ) -> None:
        self._work, self._size, self._wait_s, self._observe = work, size, wait_s, observe_wait
        self._patience_s, self._lanes = patience_s, lanes
        self._queue: asyncio.Queue[_Waiting[Ask, Answer]] = asyncio.Queue(limit)
        self._tasks: list[asyncio.Task[None]] = []
        self._collecting = asyncio.Lock()
        self._crowded = False

    def start(self) -> None:
        """Begin to answer. Call on the running event loop."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run()) for _ in range(self._lanes)]

    async def stop(self) -> None:
        """Answer what was accepted, then end."""
        await self._queue.join()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def submit(self, asks: Sequence[Ask], gone: Gone | None = None) -> list[Answer]:
        """The answers to one caller's requests. `gone` tells whether the caller has hung up.

        Raises:
            Overloaded: there is no room for all of them; none was accepted.
            CallerGone: the caller left while they waited.
            DeadlineExceeded: the caller's deadline passed.
        """
        if self._queue.qsize() + len(asks) > self._queue.maxsize:
            raise Overloaded(f"{self._queue.qsize()} of at most {self._queue.maxsize} requests are waiting already")
        loop = asyncio.get_running_loop()
        waiting: list[_Waiting[Ask, Answer]] = [_Waiting(ask, gone, loop.create_future()) for ask in asks]
        for one in waiting:
            self._queue.put_nowait(one)
        call = CALL.get()
        if call is not None and call.timed:
            alarm = loop.call_later(max(0.0, call.left_s), _expire, waiting)
            try:
                return await asyncio.gather(*(one.answer for one in waiting))
            finally:
                alarm.cancel()
        if len(waiting) == 1:
            return [await waiting[0].answer]
        return await asyncio.gather(*(one.answer for one in waiting))

    async def _run(self) -> None:
        while True:
            async with self._collecting:
                taken = await self._collect()
            try:
                await self._answer([one for one in taken if await self._wanted(one)])
            finally:
                for _ in taken:
                    self._queue.task_done()

    async def _collect(self) -> list[_Waiting[Ask, Answer]]:
        taken = [await self._queue.get()]
        if self._crowded and self._queue.empty() and self._wait_s:
            await asyncio.sleep(self._wait_s)
        while len(taken) < self._size and not self._queue.empty():
            taken.append(self._queue.get_nowait())
        self._crowded = len(taken) > 1
        return taken

    async def _wanted(self, one: _Waiting[Ask, Answer]) -> bool:
        """Whether somebody still waits for the answer."""
        waited_s = time.perf_counter() - one.since
        self._observe(waited_s)
        if one.call is not None and one.call.left_s <= 0:
            _expire([one])
        if one.gone and waited_s >= self._patience_s and not one.answer.done():
            gone = await one.gone()
            if gone and not one.answer.done():
                one.answer.set_exception(CallerGone(f"the caller left within {waited_s:.3f} s"))
        return not one.answer.done()

    async def _answer(self, wanted: list[_Waiting[Ask, Answer]]) -> None:
        if not wanted:
            return
        CALL.set(together([one.call for one in wanted]))
        try:
            answers = await self._work([one.ask for one in wanted])
        except Exception as error:
            for one in wanted:
                if not one.answer.done():
                    one.answer.set_exception(error)
        else:
            _expire([one for one in wanted if one.call is not None and one.call.left_s <= 0])
            for one, answer in zip(wanted, answers, strict=True):
                if not one.answer.done():  # cancelled meanwhile
                    one.answer.set_result(answer)


def _expire(waiting: Sequence[_Waiting[Any, Any]]) -> None:
    """Nobody is served by these answers any more."""
    for one in waiting:
        if not one.answer.done():
            waited_s = time.perf_counter() - one.since
            one.answer.set_exception(DeadlineExceeded(f"no answer within {waited_s:.3f} s, the time there was"))
