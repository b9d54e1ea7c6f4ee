"""`ramrec ingest`: sends a log of interactions to a running service.

The job works in bounded memory, keeps each user's events in order, and can be interrupted and started again at any
moment without losing or doubling an event. A file is checked from end to end before anything is sent. Then its portions
follow one another; of each, a few requests are sent at once, never two with the same user. Whatever is acknowledged is
written to a journal before the next request is sent. Requests that were under way at a kill are sent again; the service
recognises their events by id or timestamp.
"""

from __future__ import annotations

import asyncio
import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich import progress as bars

from api.jobs.batches import LAYOUT, with_event_ids
from api.jobs.bulk import LOCAL, Report, Runner, split
from api.jobs.journal import Journal, JournalFile, Tally, joined, journal_file, journal_path, state_folder
from api.jobs.sender import REASONS, Sender, console
from memory_service.protocol.hash_slots import ALL_SLOTS, slot_of
from model.config import DatasetConfig
from model.data.interactions import DatasetError, log_file
from model.data.streaming import PORTION, LogLine, portions

PATIENCE_S = 300.0
"""How long one request is repeated while the service is overloaded or down."""
PARTS = 16
"""Parts of the users for several workers; fixed, since each part has its own journal."""


@dataclass(frozen=True)
class Backfilled:
    """What became of the interactions of a file, and how many were acknowledged `before` this run."""

    tally: Tally
    before: int


def backfill(
    url: str,
    path: Path,
    config: DatasetConfig | None = None,
    *,
    key: str | None = None,
    patience_s: float = PATIENCE_S,
    again: bool = False,
    keep_journal: bool = True,
    runner: Runner = LOCAL,
) -> Backfilled:
    """Sends all interactions of a file.

    Args:
        url: base URL of the REST API.
        path: the log, in any format of `model.data.streaming`.
        key: API key, if the service requires one.
        patience_s: how long one request is repeated while the service is overloaded or down.
        again: whether to send also what was acknowledged before.
        keep_journal: whether to use a journal. With several workers each part of the users has its own.

    Raises:
        DatasetError: the file has an error; nothing was sent.
        BackfillError: the service cannot be reached, refuses a request, or is unavailable for longer than `patience_s`.
        JournalError: see `journal_file`.
    """
    file, config, url = log_file(path), config or DatasetConfig(), url.rstrip("/")
    journals = state_folder() if keep_journal else None
    job = BackfillJob(file.absolute(), _digest(file), config, url, journals, again, patience_s, key)
    parts = split(PARTS) if runner.workers > 1 else [ALL_SLOTS]
    if len(parts) > 1 and not all(job.is_begun(slots) for slots in parts):
        job = replace(job, rows=_checked_rows(file, config, parts))
    outcomes = list(runner.run(job, parts, lambda looked_at, done: None))
    return Backfilled(joined([one.tally for one in outcomes], REASONS), sum(one.before for one in outcomes))


@dataclass(frozen=True)
class BackfillJob:
    """Sends the interactions of the users of some hash slots (a `BulkJob`).

    file, journals: the log and the folder of journals, the same for every worker. rows: how many interactions each
    part has, by its first hash slot; None: not counted, so the file is not checked yet.
    """

    file: Path
    digest: str
    config: DatasetConfig
    url: str
    journals: Path | None
    again: bool
    patience_s: float
    key: str | None = field(default=None, repr=False)
    rows: dict[int, int] | None = None

    def __call__(self, slots: range, report: Report) -> Backfilled:
        """See `backfill`."""
        with self._journal_file(slots) as file:
            journal = None if self.again else file.load()
            if journal is None:
                rows = self.rows or _checked_rows(self.file, self.config, [slots])
                journal = Journal(rows[slots.start])
                file.save(journal)
            before = journal.tally.rows
            if not journal.complete:
                sender = Sender(self.url, self.key, self.patience_s, journal, file)
                asyncio.run(sender.run(self._lines(slots)))
        report(journal.tally.rows - before, journal.tally.accepted)
        return Backfilled(journal.tally, before)

    def is_begun(self, slots: range) -> bool:
        """Whether there is a journal to continue from."""
        return not self.again and self.journals is not None and journal_path(self.journals, *self._of(slots)).exists()

    def _journal_file(self, slots: range) -> AbstractContextManager[JournalFile]:
        if self.journals is None:
            return nullcontext(JournalFile(None))
        return journal_file(*self._of(slots), folder=self.journals)

    def _of(self, slots: range) -> tuple[str, ...]:
        """Identifies the journal of some hash slots."""
        part = () if slots == ALL_SLOTS else (f"{slots.start}-{slots.stop}",)
        return (self.digest, self.url, self.config.model_dump_json(), f"{PORTION}/{LAYOUT}", *part)

    def _lines(self, slots: range) -> Iterator[list[LogLine]]:
        """Every portion of the file, without the lines of users in other hash slots."""
        for lines in with_event_ids(portions(self.file, self.config), self.digest):
            yield lines if slots == ALL_SLOTS else [line for line in lines if slot_of(line.user_id) in slots]


def _digest(file: Path) -> str:
    with bars.open(
        file, "rb", description="reading ", transient=True, console=console, disable=not console.is_terminal
    ) as source:
        digest = hashlib.blake2b(digest_size=16)
        while block := source.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _checked_rows(file: Path, config: DatasetConfig, parts: Sequence[range]) -> dict[int, int]:
    """Reads the whole file. Returns how many interactions each part has, by its first hash slot."""
    first = [part.start for part in parts]
    found = dict.fromkeys(first, 0)
    rows_read = bars.TextColumn("checking {task.completed:,} interactions")
    quiet = not console.is_terminal
    with bars.Progress(bars.SpinnerColumn(), rows_read, transient=True, console=console, disable=quiet) as shown:
        task = shown.add_task("checking", total=None)
        for portion in portions(file, config):
            shown.advance(task, len(portion))
            for line in portion if len(parts) > 1 else ():
                found[first[bisect_right(first, slot_of(line.user_id)) - 1]] += 1
        rows = int(shown.tasks[0].completed)
    if not rows:
        raise DatasetError(f"{file}: no interactions in it")
    return found if len(parts) > 1 else {first[0]: rows}
