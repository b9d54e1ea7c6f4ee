"""How RAMRec grows, on paper: `make bench-scale` measures, then extrapolates. Results: results.json, plan.json.

python -m benchmarks.scale.measure [PART ...]
python -m benchmarks.scale.run [--users N] [--requests N] [--cores N] [--ram GIB] [--price PER_HOUR]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale.capacity import (
    GIB,
    Costs,
    Load,
    Machine,
    Plan,
    api_s,
    best_lists,
    fan_out_limit,
    fan_out_s,
    memory_bytes,
    memory_s,
    own_scope_only,
    plan,
    redis_bytes,
    scan_s,
    wire_bytes,
)
from benchmarks.scale.figures import PROBES, figures, fitted, foretold, sizes
from benchmarks.scale.queueing import latencies, lognormal

PLAN = Path(__file__).with_name("plan.json")
STEPS = ((1e6, 1e3), (1e7, 1e4), (1e8, 1e5))
"""Users and requests a second that the table goes through."""
ENTRIES, ACTIVE = 20, 0.2
"""Memories of a user on average, and the share of the users who are resident: assumed."""
VARIATION = 1.0
REQUESTS = 50_000
PARTS = ((1, 2), (1, 4), (4, 8), (16, 8))
"""Replicas and apis that the simulation goes through."""


def planned(costs: Costs, users: float, requests: float, machine: Machine) -> tuple[Load, Plan]:
    """The cheapest plan, with as many lists in the collective index as suit its replicas."""
    load = Load(users, ENTRIES, requests, ACTIVE, probes=PROBES)
    best: tuple[Load, Plan] | None = None
    for replicas in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        suited = replace(load, lists=best_lists(costs, load, replicas))
        found = plan(costs, suited, machine)
        if best is None or (found.machines, found.copies) < (best[1].machines, best[1].copies):
            best = suited, found
    assert best is not None
    return best


def agreement() -> list[dict[str, Any]]:
    """What was measured beside what the fitted model says of it."""
    found = figures()
    costs, rows = fitted(found), []
    for size in sizes(found):
        for name, value in foretold(costs, size).items():
            measured = found[size.name, name]
            rows.append(
                {"size": size.name, "of": name, "measured": measured, "model": value, "off": value / measured - 1}
            )
    return rows


def extrapolated(costs: Costs, machine: Machine, steps: tuple[tuple[float, float], ...]) -> list[dict[str, Any]]:
    """Machines, money and limits at each step."""
    rows = []
    for users, requests in steps:
        alone, nothing = own_scope_only(costs), Load(users, ENTRIES, requests, ACTIVE)
        rows.append(_row("both", costs, *planned(costs, users, requests, machine)))
        rows.append(_row("own", alone, nothing, plan(alone, nothing, machine)))
    return rows


def _row(scopes: str, costs: Costs, load: Load, found: Plan) -> dict[str, Any]:
    return {
        "users": load.users,
        "requests": load.requests,
        "scopes": scopes,
        **asdict(found),
        "fan_out_limit": found.fan_out_limit if scopes == "both" else None,
        "machines": found.machines,
        "lists": load.lists,
        "redis_bytes": redis_bytes(costs, load.users, ENTRIES),
        "memory_bytes": memory_bytes(costs, load, found.replicas) * found.copies,
        "memory_network": load.requests * wire_bytes(costs, found.replicas),
        "memory_s": memory_s(costs, load, found.replicas),
        "api_s": api_s(costs, found.replicas),
        "price_million": found.price_hour / (load.requests * 3600) * 1e6,
    }


def simulated(costs: Costs, machine: Machine) -> list[dict[str, Any]]:
    """Latency over load: a million users, apis and replicas of one core each."""
    rng, rows = np.random.default_rng(0), []
    load = Load(1e6, ENTRIES, 1.0, ACTIVE)
    for replicas, apis in PARTS:
        part_s = costs.own_s / replicas + fan_out_s(costs, load) + scan_s(costs, load, replicas)
        limit = min(apis / api_s(costs, replicas), 1 / part_s)
        for busy in (0.3, 0.6, 0.8, 0.9):
            api, part = lognormal(api_s(costs, replicas), VARIATION), lognormal(part_s, VARIATION)
            seconds = latencies(limit * busy, apis, replicas, api, part, REQUESTS, rng)
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
            rows.append(
                {
                    "replicas": replicas,
                    "apis": apis,
                    "busy": busy,
                    "requests": limit * busy,
                    "p50_ms": p50,
                    "p99_ms": p99,
                }
            )
    return rows


def main() -> None:
    from api.cli import measured_with

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--users", type=float)
    options.add_argument("--requests", type=float)
    options.add_argument("--cores", type=int, default=Machine.cores)
    options.add_argument("--ram", type=float, default=Machine.ram / GIB, help="GiB")
    options.add_argument("--price", type=float, default=Machine.price, help="an hour")
    given = options.parse_args()
    machine, costs = Machine(given.cores, given.ram * GIB, price=given.price), fitted(figures())
    asked = ((given.users, given.requests),) if given.users and given.requests else STEPS
    told = {
        "about": measured_with() | {"command": "python -m benchmarks.scale.run"},
        "costs": asdict(costs),
        "machine": asdict(machine),
        "assumed": {"memories of a user": ENTRIES, "resident": ACTIVE, "probes": PROBES},
        "agreement": agreement(),
        "plan": extrapolated(costs, machine, asked),
        "simulated": simulated(costs, machine),
        "fan_out_limit": {
            lists: fan_out_limit(costs, Load(1, 1, 1, lists=lists), machine) for lists in (6_000, 24_000)
        },
    }
    if asked == STEPS and machine == Machine():
        PLAN.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    show(told)


def show(told: dict[str, Any]) -> None:
    """As tables in Markdown."""
    rows = [
        (f"{row['size']}: {row['of']}", f"{row['measured']:,.4g}", f"{row['model']:,.4g}", f"{row['off']:+.0%}")
        for row in told["agreement"]
    ]
    _table(("", "measured", "model", "off"), rows)
    _table(
        ("users", "req/s", "scopes", "memory tier", "memory", "Redis", "api", "an hour", "a million requests"),
        [
            (
                f"{row['users']:,.0f}",
                f"{row['requests']:,.0f}",
                row["scopes"],
                f"{row['copies']} × {row['replicas']}, {row['side_by_side']} a machine",  # noqa: RUF001
                f"{row['memory_machines']}",
                f"{row['redis_machines']}",
                f"{row['api_machines']}",
                f"{row['price_hour']:,.2f}",
                f"{row['price_million']:.3f}",
            )
            for row in told["plan"]
        ],
    )
    _table(
        ("replicas", "apis", "busy", "req/s", "p50", "p99"),
        [
            (
                f"{row['replicas']}",
                f"{row['apis']}",
                f"{row['busy']:.0%}",
                f"{row['requests']:,.0f}",
                f"{row['p50_ms']:.1f} ms",
                f"{row['p99_ms']:.1f} ms",
            )
            for row in told["simulated"]
        ],
    )
    for lists, limit in told["fan_out_limit"].items():
        print(f"no copy of the memory tier passes {limit:,.0f} requests a second with {lists:,} lists")


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    for row in (heads, ("---",) * len(heads), *rows):
        print("|", " | ".join(row), "|")
    print()


if __name__ == "__main__":
    main()
