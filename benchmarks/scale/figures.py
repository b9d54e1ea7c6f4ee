"""Costs fitted to what was measured, and how well they foretell it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.memory import banks as made
from benchmarks.scale import measure as names
from benchmarks.scale.capacity import Costs, Load, fan_out_s, memory_bytes, redis_bytes, scan_s
from benchmarks.scale.measure import SIZES, Size

RESULTS = Path(__file__).parent / "results.json"
PROBES = 16
Figures = dict[tuple[str, str], float]


def figures(file: Path = RESULTS) -> Figures:
    """Values by part and name."""
    return {(one["part"], one["name"]): one["value"] for one in json.loads(file.read_text())["measures"]}


def sizes(found: Figures) -> list[Size]:
    """What was measured."""
    return [size for size in SIZES if (size.name, names.REDIS) in found]


def fitted(found: Figures) -> Costs:
    """Costs by least squares over the sizes; those that do not depend on the size are their median."""

    def column(name: str) -> np.ndarray:
        return np.array([found[size.name, name] for size in at])

    at = sizes(found)
    entries = np.array([size.entries for size in at], float)
    total = np.array([size.users * size.entries for size in at], float)
    ones = np.ones(len(at))
    redis_user, redis_entry = _fit([ones, entries], column(names.REDIS))
    resident = np.array([size.resident for size in at], float)
    resident_user, shared_entry = _fit([resident, total], column(names.HELD))
    list_s = found["centroids", names.CENTROID] * 1e-9
    looked_at = total * PROBES / made.LISTS
    fixed, entry_s = _fit([ones, looked_at], column(names.PART) * 1e-6)
    return Costs(
        redis_user=redis_user,
        redis_entry=redis_entry,
        resident_user=resident_user,
        shared_entry=shared_entry,
        replica=float(np.median(column(names.REPLICA))),
        own_s=float(np.median(column(names.OWN))) * 1e-6,
        call_s=max(0.0, fixed - list_s * made.LISTS),
        list_s=list_s,
        entry_s=entry_s,
        api_s=float(np.median(column(names.API))) * 1e-6,
        merge_s=max(0.0, found["merging", names.MERGE]) * 1e-6,
        wire_own=float(np.median(column(names.WIRE_OWN))),
        wire_part=float(np.median(column(names.WIRE_PART))),
        wire_caller=float(np.median(column(names.WIRE_CALLER))),
    )


def _fit(columns: list[np.ndarray], measured: np.ndarray) -> list[float]:
    """Least squares of relative errors: small sizes count as much as large ones."""
    return np.linalg.lstsq(np.stack(columns, 1) / measured[:, None], np.ones(len(measured)), rcond=None)[0].tolist()


def foretold(costs: Costs, size: Size) -> dict[str, float]:
    """What the model says of a measured size, in the units of the measures."""
    load = Load(size.users, size.entries, 1.0, active=size.resident / size.users)
    return {
        names.REDIS: redis_bytes(costs, 1, size.entries),
        names.HELD: memory_bytes(costs, load) - costs.replica,
        names.PART: (fan_out_s(costs, load) + scan_s(costs, load)) * 1e6,
        names.BOTH: (costs.own_s + fan_out_s(costs, load) + scan_s(costs, load)) * 1e6,
        names.API: costs.api_s * 1e6,
    }
