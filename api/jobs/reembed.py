"""`ramrec reembed`: moves all users to the wanted model while the service keeps running.

Passes over all users in bounded memory, encodes again those whose records are of another model, and cuts over once a
whole pass finds none of these. Users who have moved are skipped, so an interrupted run can be started again. A user who
takes an item during a run moves with that write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from api.jobs.bulk import LOCAL, BulkError, BulkJob, Report, Runner, parts_for
from api.jobs.workers import PAUSE_S, TIMEOUT_S, Reply, connected, patiently
from api.memory.replicas import MemoryReplicas
from api.models.engine import Engine
from memory_service.protocol.hash_slots import ALL_SLOTS
from memory_service.protocol.structs import ModelReply, ModelRequest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PAGE = 200
"""About how many users are encoded at a time."""
STUCK_PASSES = 10
"""Passes in a row that find stale users and move none, after which the run gives up."""


class ReembedError(BulkError):
    """Not all users can be moved; those who moved have moved."""


def reembed(run: Path, url: str, token: str | None = None, runner: Runner = LOCAL) -> int:
    """Moves all users to the model in `run` and shows progress on the terminal. Returns how many were moved.

    `url` and `token` are those of the memory service.

    Raises:
        CheckpointError: `run` holds no usable model.
        ReembedError: another model is wanted, or others keep writing for another one.
        BulkError: the memory service cannot be reached.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    job = ReembedPass(run.absolute(), url, token)
    columns = (TextColumn("reembed"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[moved]:,} moved"))
    state = asyncio.run(job.call(check_wanted))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("reembed", total=state.users or None, moved=0)
        total = move_all(job, runner, lambda looked_at, moved: _show(progress, task, looked_at, moved))
    asyncio.run(job.call(cut_over))
    return total


@dataclass(frozen=True)
class ReembedPass:
    """One pass over the users of some hash slots (a `BulkJob`). Returns how many were stale and how many were moved."""

    run: Path
    url: str
    token: str | None = field(default=None, repr=False)

    def __call__(self, slots: range, report: Report) -> tuple[int, int]:
        """See `one_pass`."""
        return asyncio.run(self.call(partial(_synced_pass, report=report, slots=slots)))

    async def call(self, work: Callable[[Engine], Awaitable[Reply]]) -> Reply:
        """Does some work with the model and the memory service."""
        async with connected(self.run, MemoryReplicas(self.url, TIMEOUT_S, self.token)) as engine:
            return await work(engine)


async def check_wanted(engine: Engine) -> ModelReply:
    """Checks that the engine's model is the wanted one, and fetches the catalogue. Raises ReembedError."""
    state = await engine.memory.model()
    if state.wanted != engine.version:
        raise ReembedError(
            f"the service wants model {state.wanted}, this folder holds {engine.version}: POST /model/reload first"
        )
    await patiently(engine.sync)
    return state


def move_all(job: BulkJob[tuple[int, int]], runner: Runner, report: Report) -> int:
    """Passes over all users until none is stale. Returns how many were moved.

    Raises:
        BulkError: the service stays out of reach, or another model is wanted by now.
        ReembedError: others keep writing for another model.
    """
    total = stuck = 0
    while True:
        found, moved = map(sum, zip(*runner.run(job, parts_for(runner), report), strict=True))
        total, stuck = total + moved, 0 if moved else stuck + 1
        if not found:
            return total
        if stuck == STUCK_PASSES:
            raise ReembedError(f"{found} users keep being written for another model")
        if stuck:
            time.sleep(PAUSE_S)  # until every process knows which model is wanted


async def _synced_pass(engine: Engine, report: Report, slots: range) -> tuple[int, int]:
    await patiently(engine.sync)
    return await one_pass(engine, report, slots)


async def one_pass(engine: Engine, report: Report, slots: range = ALL_SLOTS) -> tuple[int, int]:
    """Looks at every user of some hash slots once. Returns how many were stale and how many were moved.

    Raises:
        MemoryUnavailable: the service stays out of reach.
        ModelGone: another model is wanted by now.
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
    """Lets the model serve. Raises ModelGone if another one is wanted by now."""
    return await patiently(partial(engine.memory.change_model, ModelRequest(engine.version, cut_over=True)))


def _show(progress: Progress, task: TaskID, looked_at: int, moved: int) -> None:
    shown = progress.tasks[task]
    progress.update(task, advance=looked_at, moved=shown.fields["moved"] + moved)
