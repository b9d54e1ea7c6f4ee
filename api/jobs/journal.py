"""A small file that records which interactions of a log are acknowledged, so that sending can be continued."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from model.errors import RamrecError
from model.files import replace_file


class JournalError(RamrecError):
    """The journal cannot be read or written, or another process uses it."""


class Tally(msgspec.Struct):
    """What became of interactions. `reasons`: the first rejections."""

    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    reasons: list[str] = []

    @property
    def rows(self) -> int:
        """Interactions that were answered."""
        return self.accepted + self.duplicates + self.rejected

    def summary(self) -> str:
        """The counts in one line."""
        return f"accepted {self.accepted:,}, duplicates {self.duplicates:,}, rejected {self.rejected:,}"


def joined(tallies: Sequence[Tally], reasons: int) -> Tally:
    """The sum of tallies, with the first `reasons` rejections."""
    total = Tally()
    for tally in tallies:
        total.accepted += tally.accepted
        total.duplicates += tally.duplicates
        total.rejected += tally.rejected
        total.reasons += tally.reasons[: reasons - len(total.reasons)]
    return total


class Journal(msgspec.Struct):
    """How far a file has been sent.

    rows: interactions in the file, counted when it was checked. portion: number of the current portion; all earlier
    ones are acknowledged. done: acknowledged batches of the current portion.
    """

    rows: int
    portion: int = 0
    done: set[int] = set()
    tally: Tally = msgspec.field(default_factory=Tally)

    @property
    def complete(self) -> bool:
        """Whether everything is acknowledged."""
        return self.tally.rows == self.rows


class JournalFile:
    """The file of a journal; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def load(self) -> Journal | None:
        """Reads the journal; None if there is none. Raises JournalError if it cannot be read."""
        if self.path is None or not self.path.exists():
            return None
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Journal)
        except (OSError, msgspec.DecodeError) as error:
            raise JournalError(f"{self.path} cannot be read ({error}); --again sends everything anew") from error

    def save(self, journal: Journal) -> None:
        """Replaces the journal in one step; it is on disk when this returns."""
        if self.path is not None:
            replace_file(self.path, msgspec.json.encode(journal))


def journal_path(folder: Path, *identity: str) -> Path:
    """Path of the journal that belongs to what `identity` names."""
    return folder / f"{hashlib.blake2b(chr(0).join(identity).encode(), digest_size=16).hexdigest()}.json"


def state_folder() -> Path:
    """The user's folder for journals (XDG_STATE_HOME)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ramrec" / "ingest"


@contextmanager
def journal_file(*identity: str, folder: Path | None = None) -> Iterator[JournalFile]:
    """Opens the journal of what `identity` names for this process alone. `folder` None: the user's folder.

    Raises:
        JournalError: another process uses it, or the folder cannot be written.
    """
    path = journal_path(folder or state_folder(), *identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("wb")
    except OSError as error:
        raise JournalError(f"{path.parent} cannot be written ({error}); set XDG_STATE_HOME") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JournalError("another process is sending this file to this service") from error
        yield JournalFile(path)
