"""What `ramrec evaluate` prints, and where a measurement was made."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = ("variant", "protocol", "store")


def measured_with() -> dict[str, Any]:
    """The command, versions and machine of a measurement."""
    return {
        "command": " ".join(["ramrec", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("ramrec", "torch", "numpy")}},
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_report(report: dict[str, Any]) -> None:
    """Print a report of `model.training.evaluation.evaluate`: one table with the gain from memory beside each row, then
    the spread of entropy and K.
    """
    console, table = Console(), _table(report)
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=200)).maximum)
    console.print(table)
    for part in ("entropy", "k", "collective_k"):
        console.print(f"{part}: " + "  ".join(f"{k} {v:.3g}" for k, v in report[part].items()), highlight=False)


def _table(report: dict[str, Any]) -> Table:
    first = report["rows"][0]
    seeds = f"{first['seeds']} seed{'s' if first['seeds'] > 1 else ''}"
    table = Table(title=f"{first['dataset']}, test items, all items ranked, {seeds}")
    figures = [name for name in first if "@" in name or name == "mrr"]
    for name in (*LABELS, *figures, "gain in NDCG@10 [95 %]"):
        table.add_column(name, justify="left" if name in LABELS else "right")
    gains = {tuple(gain[label] for label in LABELS): _gain(gain) for gain in report["gains"]}
    for row in report["rows"]:
        labels = tuple(row[label] for label in LABELS)
        table.add_row(*labels, *(f"{row[name]:.4f}" for name in figures), gains.get(labels, ""))
    return table


def _gain(gain: dict[str, Any]) -> str:
    return f"{gain['gain']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]"
