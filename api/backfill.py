"""Sending a whole log of interactions to a running service, in order, with progress."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np

from model.dataset import Interactions
from model.errors import RamrecError

BATCH = 1000
USER_BLOCK = 20
"""Events of one user in a request: many users a request let the service write them side by side."""
TIMEOUT_S = 60.0
TRIES = 5


class BackfillError(RamrecError):
    """The service refused or could not be reached; says after how many interactions."""


def events_of(log: Interactions) -> list[dict[str, Any]]:
    """Interactions as the bodies `POST /memories` takes, each user's in order of time.

    Users take turns, a block of events each, so that a request holds many users.
    """
    time = log.time if log.time is not None else np.arange(len(log), dtype=np.float64)
    order = np.lexsort((np.arange(len(log)), time, log.user))
    first = np.searchsorted(log.user[order], np.arange(len(log.user_ids)))
    turn = (np.arange(len(log)) - first[log.user[order]]) // USER_BLOCK
    return [_event(log, n) for n in order[np.argsort(turn, kind="stable")]]


def _event(log: Interactions, n: int) -> dict[str, Any]:
    event: dict[str, Any] = {"user_id": log.user_ids[log.user[n]], "item_id": log.item_ids[log.item[n]]}
    if log.time is not None:
        event["timestamp"] = float(log.time[n])
    if log.rating is not None and not np.isnan(log.rating[n]):
        event["rating"] = float(log.rating[n])
    return event


def backfill(url: str, events: list[dict[str, Any]]) -> dict[str, int]:
    """Post all events; returns how many were accepted, duplicates and rejected.

    Raises:
        BackfillError: the service cannot be reached, refuses a batch, or stays overloaded.
    """
    return asyncio.run(_backfill(url, events))


async def _backfill(url: str, events: list[dict[str, Any]]) -> dict[str, int]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    counts = {"accepted": 0, "duplicates": 0, "rejected": 0}
    columns = (TextColumn("ingest  "), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        with Progress(*columns) as progress:
            task = progress.add_task("ingest", total=len(events))
            for batch in _batches(events):
                answer = await _post(session, f"{url.rstrip('/')}/memories", batch)
                counts["accepted"] += answer["accepted"]
                counts["duplicates"] += answer["duplicates"]
                counts["rejected"] += len(answer["rejected"])
                progress.advance(task, len(batch))
    return counts


def _batches(events: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for at in range(0, len(events), BATCH):
        yield events[at : at + BATCH]


async def _post(session: aiohttp.ClientSession, url: str, batch: list[dict[str, Any]]) -> Any:
    """One batch; waits as told while the service is overloaded. Timed events may be sent again harmlessly."""
    for _ in range(TRIES):
        try:
            async with session.post(url, json={"interactions": batch}) as response:
                if response.status == 200:
                    return await response.json()
                if response.status not in (429, 503):
                    raise BackfillError(f"{url} answered {response.status}: {(await response.text())[:500]}")
                pause_s = float(response.headers.get("Retry-After", "1"))
        except aiohttp.ClientError as error:
            raise BackfillError(f"cannot reach {url}: {error}") from error
        await asyncio.sleep(pause_s)
    raise BackfillError(f"{url} stayed overloaded through {TRIES} tries")
