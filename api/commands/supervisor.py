"""`ramrec serve`: starts, watches and stops an embedded Valkey, memory replicas and api workers as child processes."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from pydantic import ValidationError

from api.workers import bound, socket_of
from memory_service.protocol.call.logs import PROCESS
from memory_service.settings import MemorySettings, url_of, user_data_dir
from memory_service.store.embedded import embedded_valkey, end_processes, ending_with
from model.checkpoint import load_checkpoint
from model.config import describe
from model.errors import RamrecError

READY_TIMEOUT_S = 120.0
GRACE_S = 20.0
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Asks glibc for huge pages, on which banks are searched about 5 % faster. Other C libraries ignore it."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Several services share the cores, so threads inside NumPy or FAISS would only wait for each other."""
POLL_S = 0.1
PAUSE_S, PAUSE_LIMIT_S = 0.5, 30.0
"""Seconds before a process that ended is restarted: doubled each time, up to the limit."""
STEADY_S = 60.0
"""A process that ran this long is restarted after the shortest pause."""
LOOPBACK, LAST_PORT = "127.0.0.1", 65535
REDIS_URL, ADVERTISE = "RAMREC_MEMORY_REDIS_URL", "RAMREC_MEMORY_ADVERTISE"
UNIX = "unix:"
ASK_S = 2.0
NAMES = {"api": "the api", "memory_service": "the memory service", "api.cli": "ramrec serve"}
ONE_OF_MANY = {"api": "api worker {}", "memory_service": "memory replica {}"}

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Calls our own processes without the proxy that the environment may name."""
log = logging.getLogger(__name__)


class ServeError(RamrecError):
    """Serving cannot start, or one of its processes ended; the message says which."""


# -------------------------------------------------------------------------------------------------- serving


def serve(
    run: Path,
    host: str,
    port: int,
    memory_port: int,
    redis_url: str | None,
    memory_url: str | None,
    data_dir: Path | None,
    keys: Path | None = None,
    everybody: bool = False,
    workers: int = 1,
    memory_replicas: int = 1,
    device: str | None = None,
) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit code. `everybody`: listen beyond loopback without API keys.

    The memory service accepts calls only from our api: both get the same token, RAMREC_MEMORY_TOKEN or a new one. The
    token and the URL of Redis are passed in the environment, because other users can read the arguments of a process.

    Raises:
        CheckpointError: there is no usable checkpoint.
        EmbeddedError: the embedded Valkey cannot run.
        ServeError: a port is taken, or the last process of a kind ended by itself.
    """
    load_checkpoint(run, with_weights=False)
    ports = range(memory_port, memory_port + memory_replicas)
    if memory_url is None:
        _check_ports(ports, port)
    elif memory_replicas > 1:
        raise ServeError("--memory-replicas: `ramrec serve` does not start the memory service at --memory-url")
    guard = [*(["--keys", str(keys)] if keys else []), *(["--open"] if everybody else [])]
    try:
        with ExitStack() as stack:
            stack.enter_context(held(host, port))
            _handle_signals()
            kinds: list[list[Child]] = []
            if memory_url is None:
                told = _token() | stack.enter_context(_redis(run, redis_url, data_dir or data_dir_of(run)))
                kinds.append(_replicas(run, ports, told))
                memory_url = ",".join(url_of(LOOPBACK, one) for one in ports)
            else:
                told = {}
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramrec-")))
            words = ["--run", str(run), "--host", host, "--port", str(port), "--memory-url", memory_url, *guard]
            words += ["--device", device] if device else []
            kinds.append(_workers(workers, words, folder, told))
            stack.callback(_stop, kinds)
            _run(kinds, url_of(host, port))
    except KeyboardInterrupt:
        return 0


def _handle_signals() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: shells start background jobs with it ignored
        signal.signal(number, signal.default_int_handler)


