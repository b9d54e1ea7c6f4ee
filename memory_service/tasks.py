"""The end of tasks that would go on for good."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 0.5
"""Until a task that goes on although it was cancelled is cancelled again."""


async def end(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel tasks and wait until all have ended, however they do; None is one that never began. Who cancels this waits
    for them, too.

    One cancellation is not enough: redis-py sends with `asyncio.wait_for`, which up to Python 3.11 loses a cancellation
    that comes just when what it waits for is done, and the task would go on.
    """
    all_of_them, interrupted = [task for task in tasks if task is not None], False
    while left := [task for task in all_of_them if not task.done()]:
        for task in left:
            task.cancel()
        try:
            await asyncio.wait(left, timeout=AGAIN_S)
        except asyncio.CancelledError:
            interrupted = True
    for task in all_of_them:
        if not task.cancelled():
            task.exception()  # nobody else asks, and asyncio would complain of that
    if interrupted:
        raise asyncio.CancelledError
