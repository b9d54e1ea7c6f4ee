"""How RAMRec grows, on paper: `make bench-scale` measures, then extrapolates. Results: results, plan (JSON), plan.md.

python -m benchmarks.scale.measure [PART ...]
python -m benchmarks.scale.run [--users N --requests N] [--writes N] [--share S ...] [--cores N] [--ram GIB] [--price P]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale.capacity import (
    GIB,
    Costs,
    DoesNotFitError,
    Load,
    Machine,
    memory_s,
    others_s,
    own_scope_only,
    plan,
    record_bytes,
    write_limit,
)
from benchmarks.scale.figures import RESULTS, Figures, figures, fitted, foretold, sizes
from benchmarks.scale.queueing import latencies, lognormal

HERE = Path(__file__).parent
STEPS = ((1e6, 1e3, (1.0,)), (1e7, 1e4, (1.0, 0.25)), (1e8, 1e5, (0.25, 0.1, 0.05, 0.02)))
"""Users, requests a second, and shares of all entries in the index that the table goes through."""
ENTRIES, ACTIVE, WRITES = 20, 0.2, 0.05
"""Memories of a user on average, the share of the users who are resident, and events for each request: assumed."""
VARIATION = 1.0
REQUESTS = 50_000
PARTS = ((1, 2), (4, 8), (16, 24))
"""Replicas and apis that the simulation goes through."""
Row = dict[str, Any]


def main() -> None:
    from api.commands.report import measured_with

    given = _arguments()
    machine, found = Machine(given.cores, given.ram * GIB, price=given.price), figures(given.figures)
    costs = fitted(found)
    steps = ((given.users, given.requests, tuple(given.share)),) if given.users and given.requests else STEPS
    told = {
        "about": measured_with() | {"command": "python -m benchmarks.scale.run"},
        "costs": asdict(costs),
        "machine": asdict(machine),
        "assumed": {"memories of a user": ENTRIES, "resident": ACTIVE, "events for each request": given.writes},
        "write_limit": write_limit(costs, machine),
        "agreement": agreement(found),
        "plan": extrapolated(costs, machine, steps, given.writes),
        "simulated": simulated(costs),
    }
    text = "\n".join(_page(told))
    print(text)
    if given.out is not None:
        (given.out / "plan.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        (given.out / "plan.md").write_text(text)


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--users", type=float)
    options.add_argument("--requests", type=float, help="a second")
    options.add_argument("--writes", type=float, default=WRITES, help="events for each request")
    options.add_argument("--share", type=float, nargs="+", default=(1.0,), help="of all entries, kept in the index")
    options.add_argument("--cores", type=int, default=Machine.cores)
    options.add_argument("--ram", type=float, default=Machine.ram / GIB, help="GiB")
    options.add_argument("--price", type=float, default=Machine.price, help="an hour")
    options.add_argument("--figures", type=Path, default=RESULTS, help="what `benchmarks.scale.measure` wrote")
    options.add_argument("--out", type=Path, help="folder for plan.json and plan.md; none: only shown")
    return options.parse_args()


# ------------------------------------------------------------------------------------------------ what follows


def agreement(found: Figures) -> list[Row]:
    """What was measured beside what the fitted model says of it."""
    costs = fitted(found)
    return [
        {"size": size.name, "of": name, "measured": found[size.name, name], "model": value}
        for size in sizes(found)
        for name, value in foretold(costs, size).items()
    ]


def extrapolated(
    costs: Costs, machine: Machine, steps: Sequence[tuple[float, float, Sequence[float]]], writes: float
) -> list[Row]:
    """Machines and money at each step, for each share of the entries, and for the own scope alone."""
    rows = []
    for users, requests, shares in steps:
        alone = Load(users, ENTRIES, requests, requests * writes, ACTIVE, share=0.0)
        loads = [Load(users, ENTRIES, requests, requests * writes, ACTIVE, share) for share in shares]
        rows += [_row("both", costs, load, machine) for load in loads]
        rows.append(_row("own", own_scope_only(costs), alone, machine))
    return rows


def _row(scopes: str, costs: Costs, load: Load, machine: Machine) -> Row:
    row = asdict(load) | {"scopes": scopes, "kept": load.kept, "memory_s": memory_s(costs, load)}
    try:
        found = plan(costs, load, machine)
    except DoesNotFitError as error:
        return row | {"trouble": str(error)}
    price_million = found.price_hour / (load.requests * 3600) * 1e6
    return row | asdict(found) | {"machines": found.machines, "price_million": price_million}


def simulated(costs: Costs) -> list[Row]:
    """Latency over load: ten million entries, apis and replicas of one core each."""
    rng, rows = np.random.default_rng(0), []
    answering = costs.own_s + others_s(costs, 1e7)
    for replicas, apis in PARTS:
        limit = min(apis / costs.api_s, replicas / answering)
        api, memory = lognormal(costs.api_s, VARIATION), lognormal(answering, VARIATION)
        for busy in (0.3, 0.6, 0.8, 0.9):
            p50, p99 = np.percentile(latencies(limit * busy, apis, replicas, api, memory, REQUESTS, rng), [50, 99])
            row = {"replicas": replicas, "apis": apis, "busy": busy, "requests": limit * busy}
            rows.append(row | {"p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3})
    return rows


# ---------------------------------------------------------------------------------------------------- as a page


def _page(told: dict[str, Any]) -> Iterator[str]:
    """All of it in Markdown, line by line."""
    yield "Made by `python -m benchmarks.scale.run`; what it means is in README.md.\n"
    yield f"{_costs_in_words(Costs(**told['costs']))}\n"
    each = f"{told['machine']['busy']:.0%} of a core each"
    yield f"**Replicas can hear of {told['write_limit']:,.0f} writes a second**, however many there are: {each}.\n"
    rows = [
        (row["size"], row["of"], f"{row['measured']:,.4g}", f"{row['model']:,.4g}", _off(row))
        for row in told["agreement"]
    ]
    yield from _table(("", "", "measured", "model", "off"), rows)
    heads = (
        "users",
        "req/s",
        "writes/s",
        "scopes",
        "entries in the index",
        "memory replicas",
        "memory",
        "Redis",
        "api",
    )
    yield from _table((*heads, "machines", "an hour", "a million requests"), map(_plan_cells, told["plan"]))
    rows = [
        (
            f"{row['replicas']}, {row['apis']}", f"{row['busy']:.0%}", f"{row['requests']:,.0f}",
            f"{row['p50_ms']:.1f} ms", f"{row['p99_ms']:.1f} ms",
        )
        for row in told["simulated"]
    ]  # fmt: skip
    yield from _table(("replicas, apis", "busy", "req/s", "p50", "p99"), rows)


def _costs_in_words(costs: Costs) -> str:
    def micro(*seconds: float) -> tuple[str, ...]:
        return tuple(f"{one * 1e6:,.0f}" for one in seconds)

    own, few, many = micro(costs.own_s, others_s(costs, 1e6), others_s(costs, 1e8))
    api, redis = micro(costs.api_s, costs.redis_request_s)
    writer, heard, kept, told = micro(costs.write_s, costs.heard_s, costs.redis_write_s, costs.redis_heard_s)
    return (
        f"Fitted. Redis: {costs.redis_user:,.0f} bytes a user and {costs.redis_entry:,.0f} an entry. "
        f"RAM of a memory replica: {costs.resident_user / 1e3:,.1f} kB a resident user, {costs.shared_entry:,.0f} "
        f"bytes an entry of the collective index. CPU of a request: api {api} µs, Redis {redis}, memory replica {own} "
        f"for the own scope and {few} more for others' memories among a million ({many} among 100 million). CPU of a "
        f"write: {writer} µs of the replica that writes, {heard} of every other one, {kept} of Redis and {told} "
        f"for each that hears of it and reads the record ({record_bytes(costs, ENTRIES) / 1e3:,.1f} kB)."
    )


def _off(row: Row) -> str:
    return f"{row['model'] / row['measured'] - 1:+.0%}"


def _plan_cells(row: Row) -> tuple[str, ...]:
    share = f"{row['kept'] / 1e6:,.0f} million, {row['share']:.0%}" if row["kept"] else "none"
    asked = (f"{row['users']:,.0f}", f"{row['requests']:,.0f}", f"{row['writes']:,.0f}", row["scopes"], share)
    if "trouble" in row:
        return (*asked, row["trouble"], *[""] * 6)
    each = (
        f"{row['replicas']} of {row['replica_bytes'] / GIB:,.1f} GiB, {row['side_by_side']} a machine ({row['binds']})"
    )
    counts = (f"{row[f'{kind}_machines']}" for kind in ("memory", "redis", "api"))
    return (*asked, each, *counts, f"{row['machines']}", f"{row['price_hour']:,.2f}", f"{row['price_million']:.3f}")


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]] | Iterator[tuple[str, ...]]) -> Iterator[str]:
    for row in (heads, ("---",) * len(heads), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    main()