def _run(kinds: Sequence[Sequence[Child]], url: str) -> NoReturn:
    """Start all processes and keep them running. The last kind are the api workers, which also receive our SIGHUP."""
    everybody = [child for kind in kinds for child in kind]
    for child in everybody:
        child.start()
    wait_until_ready([child.process for child in everybody], *(child.ready_at for child in everybody))
    signal.signal(signal.SIGHUP, lambda *_: _forward(kinds[-1], signal.SIGHUP))
    print(f"RAMRec serves on {url} (open it in a browser to look into memories; API: /docs, stop: Ctrl-C)", flush=True)
    while True:
        for kind in kinds:
            tend(kind)
        time.sleep(POLL_S)


def _forward(children: Sequence[Child], number: signal.Signals) -> None:
    for child in children:
        child.process.send_signal(number)


# ------------------------------------------------------------------------------------------- ports and Redis


def data_dir_of(run: Path) -> Path:
    """The folder for the memories of a run, inside the user's data folder."""
    path = run.resolve()
    return user_data_dir() / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _check_ports(ports: range, api_port: int) -> None:
    """Check that memory replicas can listen on the memory port and the ports after it. Raises ServeError."""
    if ports[-1] > LAST_PORT:
        raise ServeError(f"{len(ports)} memory replicas need the ports {ports[0]} to {ports[-1]}, beyond {LAST_PORT}")
    if api_port in ports:
        raise ServeError(f"api and memory service cannot both listen on port {api_port}")
    for port in ports:
        _check_port(LOOPBACK, port)


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from error


@contextmanager
def held(host: str, port: int) -> Iterator[None]:
    """Reserve the port for our workers, also while none listens. We do not listen, so no connection comes to us.

    Workers share the port with any process of this user (SO_REUSEPORT), so the port itself does not keep out a second
    `ramrec serve`. A socket in the kernel's abstract namespace does, and it ends with this process. Raises ServeError.
    """
    _check_port(host, port)
    with ExitStack() as stack:
        try:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0ramrec serve {host}:{port}")
            for one in bound(host, port):
                stack.enter_context(one)
        except OSError as error:
            raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        yield


@contextmanager
def _redis(run: Path, redis_url: str | None, data_dir: Path) -> Iterator[dict[str, str]]:
    """Environment that names Redis for memory replicas. Runs an embedded Valkey if the settings name none."""
    named: dict[str, Any] = {} if redis_url is None else {"redis_url": redis_url}
    try:
        settings = MemorySettings(run=run, data_dir=data_dir, **named)
    except ValidationError as error:
        raise ServeError(f"settings of the memory service: {describe(error)}") from error
    if settings.redis_url is not None:
        yield {} if redis_url is None else {REDIS_URL: redis_url}
        return
    with embedded_valkey(settings.data_dir, settings.fsync) as url:
        yield {REDIS_URL: url}


def _token() -> dict[str, str]:
    token = os.environ.get("RAMREC_MEMORY_TOKEN") or secrets.token_urlsafe(32)
    return {"RAMREC_MEMORY_TOKEN": token, "RAMREC_API_MEMORY_TOKEN": token}


# ------------------------------------------------------------------------------------------------- processes


@dataclass
class Child:
    """A child process: its name in messages, its command, variables for its environment (which may hold secrets), and
    the URL that says whether it is ready.

    `again_at` is the time of `time.monotonic` at which it is restarted; None while it runs.
    """

    name: str
    command: Sequence[str]
    told: Mapping[str, str]
    ready_at: str
    process: subprocess.Popen[bytes] = field(init=False)
    again_at: float | None = field(init=False, default=None)
    _pause_s: float = field(init=False, default=PAUSE_S)
    _started_at: float = field(init=False)

    def start(self) -> None:
        """Start it in a session of its own: Ctrl-C reaches only us, and we stop the children in order."""
        self.process = subprocess.Popen(
            self.command,
            start_new_session=True,
            preexec_fn=_prepared(os.getpid()),
            env={**HUGE_PAGES, **ONE_THREAD, **os.environ, **self.told},
        )
        self._started_at, self.again_at = time.monotonic(), None

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def pause(self) -> None:
        """Schedule a restart, after a pause that grows with every failure in a row."""
        now = time.monotonic()
        if now - self._started_at >= STEADY_S:
            self._pause_s = PAUSE_S
        log.error("%s; it is restarted in %g s", _end_of(self.name, self.process), self._pause_s)
        self.again_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, PAUSE_LIMIT_S)


