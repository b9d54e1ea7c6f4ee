"""Moving all users to the wanted model while the service goes on: `ramrec reembed`.

Walks through all users with bounded memory, encodes anew what is of another model, and asks for the cut-over once a
whole pass finds nobody left. Whoever has moved is skipped, so a broken-off run goes on where it was; users who take
something meanwhile move by themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from api.jobs.bulk import HERE, BulkError, Job, Report, Runner, shares
from api.jobs.workers import PAUSE_S, TIMEOUT_S, Reply, connected, patiently
from api.memory.replicas import MemoryReplicas
from api.models.engine import Engine
from memory_service.protocol.slots import ALL_SLOTS
from memory_service.protocol.structs import ModelReply, ModelRequest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PAGE = 200
"""About as many users are encoded at a time."""
STUCK = 10
"""Passes in a row that find users to move and move none: somebody keeps writing for another model."""


class ReembedError(BulkError):
    """The users cannot all be moved; says why. Those who moved have moved."""


def reembed(run: Path, url: str, token: str | None = None, where: Runner = HERE) -> int:
    """Move everybody to the model in `run`, with progress on the terminal; returns how many were moved. `token`: that
    of the memory service.

    Raises:
        CheckpointError. BulkError: the service cannot be reached. ReembedError: another model is wanted.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    move = Moving(run.absolute(), url, token)
    columns = (TextColumn("reembed"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[moved]:,} moved"))
    state = asyncio.run(move.call(wanted))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("reembed", total=state.users or None, moved=0)
        total = move_all(move, where, lambda looked_at, moved: _show(progress, task, looked_at, moved))
    asyncio.run(move.call(cut_over))
    return total


@dataclass(frozen=True)
class Moving:
    """A pass through the users of some slots (`api.jobs.bulk.Job`); gives how many were to be moved, how many were."""

    run: Path
    url: str
    token: str | None = field(default=None, repr=False)

    def __call__(self, slots: range, report: Report) -> tuple[int, int]:
        """See `one_pass`."""
        return asyncio.run(self.call(partial(_known_pass, report=report, slots=slots)))

    async def call(self, work: Callable[[Engine], Awaitable[Reply]]) -> Reply:
        """Work with the model beside the memory service."""
        async with connected(self.run, MemoryReplicas(self.url, TIMEOUT_S, self.token)) as engine:
            return await work(engine)


async def wanted(engine: Engine) -> ModelReply:
    """Make sure that the engine's model is the wanted one, and know the catalogue. Raises ReembedError."""
    state = await engine.memory.model()
    if state.wanted != engine.version:
        raise ReembedError(
            f"the service wants model {state.wanted}, this folder holds {engine.version}: POST /model/reload first"
        )
    await patiently(engine.sync)
    return state


def move_all(move: Job[tuple[int, int]], where: Runner, report: Report) -> int:
    """Pass through all users until nobody is left to be moved; returns how many were moved.

    Raises:
        BulkError: the service stays away, or another model is wanted by now. ReembedError.
    """
    total = stuck = 0
    while True:
        found, moved = map(sum, zip(*where.run(move, shares(where), report), strict=True))
        total, stuck = total + moved, 0 if moved else stuck + 1
        if not found:
            return total
        if stuck == STUCK:
            raise ReembedError(f"{found} users are written for another model again and again")
        if stuck:
            time.sleep(PAUSE_S)  # another process has yet to hear what is wanted


async def _known_pass(engine: Engine, report: Report, slots: range) -> tuple[int, int]:
    await patiently(engine.sync)
    return await one_pass(engine, report, slots)


async def one_pass(engine: Engine, report: Report, slots: range = ALL_SLOTS) -> tuple[int, int]:
    """Look at all users of some slots once: how many were to be moved, and how many were.

    Raises:
        MemoryUnavailable, ModelGone: the service stays away, or another model is wanted by now.
    """
    cursor = found = total = 0
    while True:
        page = await patiently(partial(engine.memory.stale, engine.version, cursor, PAGE, slots))
        await engine.know(page.catalogue_size)
        moved = await patiently(partial(engine.rekey, page.users)) if page.users else 0
        cursor, found, total = page.cursor, found + len(page.users), total + moved
        report(page.looked_at, moved)
        if cursor == 0:
            return found, total


async def cut_over(engine: Engine) -> ModelReply:
    """Let the model serve. Raises ModelGone where another is wanted by now."""
    return await patiently(partial(engine.memory.change_model, ModelRequest(engine.version, cut_over=True)))


def _show(progress: Progress, task: TaskID, looked_at: int, moved: int) -> None:
    at = progress.tasks[task]
    progress.update(task, advance=looked_at, moved=at.fields["moved"] + moved)
