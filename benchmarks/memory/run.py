"""Speed of the memory service, rerun with one command: `make bench-memory`. Results: benchmarks/memory/results.json.

    python -m benchmarks.memory.run [own] [service]

The collective index has its own: `python -m benchmarks.memory.lists` (it needs trained runs); so have several replicas:
`python -m benchmarks.memory.replicas`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    from api.commands.report import measured_with
    from benchmarks.measures import store
    from benchmarks.memory import own, service

    parts = {"own": own.measure, "service": service.measure}
    for name in sys.argv[1:] or list(parts):
        print(f"— {name}", flush=True)
        with_tunables = f"GLIBC_TUNABLES={tunables} " if (tunables := os.environ.get("GLIBC_TUNABLES")) else ""
        command = f"{with_tunables}OMP_NUM_THREADS=1 python -m benchmarks.memory.run {name}"
        store(name, parts[name](), measured_with() | {"command": command}, RESULTS)


if __name__ == "__main__":
    main()
