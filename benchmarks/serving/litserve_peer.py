"""The same model behind LitServe, and ours, under the same load in one run.

LitServe is no dependency: it is installed into an environment of its own that sees this one's packages, so that torch,
FAISS and all else are the very same. See `litserve_app` for what runs there.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from benchmarks.measures import Measure, measured
from benchmarks.ports import free_port
from benchmarks.serving.asking import Closed, Look, closed_loop
from benchmarks.serving.deployment import running
from benchmarks.serving.speed import CONNECTIONS, WARM_UP_S, Bench, Spent

LITSERVE = "litserve==0.2.19"
QUEUES = {"managed queue": (), "ZeroMQ": ("--fast-queue",)}
"""LitServe as it is by default, and as its documentation advises for high throughput."""
LOAD = f"POST /recommend by user_id, {CONNECTIONS} connections"


def measure(bench: Bench, run: Path, work: Path) -> list[Measure]:
    """Ours, then LitServe in place of our api (same memory service), and two that have it easier: banks and collective
    index in LitServe's own worker, and nothing behind it. Batches of up to 64 that wait up to 1 ms.
    """
    python, redis_url = environment(work / LITSERVE.replace("==", "-")), bench.deployment.redis_url
    before = Spent.until_now(bench.deployment)
    ours = bench.users()
    used = Spent.until_now(bench.deployment).api_s(before)
    found = [
        measured(f"RAMRec, {LOAD}", ours.rate, "req/s"),
        measured(f"RAMRec, {LOAD}: p99", ours.p99_ms, "ms"),
        measured(f"RAMRec, {LOAD}: CPU a request, api", used * 1e6, "µs"),
    ]
    port = free_port()
    memory = ["-m", "memory_service", "--run", str(run), "--redis-url", redis_url, "--port", str(port)]
    with running(memory, port) as kept:
        found += _beside(bench, python, ours, "in place of our api", ["--run", str(run), "--memory-url", kept.url])
    found += _beside(bench, python, ours, "banks in its worker", ["--run", str(run), "--redis-url", redis_url])
    return found + _beside(bench, python, ours, "a fixed list", [])


def _beside(bench: Bench, python: Path, ours: Closed, what: str, options: list[str]) -> list[Measure]:
    """Each queue's figures, and ours beside the better one."""
    asked = {queue: _asked(bench, python, [*options, *words]) for queue, words in QUEUES.items()}
    found = []
    for queue, (one, used) in asked.items():
        found.append(measured(f"LitServe, {what}, {queue}", one.rate, "req/s"))
        found.append(measured(f"LitServe, {what}, {queue}: p99", one.p99_ms, "ms"))
        found.append(measured(f"LitServe, {what}, {queue}: CPU a request", used * 1e6, "µs"))
    best, target = max((one for one, _ in asked.values()), key=lambda one: one.rate), None
    if "--memory-url" in options:
        target = 3
    name, reference = f"RAMRec beside LitServe, {what}", "LitServe's better queue"
    return [
        *found,
        measured(name, ours.rate, "req/s", reference=reference, limit=best.rate, ratio_at_least=target),
        measured(f"{name}: p99", ours.p99_ms, "ms", reference=reference, limit=best.p99_ms,
                 at_most=best.p99_ms if target else None),
    ]  # fmt: skip


def _asked(bench: Bench, python: Path, options: list[str]) -> tuple[Closed, float]:
    """A closed loop, and the CPU seconds that a request of it cost LitServe's processes."""
    port = free_port()
    command, log = (
        ["-m", "benchmarks.serving.litserve_app", *options, "--port", str(port)],
        bench.bodies / "litserve.log",
    )
    with running(command, port, python, log) as served:
        url, bodies = f"{served.url}/recommend", bench.bodies / "users"
        closed_loop(url, bodies, CONNECTIONS, min(WARM_UP_S, bench.seconds))
        before = served.cpu_s()
        loop = closed_loop(url, bodies, CONNECTIONS, bench.seconds, Look(url, bodies))
        return loop, (served.cpu_s() - before) / loop.requests


def environment(folder: Path) -> Path:
    """The Python of LitServe's environment, made at the first call and kept."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, clear=True, with_pip=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITSERVE]
        subprocess.run(install, check=True, stdout=sys.stderr)
    return python.absolute()
