"""`ramrec recommend`: recommendations for all users, as Parquet files.

Each file holds the users of a fixed range of hash slots, ordered by id, and appears in one step when it is complete. So
an interrupted run continues with the missing files, and the number of workers makes no difference. The answers are
those of `POST /recommend` (the same use case, called without HTTP), all for the same time; they do not count as
accesses. Users who join or write during the run may or may not be included.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from api.http.schemas.fields import refused_time
from api.http.schemas.recommend import RecommendRequest, RecommendResponse
from api.jobs.bulk import LOCAL, BulkError, Report, Runner, split
from api.jobs.workers import PAUSE_S, TIMEOUT_S, TRIES, connected, patiently
from api.memory.port import Memory
from api.memory.replicas import MemoryReplicas
from api.models.lifecycle import LoadedModels
from api.recommend.pipeline import recommend
from memory_service.protocol.answer import Answer
from memory_service.protocol.hash_slots import slot_of
from memory_service.protocol.question import Question
from model.files import replace_file

BATCH = 256
"""Users of one pass through the model."""
PAGE = 5000
FEWEST_FILES, MOST_FILES, USERS_PER_FILE = 16, 2048, 50_000
USERS_PER_PART = 1_000_000
"""A worker keeps the ids of a part's users in memory, about 100 MB for this many."""
ROW_GROUP = 16 * BATCH
CONTENTS_FILE = "recommendations.json"
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


class Contents(msgspec.Struct, frozen=True):
    """What a folder of recommendations holds. timestamp: seconds UTC. exclude_seen None: as the model's data says."""

    model_version: str
    top_n: int
    exclude_seen: bool | None
    timestamp: float
    files: int


