"""Sending a log of interactions to a running service: in bounded memory, each user's events in order, and so that it
can be stopped and started again at any moment without losing or doubling an event.

A file is checked from end to end before anything is sent. Then its portions follow one another; of each a few
requests are under way at once, never two with the same user. What is acknowledged is written to a journal before the
next request leaves. What was under way at a kill is sent again and recognised, by event id or timestamp.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich import progress as bars
from rich.console import Console

from api.jobs.bulk import HERE, Report, Runner, divided
from api.jobs.journal import Journal, JournalFile, Tally, joined, journal_file, journal_path, state_folder
from api.jobs.parcels import LAYOUT, Parcel, named, parcels
from memory_service.protocol.slots import ALL_SLOTS, slot_of
from model.config import DatasetConfig
from model.data.interactions import DatasetError, log_file
from model.data.streaming import PORTION, LogLine, portions
from model.errors import RamrecError

UNDER_WAY = 3
TIMEOUT_S = 60.0
PATIENCE_S = 300.0
"""How long one request is tried while the service is overloaded or away."""
LATER = (429, 502, 503, 504)
"""Statuses that say: not now."""
REASONS = 5
PARTS = 16
"""Parts of the users, where several workers send: always as many, since each part has its journal."""


console = Console(stderr=True, highlight=False)


class BackfillError(RamrecError):
    """The service refused or could not be reached; what was acknowledged before is in the journal."""


@dataclass(frozen=True)
class Outcome:
    """What became of the interactions of a file, and how many were acknowledged `before` this run."""

    tally: Tally
    before: int


class _Rejected(msgspec.Struct):
    index: int
    code: str
    detail: str


class _Answer(msgspec.Struct):
    accepted: int
    duplicates: int
    rejected: list[_Rejected]


def backfill(
    url: str,
    path: Path,
    config: DatasetConfig | None = None,
    *,
    key: str | None = None,
    patience_s: float = PATIENCE_S,
    again: bool = False,
    keep_journal: bool = True,
    where: Runner = HERE,
) -> Outcome:
    """Send all interactions of a file.

    With a journal, what was acknowledged before is not sent `again`. `key`: API key, if the service wants one. Sent by
    several workers (`where`), each part of the users has a journal of its own, in the same folder.

    Raises:
        DatasetError: something is wrong in the file; nothing was sent.
        BackfillError: the service cannot be reached, refuses, or is not able to for longer than `patience_s`.
        JournalError: see `journal_file`.
    """
    file, config, url = log_file(path), config or DatasetConfig(), url.rstrip("/")
    journals = state_folder() if keep_journal else None
    send = Sending(file.absolute(), _digest(file), config, url, journals, again, patience_s, key)
    parts = divided(PARTS) if where.workers > 1 else [ALL_SLOTS]
    if len(parts) > 1 and not all(send.is_begun(slots) for slots in parts):
        send = replace(send, rows=_checked_rows(file, config, parts))
    outcomes = list(where.run(send, parts, lambda looked_at, done: None))
    return Outcome(joined([one.tally for one in outcomes], REASONS), sum(one.before for one in outcomes))


@dataclass(frozen=True)
class Sending:
    """Sends the interactions of a checked file, those of the users of some slots (`api.jobs.bulk.Job`).

    `file` and the folder `journals` are the same for every worker. `rows`: how many interactions there are, by the
    first slot of each part; None: not counted, so the file is not checked yet.
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

    def __call__(self, slots: range, report: Report) -> Outcome:
        """See `backfill`."""
        with self._keeper(slots) as keeper:
            journal = None if self.again else keeper.load()
            if journal is None:
                rows = self.rows or _checked_rows(self.file, self.config, [slots])
                journal = Journal(rows[slots.start])
                keeper.save(journal)
            before = journal.tally.rows
            if not journal.complete:
                headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
                sending = _Backfill(self.url, headers, self.patience_s, journal, keeper)
                asyncio.run(sending.run(self._lines(slots)))
        report(journal.tally.rows - before, journal.tally.accepted)
        return Outcome(journal.tally, before)

    def is_begun(self, slots: range) -> bool:
        """Whether there is a journal to go on from."""
        return not self.again and self.journals is not None and journal_path(self.journals, *self._of(slots)).exists()

    def _keeper(self, slots: range) -> AbstractContextManager[JournalFile]:
        if self.journals is None:
            return nullcontext(JournalFile(None))
        return journal_file(*self._of(slots), folder=self.journals)

    def _of(self, slots: range) -> tuple[str, ...]:
        """What a journal belongs to."""
        part = () if slots == ALL_SLOTS else (f"{slots.start}-{slots.stop}",)
        return (self.digest, self.url, self.config.model_dump_json(), f"{PORTION}/{LAYOUT}", *part)

    def _lines(self, slots: range) -> Iterator[list[LogLine]]:
        """Every portion of the file, without other users' lines."""
        for lines in named(portions(self.file, self.config), self.digest):
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
    """How many interactions there are, by the first slot of each part, once all have been read."""
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


