"""Micro-batching: requests that arrive together are answered by one retrieval and one forward pass."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from api.http.problems import CallerGone, DeadlineExceeded, Overloaded
from memory_service.protocol.call.context import CALL, Call, together

PATIENCE_S = 0.05
"""Default wait after which a caller's connection is checked; callers rarely leave sooner."""

Request = TypeVar("Request")
Response = TypeVar("Response")
HasLeft = Callable[[], Awaitable[bool]]
"""Whether a caller has closed its connection."""


@dataclass(slots=True)
class _Waiting(Generic[Request, Response]):
    request: Request
    has_left: HasLeft | None
    response: asyncio.Future[Response]
    call: Call | None = field(default_factory=CALL.get)
    since: float = field(default_factory=time.perf_counter)


@dataclass(slots=True)
class _Queue(Generic[Request, Response]):
    """Requests of one kind.

    waiting: oldest first. running: batches under way. is_collecting: one of them is still waiting for more requests.
    is_crowded: the last batch held several requests.
    """

    kind: Hashable
    waiting: deque[_Waiting[Request, Response]] = field(default_factory=deque)
    running: int = 0
    is_collecting: bool = False
    is_crowded: bool = False


class MicroBatcher(Generic[Request, Response]):
    """Calls `work` with batches of up to `size` requests of one kind (`kind_of`: the memory replica to ask). Up to
    `lanes` batches of a kind are under way at once, so that one is computed while memory is asked for another. A batch
    waits up to `wait_s` for more requests, but only if the batch before it held several: a lone caller does not wait.

    A request whose deadline has passed is refused: right then if its caller set the deadline, otherwise when its batch
    begins or ends. A batch has the latest deadline of its requests. No work is done for a caller that has left: its
    task was cancelled, or its connection was closed, which is checked once it has waited for `patience_s`. An error of
    `work` is raised to every caller of the batch. `observe_wait` is called with the time that each request waited, in
    seconds. At most `limit` requests wait.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Request]], Coroutine[Any, Any, Sequence[Response]]],
        size: int,
        wait_s: float,
        limit: int,
        observe_wait: Callable[[float], None],
        patience_s: float = PATIENCE_S,
        lanes: int = 1,
        kind_of: Callable[[Request], Hashable] = lambda request: None,
    ) -> None:
        self._work, self._size, self._wait_s, self._limit, self._observe = work, size, wait_s, limit, observe_wait
        self._patience_s, self._lanes, self._kind_of = patience_s, lanes, kind_of
        self._queues: dict[Hashable, _Queue[Request, Response]] = {}
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Wait until all accepted requests are answered."""
        while running := [task for task in self._tasks if not task.done()]:
            await asyncio.gather(*running, return_exceptions=True)

    async def submit(self, requests: Sequence[Request], has_left: HasLeft | None = None) -> list[Response]:
        """The responses to one caller's requests.

        Raises:
            Overloaded: there is no room for all of them; none was accepted.
            CallerGone: the caller left while they waited.
            DeadlineExceeded: the caller's deadline passed.
        """
        if self._waiting + len(requests) > self._limit:
            raise Overloaded(f"{self._waiting} of at most {self._limit} requests are waiting")
        loop = asyncio.get_running_loop()
        waiting = [_Waiting[Request, Response](request, has_left, loop.create_future()) for request in requests]
        for waiter in waiting:
            self._enqueue(waiter)
        call = CALL.get()
        if call is not None and call.timed:
            alarm = loop.call_later(max(0.0, call.left_s), _expire, waiting)
            try:
                return await asyncio.gather(*(waiter.response for waiter in waiting))
            finally:
                alarm.cancel()
        if len(waiting) == 1:
            return [await waiting[0].response]
        return await asyncio.gather(*(waiter.response for waiter in waiting))

    def _enqueue(self, waiter: _Waiting[Request, Response]) -> None:
        kind = self._kind_of(waiter.request)
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = _Queue(kind)
        queue.waiting.append(waiter)
        self._waiting += 1
        self._start_batch(queue)

    def _start_batch(self, queue: _Queue[Request, Response]) -> None:
        """Start another batch if a lane is free; drop the queue if it is unused."""
        if queue.waiting and queue.running < self._lanes and not queue.is_collecting:
            queue.running += 1
            queue.is_collecting = True
            task = asyncio.create_task(self._run(queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif not queue.waiting and not queue.running:
            self._queues.pop(queue.kind, None)

    async def _run(self, queue: _Queue[Request, Response]) -> None:
        try:
            taken = await self._collect(queue)
            await self._answer([waiter for waiter in taken if await self._is_wanted(waiter)])
        finally:
            queue.running -= 1
            self._start_batch(queue)

    async def _collect(self, queue: _Queue[Request, Response]) -> list[_Waiting[Request, Response]]:
        if queue.is_crowded and len(queue.waiting) == 1 and self._wait_s:
            await asyncio.sleep(self._wait_s)
        taken = [queue.waiting.popleft() for _ in range(min(self._size, len(queue.waiting)))]
        self._waiting -= len(taken)
        queue.is_crowded, queue.is_collecting = len(taken) > 1, False
        self._start_batch(queue)
        return taken

    async def _is_wanted(self, waiter: _Waiting[Request, Response]) -> bool:
        """Whether the caller still waits for the response."""
        waited_s = time.perf_counter() - waiter.since
        self._observe(waited_s)
        if waiter.call is not None and waiter.call.left_s <= 0:
            _expire([waiter])
        if waiter.has_left and waited_s >= self._patience_s and not waiter.response.done():
            has_left = await waiter.has_left()
            if has_left and not waiter.response.done():
                waiter.response.set_exception(CallerGone(f"the caller left within {waited_s:.3f} s"))
        return not waiter.response.done()

    async def _answer(self, wanted: list[_Waiting[Request, Response]]) -> None:
        if not wanted:
            return
        CALL.set(together([waiter.call for waiter in wanted]))
        try:
            responses = await self._work([waiter.request for waiter in wanted])
        except Exception as error:
            for waiter in wanted:
                if not waiter.response.done():
                    waiter.response.set_exception(error)
        else:
            _expire([waiter for waiter in wanted if waiter.call is not None and waiter.call.left_s <= 0])
            for waiter, response in zip(wanted, responses, strict=True):
                if not waiter.response.done():  # its caller may have left meanwhile
                    waiter.response.set_result(response)


def _expire(waiting: Sequence[_Waiting[Any, Any]]) -> None:
    """Refuse requests whose deadline has passed."""
    for waiter in waiting:
        if not waiter.response.done():
            waited_s = time.perf_counter() - waiter.since
            error = DeadlineExceeded(f"no answer within the {waited_s:.3f} s that the caller waits")
            waiter.response.set_exception(error)
