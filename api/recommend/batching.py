"""Micro-batching: requests that arrive together are answered by one retrieval call and one forward pass."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from api.http.problems import CallerGone, DeadlineExceeded, Overloaded
from memory_service.protocol.telemetry import CALL, Call, together

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


@dataclass(slots=True)
class _Queue(Generic[Ask, Answer]):
    """Requests of one kind, the oldest first; how many batches of them are under way, and whether one is being made."""

    kind: Hashable
    waiting: deque[_Waiting[Ask, Answer]] = field(default_factory=deque)
    running: int = 0
    is_collecting: bool = False
    is_crowded: bool = False


class MicroBatcher(Generic[Ask, Answer]):
    """Collects up to `size` requests of one kind: `kind_of` says which replica of the memory service a batch is for. Of
    each kind several batches (`lanes`) may be under way, so that one is computed while the memory is asked for another.
    A batch waits for more, at most `wait_s`, only where the one before it held several: a lone caller is answered at
    once.

    A request whose deadline has passed is refused: at once where its caller set one, else when its turn comes or its
    answer. A batch has the latest deadline of its requests. Requests whose caller has gone are dropped before any
    work is done for them: the future is cancelled, or after `patience_s` in the queue the connection turns out to be
    closed. An error of `work` reaches every caller of its batch. `observe_wait` is told how long each request queued,
    in seconds. At most `limit` requests wait.
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
        kind_of: Callable[[Ask], Hashable] = lambda ask: None,
    ) -> None:
        self._work, self._size, self._wait_s, self._limit, self._observe = work, size, wait_s, limit, observe_wait
        self._patience_s, self._lanes, self._kind_of = patience_s, lanes, kind_of
        self._queues: dict[Hashable, _Queue[Ask, Answer]] = {}
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Answer what was accepted."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def submit(self, asks: Sequence[Ask], gone: Gone | None = None) -> list[Answer]:
        """The answers to one caller's requests. `gone` tells whether the caller has hung up.

        Raises:
            Overloaded: there is no room for all of them; none was accepted.
            CallerGone: the caller left while they waited.
            DeadlineExceeded: the caller's deadline passed.
        """
        if self._waiting + len(asks) > self._limit:
            raise Overloaded(f"{self._waiting} of at most {self._limit} requests are waiting already")
        loop = asyncio.get_running_loop()
        waiting: list[_Waiting[Ask, Answer]] = [_Waiting(ask, gone, loop.create_future()) for ask in asks]
        for one in waiting:
            self._enqueue(one)
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

    def _enqueue(self, one: _Waiting[Ask, Answer]) -> None:
        kind = self._kind_of(one.ask)
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = _Queue(kind)
        queue.waiting.append(one)
        self._waiting += 1
        self._go_on(queue)

    def _go_on(self, queue: _Queue[Ask, Answer]) -> None:
        """Begin another batch where one may begin; forget a kind that nobody asks for."""
        if queue.waiting and queue.running < self._lanes and not queue.is_collecting:
            queue.running += 1
            queue.is_collecting = True
            task = asyncio.create_task(self._run(queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif not queue.waiting and not queue.running:
            self._queues.pop(queue.kind, None)

    async def _run(self, queue: _Queue[Ask, Answer]) -> None:
        try:
            taken = await self._collect(queue)
            await self._answer([one for one in taken if await self._wanted(one)])
        finally:
            queue.running -= 1
            self._go_on(queue)

    async def _collect(self, queue: _Queue[Ask, Answer]) -> list[_Waiting[Ask, Answer]]:
        if queue.is_crowded and len(queue.waiting) == 1 and self._wait_s:
            await asyncio.sleep(self._wait_s)
        taken = [queue.waiting.popleft() for _ in range(min(self._size, len(queue.waiting)))]
        self._waiting -= len(taken)
        queue.is_crowded, queue.is_collecting = len(taken) > 1, False
        self._go_on(queue)
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