def _replicas(run: Path, ports: Sequence[int], told: Mapping[str, str]) -> list[Child]:
    """A memory replica for each port."""
    found = []
    for number, port in enumerate(ports, 1):
        words = ["--run", str(run), "--host", LOOPBACK, "--port", str(port)]
        url = url_of(LOOPBACK, port)
        found.append(_child("memory_service", number, len(ports), words, {**told, ADVERTISE: url}, url))
    return found


def _workers(count: int, words: Sequence[str], folder: Path, told: Mapping[str, str]) -> list[Child]:
    """Api workers, each with a path of its own in the folder."""
    found = []
    for number in range(1, count + 1):
        place = folder / str(number)
        more = [*words, "--worker", str(place)]
        found.append(_child("api", number, count, more, told, f"{UNIX}{socket_of(place)}"))
    return found


def _child(module: str, number: int, of: int, words: Sequence[str], told: Mapping[str, str], ready_at: str) -> Child:
    name = NAMES[module] if of == 1 else ONE_OF_MANY[module].format(number)
    named = {} if of == 1 else {PROCESS: name}
    return Child(name, [sys.executable, "-m", module, *words], {**told, **named}, ready_at)


def _prepared(parent: int) -> Callable[[], None]:
    """What a child does first: ignore SIGHUP until it has a handler, and end with its parent."""
    end_with_parent = ending_with(parent)

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        end_with_parent()

    return prepare


def tend(kind: Sequence[Child]) -> None:
    """Restart processes that ended while others of their kind run. Raises ServeError if none runs."""
    for child in kind:
        if child.again_at is None:
            if child.has_ended:
                if all(other.has_ended for other in kind):
                    raise ServeError(f"{_end_of(child.name, child.process)}; the rest was stopped")
                child.pause()
        elif time.monotonic() >= child.again_at:
            child.start()


def _end_of(name: str, process: subprocess.Popen[bytes]) -> str:
    return f"{name} ended with exit code {process.returncode}"


def _stop(kinds: Sequence[Sequence[Child]]) -> None:
    """Stop the api first, so that it can finish what it accepted, then the memory service.

    Further signals are ignored: all processes end within two grace periods.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for kind in reversed(kinds):
        end_processes([child.process for child in kind if hasattr(child, "process")], GRACE_S)


def end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask a process to stop; kill it if it has not ended after the grace period."""
    end_processes([child], grace_s)


# ------------------------------------------------------------------------------------------------- readiness


def wait_until_ready(children: Sequence[subprocess.Popen[bytes]], *urls: str) -> None:
    """Wait until the services at these URLs (`http://…` or `unix:PATH`) are ready.

    Raises:
        ServeError: a child ended, or a service is not ready within READY_TIMEOUT_S.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    for url in urls:
        while True:
            _check_alive(children)
            complaint = _complaint(url)
            if complaint is None:
                break
            if time.monotonic() >= deadline:
                raise ServeError(f"not ready within {READY_TIMEOUT_S:.0f} s: {url}/health/ready says {complaint}")
            time.sleep(POLL_S)


def _check_alive(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is not None:
            module = str(child.args[2])  # type: ignore[index]
            raise ServeError(f"{_end_of(NAMES.get(module, module), child)}; the rest was stopped")


def _complaint(url: str) -> str | None:
    """Why a service is not ready, or None if it is."""
    connection = _connection(url)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        return None if answer.status == http.HTTPStatus.OK else answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return "no answer"  # it does not listen yet
    finally:
        connection.close()


def _connection(url: str) -> http.client.HTTPConnection:
    if url.startswith(UNIX):
        return _UnixConnection(url.removeprefix(UNIX))
    parts = urlsplit(url)
    return http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=ASK_S)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ASK_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ASK_S)
        self.sock.connect(self._path)
