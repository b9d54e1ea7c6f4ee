"""The command line of the benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import benchmarks.memory.replicas as package
from benchmarks.measures import Measure, store
from benchmarks.memory.replicas.deployments import Extent
from benchmarks.memory.replicas.members import ends, joins
from benchmarks.memory.replicas.throughput import lone, throughput
from benchmarks.memory.replicas.writes import listening, primary, seen

RESULTS = Path(__file__).parent.with_suffix(".json")


PARTS: dict[str, Callable[[Extent], list[Measure]]] = {
    "throughput": throughput,
    "lone": lone,
    "joins": joins,
    "ends": ends,
    "listening": listening,
    "seen": seen,
    "primary": primary,
}


def main() -> None:
    from api.commands.report import measured_with

    options = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    options.add_argument("--users", type=int, default=Extent.users, help="with a full bank each")
    options.add_argument("--entries", type=int, nargs="+", default=Extent.entries, help="that a joining replica loads")
    options.add_argument("--seconds", type=float, default=Extent.seconds, help="of each load")
    options.add_argument("--json", type=Path, default=RESULTS)
    given = options.parse_args()
    extent = Extent(given.users, given.entries, given.seconds)
    if unknown := set(given.parts) - set(PARTS):
        options.error(f"no such part: {', '.join(sorted(unknown))}")
    for name in given.parts or PARTS:
        print(f"— {name}", flush=True)
        about = {"command": f"python -m benchmarks.memory.replicas {name}", "users": extent.users}
        store(name, PARTS[name](extent), measured_with() | about, given.json)


if __name__ == "__main__":
    main()
