"""Costs fitted to what was measured, and how well they foretell it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.scale import measure as names
from benchmarks.scale.capacity import MILLION, Costs, Load, banks_bytes, index_bytes, memory_s, record_bytes
from benchmarks.scale.measure import RESULTS, SIZES, Size

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
    resident = np.array([size.resident for size in at], float)
    ones, own = np.ones(len(at)), float(np.median(column(names.OWN)))
    redis_user, redis_entry = _fit([ones, entries], column(names.REDIS))
    resident_user, shared_entry = _fit([resident, total], column(names.HELD))
    base, tenfold = _growth(np.log10(total / MILLION), column(names.BOTH) - own)
    return Costs(
        redis_user=redis_user,
        redis_entry=redis_entry,
        resident_user=resident_user,
        shared_entry=shared_entry,
        replica=float(np.median(column(names.REPLICA))),
        own_s=own * 1e-6,
        others_s=base * 1e-6,
        tenfold_s=tenfold * 1e-6,
        write_s=found[names.WRITES, names.WRITER] * 1e-6,
        heard_s=max(0.0, found[names.WRITES, names.HEARD]) * 1e-6,
        api_s=float(np.median(column(names.API))) * 1e-6,
        redis_request_s=float(np.median(column(names.REDIS_REQUEST))) * 1e-6,
        redis_write_s=found[names.WRITES, names.REDIS_WRITE] * 1e-6,
        redis_heard_s=max(0.0, found[names.WRITES, names.REDIS_HEARD]) * 1e-6,
        wire_memory=float(np.median(column(names.WIRE_MEMORY))),
        wire_caller=float(np.median(column(names.WIRE_CALLER))),
    )


def _fit(columns: list[np.ndarray], measured: np.ndarray) -> list[float]:
    """Least squares of relative errors: small sizes count as much as large ones."""
    return np.linalg.lstsq(np.stack(columns, 1) / measured[:, None], np.ones(len(measured)), rcond=None)[0].tolist()


def _growth(magnitude: np.ndarray, measured: np.ndarray) -> list[float]:
    """Value at magnitude 0, and growth for each 1 more, none where it fell."""
    base, growth = _fit([np.ones(len(measured)), magnitude], measured)
    return [base, growth] if growth > 0 else [float(measured.mean()), 0.0]


def foretold(costs: Costs, size: Size) -> dict[str, float]:
    """What the model says of a measured size, in the units of the measures."""
    load = Load(size.users, size.entries, 1.0, active=size.resident / size.users)
    return {
        names.REDIS: record_bytes(costs, size.entries),
        names.HELD: banks_bytes(costs, load) + index_bytes(costs, load),
        names.BOTH: memory_s(costs, load) * 1e6,
        names.API: costs.api_s * 1e6,
    }
