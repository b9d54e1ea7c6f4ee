"""Ending tasks that run until they are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 0.5
"""How long to wait for a cancelled task before it is cancelled again."""


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel tasks and wait until all of them have ended, by a result, an error or the cancellation; None is skipped.
    If the caller is cancelled meanwhile, the cancellation is raised once all tasks have ended.

    One cancellation is not enough: redis-py sends with `asyncio.wait_for`, which up to Python 3.11 loses a cancellation
    that arrives just when the awaited result does, and the task would go on.
    """
    started, is_cancelled = [task for task in tasks if task is not None], False
    while running := [task for task in started if not task.done()]:
        for task in running:
            task.cancel()
        try:
            await asyncio.wait(running, timeout=AGAIN_S)
        except asyncio.CancelledError:
            is_cancelled = True
    for task in started:
        if not task.cancelled():
            task.exception()  # marks it as retrieved, or asyncio would log that it never was
    if is_cancelled:
        raise asyncio.CancelledError
