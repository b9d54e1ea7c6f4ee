"""Sends the portions of a log as requests to `POST /memories`, with a journal and a progress bar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import aiohttp
import msgspec
from rich import progress as bars
from rich.console import Console

from api.jobs.batches import LogBatch, batches
from api.jobs.journal import Journal, JournalFile
from model.data.streaming import LogLine
from model.errors import RamrecError

AT_ONCE = 3
"""Requests sent at the same time."""
TIMEOUT_S = 60.0
RETRYABLE = (429, 502, 503, 504)
"""Status codes after which a request is repeated."""
REASONS = 5
"""Rejections that are kept with their reasons."""

console = Console(stderr=True, highlight=False)


class BackfillError(RamrecError):
    """The service refused a request or cannot be reached; what was acknowledged before is in the journal."""


class _Rejected(msgspec.Struct):
    index: int
    code: str
    detail: str


class _Acknowledged(msgspec.Struct):
    accepted: int
    duplicates: int
    rejected: list[_Rejected]


class Sender:
    """Sends one log, continuing where its journal ends."""

    def __init__(self, url: str, key: str | None, patience_s: float, journal: Journal, file: JournalFile) -> None:
        self.url, self.patience_s = f"{url}/memories", patience_s
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.journal, self.file = journal, file
        self.under_way: dict[asyncio.Task[_Acknowledged], tuple[int, LogBatch]] = {}
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
        """Sends what is not in the journal; reads the next portion while one is sent."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=self.headers) as session:
            with self.shown:
                self.bar = self.shown.add_task("ingest", total=self.journal.rows, state="")
                self.begin, self.before = time.monotonic(), self.journal.tally.rows
                self._show()
                try:
                    await self._send_all(session, source)
                finally:
                    await self._cancel()

    async def _send_all(self, session: aiohttp.ClientSession, source: Iterator[list[LogLine]]) -> None:
        ahead = _read(source)
        for number in count():
            portion = await ahead
            if portion is None:
                return
            ahead = _read(source)
            if number == self.journal.portion:
                await self._send(session, batches(portion))
                self.journal.portion, self.journal.done = number + 1, set()
                self.file.save(self.journal)
                self._print()

    async def _send(self, session: aiohttp.ClientSession, portion: list[LogBatch]) -> None:
        """Sends a portion. A batch waits until all earlier ones with the same users are acknowledged."""
        for number, batch in enumerate(portion):
            if number in self.journal.done:
                continue
            while len(self.under_way) >= AT_ONCE or self._overlaps(batch):
                await self._take_answers()
            self.under_way[asyncio.create_task(self._post(session, batch))] = (number, batch)
        while self.under_way:
            await self._take_answers()

    def _overlaps(self, batch: LogBatch) -> bool:
        return any(not batch.users.isdisjoint(other.users) for _, other in self.under_way.values())

    async def _take_answers(self) -> None:
        answered, _ = await asyncio.wait(self.under_way, return_when=asyncio.FIRST_COMPLETED)
        for task in answered:
            answer = task.result()
            number, batch = self.under_way.pop(task)
            self.journal.done.add(number)
            self._count(batch, answer)
        self.file.save(self.journal)
        self._show()

    def _count(self, batch: LogBatch, answer: _Acknowledged) -> None:
        tally = self.journal.tally
        tally.accepted += answer.accepted
        tally.duplicates += answer.duplicates
        tally.rejected += len(answer.rejected)
        for rejected in answer.rejected[: REASONS - len(tally.reasons)]:
            line = batch.lines[rejected.index]
            tally.reasons.append(f"{rejected.code}: {rejected.detail} (user {line.user_id}, item {line.item_id})")

    async def _post(self, session: aiohttp.ClientSession, batch: LogBatch) -> _Acknowledged:
        """Sends one request; repeats it, as `Retry-After` says, while the service is overloaded or down."""
        body = msgspec.json.encode({"interactions": batch.lines})
        give_up = time.monotonic() + self.patience_s
        while True:
            try:
                async with session.post(self.url, data=body) as response:
                    text = await response.read()
                if response.status == 200:
                    self.reached = True
                    return msgspec.json.decode(text, type=_Acknowledged)
                trouble = f"{response.status}: {_detail(text)}"
                if response.status not in RETRYABLE:
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

    async def _cancel(self) -> None:
        """Cancels requests under way; the next run sends them again."""
        for task in self.under_way:
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)

    # ------------------------------------------------------------------------------------------- progress

    def _show(self, trouble: str = "") -> None:
        self.shown.update(self.bar, completed=self.journal.tally.rows, state=trouble or self._rate())

    def _print(self) -> None:
        """Prints a line for each portion if no progress bar can be shown."""
        if not console.is_terminal:
            console.print(f"ingest {self.journal.tally.rows:,}/{self.journal.rows:,}  {self._rate()}")

    def _rate(self) -> str:
        return f"{(self.journal.tally.rows - self.before) / max(time.monotonic() - self.begin, 1e-3):,.0f}/s"


def _read(source: Iterator[list[LogLine]]) -> asyncio.Future[list[LogLine] | None]:
    """The next portion, read in a thread; None at the end."""
    return asyncio.ensure_future(asyncio.to_thread(next, source, None))


def _pause_s(retry_after: str | None) -> float:
    """Seconds to wait according to a `Retry-After` header; 1 if it is a date or missing."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 1.0


def _detail(text: bytes) -> str:
    """The detail of a problem document; the text itself if it is none."""
    try:
        problem: Any = msgspec.json.decode(text)
        return str(problem["detail"])[:500]
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, KeyError):
        return text.decode(errors="replace")[:500]