class _Backfill:
    """One run over a file."""

    def __init__(
        self, url: str, headers: dict[str, str], patience_s: float, journal: Journal, keeper: JournalFile
    ) -> None:
        self.url, self.patience_s = f"{url}/memories", patience_s
        self.headers = headers | {"Content-Type": "application/json"}
        self.journal, self.keeper = journal, keeper
        self.under_way: dict[asyncio.Task[_Answer], tuple[int, Parcel]] = {}
        self.reached = False
        self.shown = bars.Progress(
            bars.TextColumn("ingest  "),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[state]}"),
            bars.TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    async def run(self, source: Iterator[list[LogLine]]) -> None:
        """Send what the journal does not have; the next portion is read while one is sent."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=self.headers) as session:
            with self.shown:
                self.bar = self.shown.add_task("ingest", total=self.journal.rows, state="")
                self.begin, self.before = time.monotonic(), self.journal.tally.rows
                self._show()
                try:
                    await self._send_all(session, source)
                finally:
                    await self._abandon()

    async def _send_all(self, session: aiohttp.ClientSession, source: Iterator[list[LogLine]]) -> None:
        ahead = _read(source)
        for number in count():
            portion = await ahead
            if portion is None:
                return
            ahead = _read(source)
            if number == self.journal.portion:
                await self._send(session, parcels(portion))
                self.journal.portion, self.journal.done = number + 1, set()
                self.keeper.save(self.journal)
                self._tell()

    async def _send(self, session: aiohttp.ClientSession, sent: list[Parcel]) -> None:
        """Send a portion. A user's next parcel waits until the one before it is acknowledged."""
        for number, parcel in enumerate(sent):
            if number in self.journal.done:
                continue
            while len(self.under_way) >= UNDER_WAY or self._overlaps(parcel):
                await self._take_answers()
            self.under_way[asyncio.create_task(self._post(session, parcel))] = (number, parcel)
        while self.under_way:
            await self._take_answers()

    def _overlaps(self, parcel: Parcel) -> bool:
        return any(not parcel.users.isdisjoint(other.users) for _, other in self.under_way.values())

    async def _take_answers(self) -> None:
        answered, _ = await asyncio.wait(self.under_way, return_when=asyncio.FIRST_COMPLETED)
        for task in answered:
            answer = task.result()
            number, parcel = self.under_way.pop(task)
            self.journal.done.add(number)
            self._count(parcel, answer)
        self.keeper.save(self.journal)
        self._show()

    def _count(self, parcel: Parcel, answer: _Answer) -> None:
        tally = self.journal.tally
        tally.accepted += answer.accepted
        tally.duplicates += answer.duplicates
        tally.rejected += len(answer.rejected)
        for one in answer.rejected[: REASONS - len(tally.reasons)]:
            line = parcel.lines[one.index]
            tally.reasons.append(f"{one.code}: {one.detail} (user {line.user_id}, item {line.item_id})")

    def _show(self, trouble: str = "") -> None:
        self.shown.update(self.bar, completed=self.journal.tally.rows, state=trouble or self._rate())

    def _tell(self) -> None:
        """A line a portion, where no bar can be shown."""
        if not console.is_terminal:
            console.print(f"ingest {self.journal.tally.rows:,}/{self.journal.rows:,}  {self._rate()}")

    def _rate(self) -> str:
        return f"{(self.journal.tally.rows - self.before) / max(time.monotonic() - self.begin, 1e-3):,.0f}/s"

    async def _post(self, session: aiohttp.ClientSession, parcel: Parcel) -> _Answer:
        """One request; tried again as told while the service is overloaded or away."""
        body = msgspec.json.encode({"interactions": parcel.lines})
        give_up = time.monotonic() + self.patience_s
        while True:
            try:
                async with session.post(self.url, data=body) as response:
                    text = await response.read()
                if response.status == 200:
                    self.reached = True
                    return msgspec.json.decode(text, type=_Answer)
                trouble = f"{response.status}: {_detail(text)}"
                if response.status not in LATER:
                    raise BackfillError(f"{self.url} answered {trouble}")
                pause_s = _pause_s(response.headers.get("Retry-After"))
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble, pause_s = f"no answer ({type(error).__name__}: {error})", 1.0
                if not self.reached:
                    raise BackfillError(f"cannot reach {self.url}: {error or type(error).__name__}") from error
            if time.monotonic() + pause_s > give_up:
                raise BackfillError(f"{self.url} took nothing for {self.patience_s:.0f} s, at last {trouble}")
            self._show(f"waiting, {trouble[:60]}")
            await asyncio.sleep(pause_s)

    async def _abandon(self) -> None:
        """End what is still under way: it is sent again another time."""
        for task in self.under_way:
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)


def _read(source: Iterator[list[LogLine]]) -> asyncio.Future[list[LogLine] | None]:
    """The next portion, read in a thread; None at the end."""
    return asyncio.ensure_future(asyncio.to_thread(next, source, None))


def _pause_s(retry_after: str | None) -> float:
    """Seconds that a service asks to be left alone; a date is not worth understanding."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 1.0


def _detail(text: bytes) -> str:
    """What a problem document says, or the answer as it is."""
    try:
        problem: Any = msgspec.json.decode(text)
        return str(problem["detail"])[:500]
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, KeyError):
        return text.decode(errors="replace")[:500]
