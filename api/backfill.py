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
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich import progress as bars
from rich.console import Console

from api.journal import Journal, JournalFile, Tally, journal_file
from api.parcels import LAYOUT, Parcel, parcels
from model.config import DatasetConfig
from model.errors import RamrecError
from model.interactions import DatasetError, log_file
from model.streaming import PORTION, LogLine, portions

UNDER_WAY = 3
TIMEOUT_S = 60.0
PATIENCE_S = 300.0
"""How long one request is tried while the service is overloaded or away."""
LATER = (429, 502, 503, 504)
"""Statuses that say: not now."""
REASONS = 5


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
) -> Outcome:
    """Send all interactions of a file.

    With a journal, what was acknowledged before is not sent `again`. `key`: API key, if the service wants one.

    Raises:
        DatasetError: something is wrong in the file; nothing was sent.
        BackfillError: the service cannot be reached, refuses, or is not able to for longer than `patience_s`.
        JournalError: see `journal_file`.
    """
    file, config, url = log_file(path), config or DatasetConfig(), url.rstrip("/")
    digest = _digest(file)
    identity = (digest, url, config.model_dump_json(), f"{PORTION}/{LAYOUT}")
    with journal_file(*identity) if keep_journal else nullcontext(JournalFile(None)) as keeper:
        journal = None if again else keeper.load()
        if journal is None:
            journal = Journal(_checked_rows(file, config))
            keeper.save(journal)
        before = journal.tally.rows
        if not journal.complete:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            asyncio.run(_Backfill(url, headers, patience_s, digest, journal, keeper).run(portions(file, config)))
        return Outcome(journal.tally, before)


def _digest(file: Path) -> str:
    with bars.open(
        file, "rb", description="reading ", transient=True, console=console, disable=not console.is_terminal
    ) as source:
        digest = hashlib.blake2b(digest_size=16)
        while block := source.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _checked_rows(file: Path, config: DatasetConfig) -> int:
    """How many interactions there are, once all have been read."""
    rows_read = bars.TextColumn("checking {task.completed:,} interactions")
    quiet = not console.is_terminal
    with bars.Progress(bars.SpinnerColumn(), rows_read, transient=True, console=console, disable=quiet) as shown:
        task = shown.add_task("checking", total=None)
        for portion in portions(file, config):
            shown.advance(task, len(portion))
        rows = int(shown.tasks[0].completed)
    if not rows:
        raise DatasetError(f"{file}: no interactions in it")
    return rows


class _Backfill:
    """One run over a file."""

    def __init__(
        self, url: str, headers: dict[str, str], patience_s: float, digest: str, journal: Journal, keeper: JournalFile
    ) -> None:
        self.url, self.patience_s, self.digest = f"{url}/memories", patience_s, digest
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
        row, ahead = 0, _read(source)
        for number in count():
            portion = await ahead
            if portion is None:
                return
            ahead = _read(source)
            if number == self.journal.portion:
                await self._send(session, parcels(portion, self.digest, row))
                self.journal.portion, self.journal.done = number + 1, set()
                self.keeper.save(self.journal)
                self._tell()
            row += len(portion)

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
