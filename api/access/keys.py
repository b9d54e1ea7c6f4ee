"""API keys in a JSON file: made, listed, revoked, and read again when it changes.

    {"keys": [{"name": "web", "sha256": "…", "scopes": ["recommend"], "created": "2026-11-25", "per_second": 100}]}

A key is 256 random bits, so its plain SHA-256 is all that is kept: there is nothing to guess that a salt or a slow
hash would protect. The key itself is shown once, when it is made.
"""

from __future__ import annotations

import fcntl
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from model.errors import RamrecError
from model.files import replace_file

Scope = Literal["recommend", "ingest", "admin"]
LOOK_S = 1.0
"""How often the file is looked at: a revoked key works at most this much longer."""
log = logging.getLogger(__name__)

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class KeyFileError(RamrecError):
    """The file of API keys cannot be used; says why."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key: what it may do, and how many requests a second (None: any number)."""

    name: Name
    sha256: Digest
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)]
    created: str
    per_second: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None


class KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    """What the file holds."""

    keys: list[Key]


def read_keys(file: Path) -> list[Key]:
    """The keys in a file. Raises KeyFileError."""
    try:
        keys = msgspec.json.decode(file.read_bytes(), type=KeyFile).keys
    except OSError as error:
        raise KeyFileError(f"cannot read the API keys in {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{file} holds no API keys as `ramrec keys create` writes them: {error}") from error
    for what in ("name", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise KeyFileError(f"{file} holds two keys of the same {what}")
    return keys


def create_key(file: Path, name: str, scopes: Sequence[str], per_second: int | None) -> str:
    """Add a key to a file, which is made where there is none. Returns the key: it cannot be had again.

    Raises:
        KeyFileError: the name is taken or not of letters, digits and `._-`; there is no such scope; the file cannot
            be read or written.
    """
    secret = f"ramrec_{secrets.token_urlsafe(32)}"
    made = {
        "name": name,
        "sha256": sha256(secret.encode()).hexdigest(),
        "scopes": sorted(set(scopes)),
        "created": datetime.now(UTC).date().isoformat(),
        "per_second": per_second,
    }
    try:
        key = msgspec.convert(made, Key)
    except msgspec.ValidationError as error:
        raise KeyFileError(f"no such key can be made: {error}") from error
    with _alone(file):
        keys = read_keys(file) if file.exists() else []
        if any(other.name == name for other in keys):
            raise KeyFileError(f"there is a key {name!r} already in {file}")
        _write(file, [*keys, key])
    return secret


def revoke_key(file: Path, name: str) -> None:
    """Remove a key from a file. Raises KeyFileError where there is no such key."""
    with _alone(file):
        keys = read_keys(file)
        rest = [key for key in keys if key.name != name]
        if len(rest) == len(keys):
            raise KeyFileError(f"there is no key {name!r} in {file}")
        _write(file, rest)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Other writers of files in this folder wait, so that no key is lost between reading and writing."""
    try:
        folder = os.open(file.absolute().parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"cannot write API keys to {file}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(file: Path, keys: list[Key]) -> None:
    """Replace the file: readable by its owner alone, although it holds only hashes."""
    try:
        replace_file(file, msgspec.json.format(msgspec.json.encode(KeyFile(keys)), indent=1) + b"\n", 0o600)
    except OSError as error:
        raise KeyFileError(f"cannot write API keys to {file}: {error.strerror}") from error


class KeyRing:
    """The keys of a file as of now. A file that breaks or goes away leaves the keys as they were, and is logged.

    Raises:
        KeyFileError: the file cannot be used at the start.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._seen, self._next_look = self._signature(), clock() + LOOK_S
        self._take(read_keys(file))

    def find(self, presented: bytes) -> Key | None:
        """The key that a caller brought; None where there is no such key."""
        if self._clock() >= self._next_look:
            self._look()
        digest = sha256(presented).digest()
        # The look-up may be timed, but it tells of digests, which nobody can steer; the comparison takes constant time.
        expected, key = self._keys.get(digest, (b"", None))
        return key if hmac.compare_digest(digest, expected) else None

    def _take(self, keys: list[Key]) -> None:
        self._keys: dict[bytes, tuple[bytes, Key | None]] = {}
        for key in keys:
            digest = bytes.fromhex(key.sha256)
            self._keys[digest] = (digest, key)

    def _look(self) -> None:
        self._next_look = self._clock() + LOOK_S
        seen = self._signature()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            keys = read_keys(self._file)
        except KeyFileError as error:
            log.error("API keys stay as they were: %s", error)
            return
        self._take(keys)
        log.info("API keys read again", extra={"fields": {"keys": len(keys)}})

    def _signature(self) -> tuple[int, ...]:
        """What changes when the file does; empty where there is none."""
        try:
            now = self._file.stat()
        except OSError:
            return ()
        return now.st_mtime_ns, now.st_size, now.st_ino