@dataclass(frozen=True)
class RecommendedAll:
    """Files and users written by this run, and files that existed `before`."""

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
    runner: Runner = LOCAL,
) -> RecommendedAll:
    """Writes recommendations for all users to the folder `out`, or completes it, and shows progress on the terminal.

    Args:
        run: folder of the serving model.
        url, token: of the memory service.
        exclude_seen: whether items that a user had are left out; None: as the model's data says.
        timestamp: seconds UTC, the time that all are answered for; None: now, or that of the folder to be completed.

    Raises:
        CheckpointError: `run` holds no usable model.
        BulkError: `out` holds other recommendations, another model serves, the service cannot be reached or cannot use
            all memories, or the timestamp is invalid.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    now = time.time()
    if timestamp is not None and (refusal := refused_time(timestamp, now)):
        raise BulkError(refusal[1])
    serving, users = asyncio.run(_serving(run, url, token))
    wanted = Contents(serving, top_n, exclude_seen, now if timestamp is None else timestamp, _files_for(users))
    contents = _agreed(out, wanted, at_any_time=timestamp is None)
    job = RecommendJob(run.absolute(), url, out.absolute(), contents, token)
    before = sum(job.path(slots).exists() for slots in job.files())
    columns = (TextColumn("recommend"), BarColumn(), MofNCompleteColumn(), TextColumn("users"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("recommend", total=users or None)
        parts = _parts(job, runner, users)
        counts = list(runner.run(job, parts, lambda looked_at, done: progress.advance(task, done)))
    return RecommendedAll(contents.files - before, sum(counts), before)


async def _serving(run: Path, url: str, token: str | None) -> tuple[str, int]:
    """Version of the serving model, which must be that of the folder, and about how many users there are."""
    async with connected(run, MemoryReplicas(url, TIMEOUT_S, token)) as engine:
        state = await patiently(engine.memory.model)
        if state.serving != engine.version:
            raise BulkError(f"the service serves model {state.serving}, this folder holds {engine.version}")
        return state.serving, state.users


def _files_for(users: int) -> int:
    """A power of two, so that all files hold the same number of hash slots."""
    files = FEWEST_FILES
    while files < MOST_FILES and files * USERS_PER_FILE < users:
        files *= 2
    return files


def _agreed(out: Path, wanted: Contents, *, at_any_time: bool) -> Contents:
    """Contents of the folder, which are noted in it at the first run; `at_any_time`: whatever their time is.

    Raises BulkError if the folder holds something else or cannot be written.
    """
    note = out / CONTENTS_FILE
    try:
        if note.exists():
            found = msgspec.json.decode(note.read_bytes(), type=Contents)
            timestamp = wanted.timestamp if at_any_time else found.timestamp
            if msgspec.structs.replace(found, files=wanted.files, timestamp=timestamp) != wanted:
                raise BulkError(f"{out} holds other recommendations ({found}); choose another --out")
            return found
        out.mkdir(parents=True, exist_ok=True)
        replace_file(note, msgspec.json.encode(wanted))
    except (OSError, msgspec.DecodeError) as error:
        raise BulkError(f"{note}: {error}") from error
    return wanted


def _parts(job: RecommendJob, runner: Runner, users: int) -> list[range]:
    """Splits the work into parts of whole files: enough for all workers, none with too many users."""
    wanted = max(4 * runner.workers if runner.workers > 1 else 1, -(-users // USERS_PER_PART))
    files = job.files()
    return [range(files[part[0]].start, files[part[-1]].stop) for part in split(wanted, range(len(files)))]


@dataclass(frozen=True)
class RecommendJob:
    """Writes the missing files of some hash slots (a `BulkJob`). Returns how many users were written.

    The folders are the same for every worker.
    """

    run: Path
    url: str
    out: Path
    contents: Contents
    token: str | None = field(default=None, repr=False)

    def files(self) -> list[range]:
        """The hash slots of each file."""
        return split(self.contents.files)

    def path(self, slots: range) -> Path:
        """Path of the file of some hash slots."""
        return self.out / f"slots-{slots.start:05}-{slots.stop - 1:05}.parquet"

    def __call__(self, slots: range, report: Report) -> int:
        """See `recommend_all`."""
        missing = [file for file in self.files() if file.start in slots and not self.path(file).exists()]
        return asyncio.run(self._write_all(missing, report)) if missing else 0

    async def _write_all(self, missing: Sequence[range], report: Report) -> int:
        async with connected(self.run, _Uncounted(self.url, TIMEOUT_S, self.token)) as engine:
            models = LoadedModels(engine, self.run)
            await patiently(models.sync)
            names = await _users(engine.memory, range(missing[0].start, missing[-1].stop))
            written = 0
            for slots in missing:
                users = sorted(name for slot in slots for name in names[slot])
                await self._write(models, slots, users, report)
                written += len(users)
            return written

    async def _write(self, models: LoadedModels, slots: range, users: Sequence[str], report: Report) -> None:
        """Writes one file; it gets its name when it is complete and on disk."""
        file = self.path(slots)
        partial_file = file.with_suffix(".partial")
        with partial_file.open("wb") as out:
            with parquet.ParquetWriter(out, SCHEMA, compression="zstd") as writer:
                rows: list[dict[str, Any]] = []
                async for answers in self._answers(models, users):
                    rows += map(_row, answers)
                    report(len(answers), len(answers))
                    if len(rows) >= ROW_GROUP:
                        writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                        rows = []
                if rows:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
            out.flush()
            os.fsync(out.fileno())
        partial_file.replace(file)

    async def _answers(self, models: LoadedModels, users: Sequence[str]) -> AsyncIterator[list[RecommendResponse]]:
        """Answers for batches of users, in their order; while one is used the next one is computed."""
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

    async def _batch(self, models: LoadedModels, users: Sequence[str]) -> list[RecommendResponse]:
        """Answers that use all memories. Raises BulkError if the service cannot give them after some tries."""
        requests = [self._request(user) for user in users]
        for _ in range(TRIES):
            answers = await recommend(models, requests)
            if not any(answer["memory"]["degraded"] for answer in answers):
                return answers
            await asyncio.sleep(PAUSE_S)
        raise BulkError("the service answers without all of its memories (Redis away, or models change); try later")

    def _request(self, user: str) -> RecommendRequest:
        wanted = self.contents
        return RecommendRequest(
            user_id=user, top_n=wanted.top_n, exclude_seen=wanted.exclude_seen, timestamp=wanted.timestamp
        )


class _Uncounted(MemoryReplicas):
    """A memory service whose retrievals do not count as accesses."""

    async def retrieve(self, question: Question) -> Answer:
        return await super().retrieve(replace(question, uncounted=np.ones(len(question.users), bool)))


async def _users(memory: Memory, slots: range) -> dict[int, set[str]]:
    """Ids of the users of some hash slots, by slot."""
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
