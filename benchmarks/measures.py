"""What a measurement is, and the file they go into."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measure:
    """`target` is a bound on `value` ("≥" or "≤") where there is one; `ratio` is value / reference."""

    name: str
    value: float
    unit: str
    target: str = ""
    target_met: bool | None = None
    reference: str = ""
    reference_value: float | None = None
    ratio: float | None = None


def measured(
    name: str,
    value: float,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    reference: str = "",
    limit: float | None = None,
    ratio_at_least: float | None = None,
) -> Measure:
    """A measure held against its target and, as a ratio, against a limit measured in the same run."""
    ratio = value / limit if limit else None
    bounds = []
    if at_least is not None:
        bounds.append((f"≥ {at_least:g}", value >= at_least))
    if at_most is not None:
        bounds.append((f"≤ {at_most:g}", value <= at_most))
    if ratio_at_least is not None and ratio is not None:
        bounds.append((f"≥ {ratio_at_least:.0%} of the reference", ratio >= ratio_at_least))
    target, met = ", ".join(text for text, _ in bounds), all(good for _, good in bounds) if bounds else None
    measure = Measure(name, value, unit, target, met, reference, limit, ratio)
    print(_line(measure), flush=True)
    return measure


def _line(one: Measure) -> str:
    met = {True: "met", False: "MISSED", None: ""}[one.target_met]
    ratio = f"  {one.ratio:.2f} of {one.reference} ({one.reference_value:,.5g})" if one.ratio is not None else ""
    return f"{one.name}: {one.value:,.5g} {one.unit}  [{one.target}] {met}{ratio}"


def percentile(seconds: list[float], q: float) -> float:
    """A percentile of times, in milliseconds."""
    return float(np.percentile(seconds, q)) * 1e3


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def store(part: str, measures: list[Measure], about: dict[str, Any], file: Path) -> None:
    """Put the measures of one part into the results, in place of its former ones."""
    results = json.loads(file.read_text()) if file.exists() else {"about": {}, "measures": []}
    others = [one for one in results["measures"] if one["part"] != part]
    new = [{"part": part, **asdict(one)} for one in measures]
    results = {"about": results["about"] | {part: about}, "measures": others + new}
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
