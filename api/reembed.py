"""Moving all users to the wanted model while the service goes on: `ramrec reembed`.

Walks through all users with bounded memory, encodes anew what is of another model, and asks for the cut-over once a
whole pass finds nobody left. Whoever has moved is skipped, so a broken-off run goes on where it was; users who take
something meanwhile move by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from api.engine import Engine
from api.memory_group import MemoryGroup
from api.metrics import Metrics
from api.problems import ApiProblem, MemoryUnavailable, ModelGone
from memory_service.schemas import ModelReply, ModelRequest
from model.errors import RamrecError
from model.recommender import Recommender

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PAGE = 200
"""About as many users are encoded at a time."""
STUCK = 10
"""Passes in a row that find users to move and move none: somebody keeps writing for another model."""
TIMEOUT_S = 60.0
TRIES, PAUSE_S = 10, 1.0
Reply = TypeVar("Reply")
Report = Callable[[int, int], None]
"""Is told of users looked at and users moved."""


class ReembedError(RamrecError):
    """The users cannot all be moved; says why. Those who moved have moved."""


def reembed(run: Path, url: str, token: str | None = None) -> int:
    """Move everybody to the model in `run`, with progress on the terminal; returns how many were moved. `token`: that
    of the memory service.

    Raises:
        CheckpointError. ReembedError: another model is wanted, or the service cannot be reached.
    """
    return asyncio.run(_reembed(Recommender.load(run), url, token))


async def _reembed(recommender: Recommender, url: str, token: str | None) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    engine = Engine(recommender, MemoryGroup(url, TIMEOUT_S, token), Metrics())
    columns = (TextColumn("reembed"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[moved]:,} moved"))
    try:
        state = await wanted(engine)
        with Progress(*columns, TimeElapsedColumn()) as progress:
            task = progress.add_task("reembed", total=state.users or None, moved=0)
            total = await move_all(engine, lambda looked_at, moved: _show(progress, task, looked_at, moved))
        await cut_over(engine)
        return total
    except ApiProblem as problem:
        raise ReembedError(problem.detail) from problem
    finally:
        await engine.close()


async def wanted(engine: Engine) -> ModelReply:
    """Make sure that the engine's model is the wanted one, and know the catalogue. Raises ReembedError."""
    state = await engine.memory.model()
    if state.wanted != engine.version:
        raise ReembedError(
            f"the service wants model {state.wanted}, this folder holds {engine.version}: POST /model/reload first"
        )
    await _patiently(engine.sync)
    return state


async def move_all(engine: Engine, report: Report) -> int:
    """Pass through all users until nobody is left to be moved; returns how many were moved.

    Raises:
        MemoryUnavailable, ModelGone: the service stays away, or another model is wanted by now. ReembedError.
    """
    total = stuck = 0
    while True:
        found, moved = await one_pass(engine, report)
        total, stuck = total + moved, 0 if moved else stuck + 1
        if not found:
            return total
        if stuck == STUCK:
            raise ReembedError(f"{found} users are written for another model again and again")
        if stuck:
            await asyncio.sleep(PAUSE_S)  # another process has yet to hear what is wanted


async def one_pass(engine: Engine, report: Report) -> tuple[int, int]:
    """Look at all users once: how many were to be moved, and how many were.

    Raises:
        MemoryUnavailable, ModelGone: the service stays away, or another model is wanted by now.
    """
    cursor = found = total = 0
    while True:
        page = await _patiently(partial(engine.memory.stale, engine.version, cursor, PAGE))
        await engine.know(page.catalogue_size)
        moved = await _patiently(partial(engine.rekey, page.users)) if page.users else 0
        cursor, found, total = page.cursor, found + len(page.users), total + moved
        report(page.looked_at, moved)
        if cursor == 0:
            return found, total


async def cut_over(engine: Engine) -> ModelReply:
    """Let the model serve. Raises ModelGone where another is wanted by now."""
    return await _patiently(partial(engine.memory.change_model, ModelRequest(engine.version, cut_over=True)))


def _show(progress: Progress, task: TaskID, looked_at: int, moved: int) -> None:
    at = progress.tasks[task]
    progress.update(task, advance=looked_at, moved=at.fields["moved"] + moved)


async def _patiently(call: Callable[[], Awaitable[Reply]]) -> Reply:
    """Wait where the service is busy or restarts: everything asked here may be asked again."""
    for left in reversed(range(TRIES)):
        try:
            return await call()
        except ModelGone:
            raise
        except MemoryUnavailable:
            if not left:
                raise
            await asyncio.sleep(PAUSE_S)
    raise AssertionError
