"""Recommendations for all users of the store, as Parquet files: `ramrec recommend`.

The slots are divided into files once and for all; a file holds its users in the order of their ids, and appears in one
step when it is complete. So a run that was broken off goes on with the files that are missing, and how many workers
there are changes nothing. The answers are those of `POST /recommend` (the same use case, not over HTTP), all for the
same time; they do not count as uses of memories. Users who come or write meanwhile are in it or not, as in any walk
through a store that goes on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import parquet

from api.http.schemas import RecommendRequest, RecommendResponse, refused_time
from api.jobs.bulk import HERE, BulkError, Report, Runner, divided
from api.jobs.workers import PAUSE_S, TIMEOUT_S, TRIES, connected, patiently
from api.memory.client import MemoryClient, Remembered
from api.memory.replicas import MemoryReplicas
from api.models.lifecycle import Models
from api.recommend.recommend import recommend
from memory_service.protocol.slots import slot_of
from memory_service.protocol.structs import RetrieveRequest
from model.files import replace_file

BATCH = 256
"""Users of one pass through the model."""
PAGE = 5000
FEWEST_FILES, MOST_FILES, USERS_A_FILE = 16, 2048, 50_000
USERS_A_PART = 1_000_000
"""A part of the work keeps the ids of its users in memory: about 100 MB."""
GROUP = 16 * BATCH
"""Rows of a row group."""
ABOUT = "recommendations.json"
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("source", pa.dictionary(pa.int8(), pa.string())),
        ("version", pa.int64()),
        ("model_version", pa.dictionary(pa.int8(), pa.string())),
    ]
)


class About(msgspec.Struct, frozen=True):
    """What a folder of recommendations holds: of which model, of what length, for what time (seconds UTC), in how many
    files. exclude_seen None: as the model's data says.
    """

    model_version: str
    top_n: int
    exclude_seen: bool | None
    timestamp: float
    files: int


@dataclass(frozen=True)
class Written:
    """Files and users written now, and files that were there."""

    files: int
    users: int
    before: int


def recommend_all(
    run: Path,
    url: str,
    out: Path,
    top_n: int = 10,
    *,
    exclude_seen: bool | None = None,
    timestamp: float | None = None,
    token: str | None = None,
    where: Runner = HERE,
) -> Written:
    """Write recommendations for everybody to the folder `out`, with progress on the terminal. A folder that is
    incomplete is completed.

    Args:
        url, token: of the memory service.
        exclude_seen: whether what a user had is left out; None: as the model's data says.
        timestamp: seconds UTC, the time that all are answered for; None: now, or that of the folder to be completed.

    Raises:
        CheckpointError. BulkError: `out` holds others, another model serves, the service cannot be reached or answers
            without all of its memories, or the timestamp is none.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    now = time.time()
    if timestamp is not None and (refusal := refused_time(timestamp, now)):
        raise BulkError(refusal[1])
    serving, users = asyncio.run(_serving(run, url, token))
    wanted = About(serving, top_n, exclude_seen, now if timestamp is None else timestamp, _files_for(users))
    about = _agreed(out, wanted, at_any_time=timestamp is None)
    job = Recommending(run.absolute(), url, out.absolute(), about, token)
    before = sum(job.path(slots).exists() for slots in job.files())
    columns = (TextColumn("recommend"), BarColumn(), MofNCompleteColumn(), TextColumn("users"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("recommend", total=users or None)
        parts = _parts(job, where, users)
        counts = list(where.run(job, parts, lambda looked_at, done: progress.advance(task, done)))
    return Written(about.files - before, sum(counts), before)


async def _serving(run: Path, url: str, token: str | None) -> tuple[str, int]:
    """The model that serves, which must be that of the folder, and about how many users there are."""
    async with connected(run, MemoryReplicas(url, TIMEOUT_S, token)) as engine:
        state = await patiently(engine.memory.model)
        if state.serving != engine.version:
            raise BulkError(f"the service serves model {state.serving}, this folder holds {engine.version}")
        return state.serving, state.users


def _files_for(users: int) -> int:
    """A power of two, so that files hold as many slots each."""
    files = FEWEST_FILES
    while files < MOST_FILES and files * USERS_A_FILE < users:
        files *= 2
    return files


def _agreed(out: Path, about: About, *, at_any_time: bool) -> About:
    """What the folder holds or is to hold from now on. Raises BulkError where that is something else; `at_any_time`:
    for whatever time it is.
    """
    note = out / ABOUT
    try:
        if note.exists():
            found = msgspec.json.decode(note.read_bytes(), type=About)
            timestamp = about.timestamp if at_any_time else found.timestamp
            if msgspec.structs.replace(found, files=about.files, timestamp=timestamp) != about:
                raise BulkError(f"{out} holds other recommendations ({found}); choose another --out")
            return found
        out.mkdir(parents=True, exist_ok=True)
        replace_file(note, msgspec.json.encode(about))
    except (OSError, msgspec.DecodeError) as error:
        raise BulkError(f"{note}: {error}") from error
    return about


def _parts(job: Recommending, where: Runner, users: int) -> list[range]:
    """Parts of the work: whole files together, enough for all workers, none with too many users."""
    wanted = max(4 * where.workers if where.workers > 1 else 1, -(-users // USERS_A_PART))
    files = job.files()
    return [range(files[part[0]].start, files[part[-1]].stop) for part in divided(wanted, range(len(files)))]


@dataclass(frozen=True)
class Recommending:
    """Writes the files of some slots that are not there yet (`api.jobs.bulk.Job`); gives the number of users
    written. The folders are the same for every worker.
    """

    run: Path
    url: str
    out: Path
    about: About
    token: str | None = field(default=None, repr=False)

    def files(self) -> list[range]:
        """The slots of each file."""
        return divided(self.about.files)

    def path(self, slots: range) -> Path:
        """The file of some slots."""
        return self.out / f"slots-{slots.start:05}-{slots.stop - 1:05}.parquet"

    def __call__(self, slots: range, report: Report) -> int:
        """See `recommend_all`."""
        missing = [one for one in self.files() if one.start in slots and not self.path(one).exists()]
        return asyncio.run(self._write_all(missing, report)) if missing else 0

    async def _write_all(self, missing: Sequence[range], report: Report) -> int:
        async with connected(self.run, _Onlooker(self.url, TIMEOUT_S, self.token)) as engine:
            models = Models(engine, self.run)
            await patiently(models.sync)
            names = await _users(engine.memory, range(missing[0].start, missing[-1].stop))
            written = 0
            for slots in missing:
                users = sorted(name for slot in slots for name in names[slot])
                await self._write(models, slots, users, report)
                written += len(users)
            return written

    async def _write(self, models: Models, slots: range, users: Sequence[str], report: Report) -> None:
        """One file; it has its name when it is complete and on disk."""
        file = self.path(slots)
        partial_file = file.with_suffix(".partial")
        with partial_file.open("wb") as out:
            with parquet.ParquetWriter(out, SCHEMA, compression="zstd") as writer:
                rows: list[dict[str, Any]] = []
                async for answers in self._answers(models, users):
                    rows += map(_row, answers)
                    report(len(answers), len(answers))
                    if len(rows) >= GROUP:
                        writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                        rows = []
                if rows:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
            out.flush()
            os.fsync(out.fileno())
        partial_file.replace(file)

    async def _answers(self, models: Models, users: Sequence[str]) -> AsyncIterator[list[RecommendResponse]]:
        """Answers for batches of users, in their order; memories of the next batch are fetched meanwhile."""
        batches = [users[at : at + BATCH] for at in range(0, len(users), BATCH)]
        ahead = [asyncio.create_task(self._batch(models, batch)) for batch in batches[:1]]
        try:
            for n in range(len(batches)):
                ahead += (asyncio.create_task(self._batch(models, batch)) for batch in batches[n + 1 : n + 2])
                yield await ahead.pop(0)
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _batch(self, models: Models, users: Sequence[str]) -> list[RecommendResponse]:
        """Answers with all that memory knows. Raises BulkError where they stay without."""
        asked = [self._request(user) for user in users]
        for _ in range(TRIES):
            answers = await recommend(models, asked)
            if not any(answer["memory"]["degraded"] for answer in answers):
                return answers
            await asyncio.sleep(PAUSE_S)
        raise BulkError("the service answers without all of its memories (Redis away, or models change); try later")

    def _request(self, user: str) -> RecommendRequest:
        about = self.about
        return RecommendRequest(
            user_id=user, top_n=about.top_n, exclude_seen=about.exclude_seen, timestamp=about.timestamp
        )


class _Onlooker(MemoryReplicas):
    """Memories are asked for, and this does not count as a use of them."""

    async def retrieve(self, request: RetrieveRequest) -> Remembered:
        return await super().retrieve(msgspec.structs.replace(request, uncounted=list(range(len(request.users)))))


async def _users(memory: MemoryClient | MemoryReplicas, slots: range) -> dict[int, set[str]]:
    """Ids of the users of some slots, by slot."""
    found: dict[int, set[str]] = {slot: set() for slot in slots}
    cursor = 0
    while True:
        page = await patiently(partial(memory.walk, cursor, PAGE, slots))
        for name in page.users:
            found[slot_of(name)].add(name)
        cursor = page.cursor
        if cursor == 0:
            return found


def _row(answer: RecommendResponse) -> dict[str, Any]:
    return {
        "user_id": answer["user_id"],
        "items": [item["item_id"] for item in answer["items"]],
        "scores": [item["score"] for item in answer["items"]],
        "source": answer["source"],
        "version": answer["memory"]["version"],
        "model_version": answer["model_version"],
    }
