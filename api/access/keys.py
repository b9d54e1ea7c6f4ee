"""API keys in a JSON file: created, listed and revoked, and read again when the file changes.

    {"keys": [{"name": "web", "sha256": "…", "scopes": ["recommend"], "created": "2026-11-25", "per_second": 100}]}

A key has 256 random bits. Only its plain SHA-256 is stored: random bits cannot be guessed, so a salt or a slow hash
would protect nothing. The key itself is shown once, when it is created.
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

KeyScope = Literal["recommend", "ingest", "admin"]
LOOK_S = 1.0
"""Interval at which the file is checked: a revoked key works for at most this much longer."""
log = logging.getLogger(__name__)

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class KeyFileError(RamrecError):
    """The file of API keys cannot be used."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An API key: what it allows, and how many requests per second (None: any number)."""

    name: Name
    sha256: Digest
    scopes: Annotated[tuple[KeyScope, ...], msgspec.Meta(min_length=1)]
    created: str
    per_second: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None


class KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    """The content of the file."""

    keys: list[Key]


def read_keys(file: Path) -> list[Key]:
    """The keys in a file. Raises KeyFileError if it cannot be read or is not a key file."""
    try:
        keys = msgspec.json.decode(file.read_bytes(), type=KeyFile).keys
    except OSError as error:
        raise KeyFileError(f"cannot read the API keys in {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{file} is not a file of API keys as `ramrec keys create` writes it: {error}") from error
    for what in ("name", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise KeyFileError(f"{file} holds two keys with the same {what}")
    return keys


def create_key(file: Path, name: str, scopes: Sequence[str], per_second: int | None) -> str:
    """Add a key to a file, which is created if it does not exist. Returns the key, which is not stored anywhere.

    Raises:
        KeyFileError: the name is in use or has other characters than letters, digits and `._-`; a scope is unknown; the
            file cannot be read or written.
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
        raise KeyFileError(f"the key is invalid: {error}") from error
    with _locked(file):
        keys = read_keys(file) if file.exists() else []
        if any(other.name == name for other in keys):
            raise KeyFileError(f"{file} already holds a key {name!r}")
        _write(file, [*keys, key])
    return secret


def revoke_key(file: Path, name: str) -> None:
    """Remove a key from a file. Raises KeyFileError if it is not there."""
    with _locked(file):
        keys = read_keys(file)
        rest = [key for key in keys if key.name != name]
        if len(rest) == len(keys):
            raise KeyFileError(f"{file} holds no key {name!r}")
        _write(file, rest)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock the folder of the file, so that no other writer changes it between reading and writing."""
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
    """Replace the file; only its owner can read it, although it holds hashes only."""
    try:
        replace_file(file, msgspec.json.format(msgspec.json.encode(KeyFile(keys)), indent=1) + b"\n", 0o600)
    except OSError as error:
        raise KeyFileError(f"cannot write API keys to {file}: {error.strerror}") from error


class KeyRing:
    """The present keys of a file. If the file breaks or disappears, the keys stay as they were, and that is logged.

    Raises:
        KeyFileError: the file cannot be used at the start.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._seen, self._next_look = self._signature(), clock() + LOOK_S
        self._take(read_keys(file))

    def find(self, presented: bytes) -> Key | None:
        """The key that a caller presents; None if it is unknown."""
        if self._clock() >= self._next_look:
            self._look()
        digest = sha256(presented).digest()
        # The look-up takes a time that depends on the digest, which callers do not control; the comparison does not.
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
        """Changes when the file changes; empty if there is no file."""
        try:
            now = self._file.stat()
        except OSError:
            return ()
        return now.st_mtime_ns, now.st_size, now.st_ino
