"""`ramrec serve`: api and memory service as two child processes, started, watched and stopped together."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from memory_service.settings import user_data_dir
from model.checkpoint import load_checkpoint
from model.errors import RamrecError

READY_TIMEOUT_S = 120.0
GRACE_S = 20.0
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Banks on huge pages are searched a good twentieth faster; unknown to other C libraries, and harmless there."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Two services on a few cores: threads that wait for each other inside NumPy or FAISS would only get in the way."""
POLL_S = 0.1
PR_SET_PDEATHSIG = 1
NAMES = {"api": "the api", "memory_service": "the memory service", "api.cli": "ramrec serve"}

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Our own processes are never asked through a proxy that the environment names."""


class ServeError(RamrecError):
    """Serving cannot start, or one of its processes ended; says which."""


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
) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit code. `everybody`: listen beyond loopback without API keys.

    The memory service takes calls only from our api: both are given one token, that of RAMREC_MEMORY_TOKEN or a new
    one. It travels in the environment, as the URL of Redis does: others can read the arguments of a process.

    Raises:
        CheckpointError: no usable checkpoint. ServeError: a port is taken, or a process ended by itself.
    """
    load_checkpoint(run, with_weights=False)
    shared = _environment(redis_url, memory_url)
    if memory_url is None and port == memory_port:
        raise ServeError(f"api and memory service cannot both listen on port {port}")
    _check_port(host, port)
    children: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs begin with it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        if memory_url is None:
            _check_port("127.0.0.1", memory_port)
            memory_url = f"http://127.0.0.1:{memory_port}"
            keep = [] if redis_url else ["--data-dir", str(data_dir or data_dir_of(run))]
            children.append(_start("memory_service", run, memory_port, "127.0.0.1", keep, shared))
        guard = [*(["--keys", str(keys)] if keys else []), *(["--open"] if everybody else [])]
        children.append(_start("api", run, port, host, ["--memory-url", memory_url, *guard], shared))
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        wait_until_ready(children, url)
        signal.signal(signal.SIGHUP, lambda *_: children[-1].send_signal(signal.SIGHUP))  # the api reads its run anew
        print(
            f"RAMRec serves on {url} (open it in a browser to look into memories; API: /docs, stop: Ctrl-C)", flush=True
        )
        while True:
            _check_alive(children)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(children)


def _environment(redis_url: str | None, memory_url: str | None) -> dict[str, str]:
    """What the children are told and nobody else may read."""
    told = {} if redis_url is None else {"RAMREC_MEMORY_REDIS_URL": redis_url}
    if memory_url is None:
        token = os.environ.get("RAMREC_MEMORY_TOKEN") or secrets.token_urlsafe(32)
        told |= {"RAMREC_MEMORY_TOKEN": token, "RAMREC_API_MEMORY_TOKEN": token}
    return told


def data_dir_of(run: Path) -> Path:
    """Where the memories of a run are kept: in the user's data folder, one folder a run."""
    path = run.resolve()
    return user_data_dir() / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _start(
    module: str, run: Path, port: int, host: str, more: Sequence[str], told: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    words = ["--run", str(run), "--host", host, "--port", str(port), *more]
    # A session of its own: Ctrl-C reaches only us, and we stop the children in order.
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        start_new_session=True,
        preexec_fn=_end_with(os.getpid()),
        env={**HUGE_PAGES, **ONE_THREAD, **os.environ, **told},
    )


def _end_with(parent: int) -> Callable[[], None]:
    """Have the kernel end a child when its parent is gone, even after kill -9 (Linux only)."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def wait_until_ready(children: Sequence[subprocess.Popen[bytes]], url: str) -> None:
    """Wait until an api answers that it is ready. Raises ServeError where a child ends or the time is up."""
    deadline, reason = time.monotonic() + READY_TIMEOUT_S, "no answer"
    while time.monotonic() < deadline:
        _check_alive(children)
        try:
            with DIRECT.open(f"{url}/health/ready", timeout=2):
                return
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
        except OSError:
            pass  # it does not listen yet
        time.sleep(POLL_S)
    raise ServeError(f"not ready within {READY_TIMEOUT_S:.0f} s: {url}/health/ready says {reason}")


def _check_alive(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is not None:
            raise ServeError(f"{_name(child)} ended with exit code {child.returncode}; the rest was stopped")


def _name(child: subprocess.Popen[bytes]) -> str:
    module = child.args[2]  # type: ignore[index]
    return NAMES.get(str(module), str(module))


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the api first, so that it can finish what it accepted; then the memory service.

    From here on further signals change nothing: it ends within two grace periods anyway.
    """
    if children:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    for child in reversed(children):
        end(child, GRACE_S)


def end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask a process to stop; kill it where it does not within the grace period."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
