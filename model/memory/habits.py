"""Habits: what an entry knows about coming back to its item. How often, how long ago, how regularly, and when in the
day and the week. Pure numpy, no state.

An entry keeps these facts in constant space. Every event of its item updates them exactly (`taken_again`); `features`
reads them at the time of a request. An *occasion* is all that a user does at one time: a basket, or a single event.
Sources: decayed counts as in TIFU-KNN (Hu et al. 2020) and in the base-level activation of ACT-R (Anderson and Schooler
1991; for music, PISA, Tran et al. 2024); gaps as in ReCANet (Ariannezhad et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from model.config import RulesConfig
    from model.memory.rules import Bools, Floats, Ints

HOUR_S, DAY_S = 3600.0, 86400.0
OCCASION_HALF_LIVES = np.array([1.5, 5.0, 15.0, 50.0, 200.0])
"""Half-lives, in occasions, of the counts that decay with the user's occasions."""
DAY_HALF_LIVES = np.array([1.0, 4.0, 15.0, 60.0])
"""Half-lives, in days, of the counts that decay with time."""
PERIODS_H = np.array([24.0, 12.0, 8.0, 168.0, 84.0])
"""Periods, in hours, at which a habit may return: the day, its half and third, the week and its half."""

_OCCASIONS, _DAYS, _CYCLES = len(OCCASION_HALF_LIVES), len(DAY_HALF_LIVES), len(PERIODS_H)
SUMS = _OCCASIONS + _DAYS + 2 * _CYCLES
"""Numbers that an entry keeps beside its count and its first and last time: the counts decayed by occasions and by
days, as of its last event, then the sums of cos and of sin over its events for each period.
"""
FEATURES = (
    "log_count",
    "share",
    "log_occasions_since",
    *(f"log_count_{half_life:g}_occasions" for half_life in OCCASION_HALF_LIVES),
    "log_hours_since",
    "same_time",
    *(f"log_count_{half_life:g}_days" for half_life in DAY_HALF_LIVES),
    "log_hours_idle",
    "log_mean_gap_hours",
    "has_gap",
    "log_overdue",
    *(f"{what}_{period:g}_hours" for period in PERIODS_H for what in ("now", "regular", "often_now")),
)
"""Names of the features of an entry, in the order of `features`."""
TIMED = np.array([name != "share" and ("hours" in name or "days" in name or "gap" in name) for name in FEATURES])
TIMED |= np.isin(FEATURES, ("same_time", "log_overdue"))
"""Which features need a clock; they are 0 if a log has no times."""
LEAST = 1e-3
"""Added to decayed counts before their logarithm: smaller counts are indistinguishable from 0."""
FEW = 3
"""Number of events from which on a habit is reported."""
REGULAR = 0.6
"""Mean resultant length (1: always at the same time of a period) from which on a time is reported as usual."""
OVERDUE_S = 0.05 * DAY_S
"""Added to ages and gaps, in s, before their ratio is taken, so that gaps of seconds do not matter."""


def first_taken(time: Floats) -> NDArray[np.float32]:
    """Sums (A, SUMS) of entries whose items are taken for the first time, at `time` (A,) seconds."""
    angle = 2 * np.pi / HOUR_S * np.asarray(time, np.float64)[:, None] / PERIODS_H
    counts = np.ones((len(angle), _OCCASIONS + _DAYS))
    return np.concatenate([counts, np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def taken_again(
    sums: Floats, last_time: Floats, last_occasion: Ints, time: Floats, occasion: Ints
) -> NDArray[np.float32]:
    """Sums (A, SUMS) after one more event of each item, at `time` (A,) in s and `occasion` (A,). A late event is
    decayed by its age. last_time, last_occasion (A,): of the last event in `sums` (A, SUMS).
    """
    new = first_taken(time).astype(np.float64)
    days = (np.asarray(time, np.float64) - last_time) / DAY_S
    passed = np.concatenate(
        [
            (np.asarray(occasion, np.float64) - last_occasion)[:, None] / OCCASION_HALF_LIVES,
            days[:, None] / DAY_HALF_LIVES,
        ],
        axis=1,
    )
    decayed = _OCCASIONS + _DAYS
    old = sums.astype(np.float64)
    old[:, :decayed] *= np.exp2(-np.maximum(passed, 0.0))
    new[:, :decayed] *= np.exp2(-np.maximum(-passed, 0.0))
    return np.asarray(old + new, np.float32)


def request_time(now: Floats, newest: Floats, rules: RulesConfig) -> NDArray[np.float64]:
    """The time that ages are measured to, (B,) in s: the time of the request, at least that of the user's newest event,
    and at most `rules.longest_gap_s` after it, the longest gap in the training data. now, newest: (B,) in s.
    """
    return np.clip(np.asarray(now, np.float64), newest, newest + rules.longest_gap_s)


def features(
    facts: Mapping[str, NDArray[Any]] | NDArray[Any], valid: Bools, occasions: Ints, now: Floats, rules: RulesConfig
) -> NDArray[np.float32]:
    """The features of entries at the time of a request, (B, C, len(FEATURES)); 0 where not valid.

    Args:
        facts: by name, (B, C) each: frequency, first_time and time (s), occasion (number of the last one), and sums
            (B, C, SUMS), as of the entry's last event.
        valid: (B, C) True where there is an entry. occasions: (B,) how many the user had.
        now: (B,) in s. It gives the hour of the day and of the week; ages are measured to `request_time`.
    """
    count = np.where(valid, facts["frequency"], 1).astype(np.float32)
    time = np.where(valid, facts["time"], 0.0)
    newest = np.max(np.where(valid, time, -np.inf), axis=1, initial=-np.inf)
    newest = np.where(np.isfinite(newest), newest, 0.0)
    until = request_time(now, newest, rules)
    occasions_since = np.maximum(np.asarray(occasions, np.int64)[:, None] - facts["occasion"], 0).astype(np.float32)
    since = np.maximum(until[:, None] - time, 0.0).astype(np.float32)
    sums = facts["sums"]
    columns = [
        np.log(count),
        count / np.sum(count * valid, axis=1, keepdims=True, initial=1e-9),
        np.log1p(occasions_since),
        *_decayed(sums[..., :_OCCASIONS], occasions_since, OCCASION_HALF_LIVES),
        np.log1p(since / np.float32(HOUR_S)) / 2,
        (time == np.asarray(now, np.float64)[:, None]).astype(np.float32),
        *_decayed(sums[..., _OCCASIONS : _OCCASIONS + _DAYS], since / np.float32(DAY_S), DAY_HALF_LIVES),
        np.broadcast_to(np.log1p((until - newest) / HOUR_S)[:, None] / 2, count.shape),
        *_gaps(count, np.where(valid, time - facts["first_time"], 0.0), since),
        *_cycles(sums[..., _OCCASIONS + _DAYS :], count, np.asarray(now, np.float64)),
    ]
    stacked = np.stack([np.asarray(column, np.float32) for column in columns], axis=-1)
    kept = np.ones(len(FEATURES), bool) if rules.time_unit == "seconds" else ~TIMED
    return np.asarray(np.where(valid[..., None] & kept, stacked, np.float32(0)), np.float32)


def _decayed(sums: Floats, age: Floats, half_lives: Floats) -> list[NDArray[np.float32]]:
    """Logarithms of decayed counts, one array (B, C) for each half-life."""
    counts = sums * np.exp2(-age[..., None] / half_lives.astype(np.float32))
    return list(np.moveaxis(np.log(counts + np.float32(LEAST)), -1, 0))


def _gaps(count: Floats, span: Floats, since: Floats) -> list[Floats]:
    """The mean gap, whether there is one, and the logarithm of the time since the last event over it; (B, C) each."""
    has_gap = count > 1
    gap = (span / np.maximum(count - 1, 1)).astype(np.float32)
    overdue = np.clip(np.log((since + np.float32(OVERDUE_S)) / (gap + np.float32(OVERDUE_S))), -4, 4)
    return [np.where(has_gap, np.log1p(gap / HOUR_S) / 2, 0), has_gap, np.where(has_gap, overdue, 0)]


def _cycles(sums: Floats, count: Floats, now: Floats) -> list[Floats]:
    """For each period the share of the item's events at this time of it, and how regular they are; (B, C) each."""
    angle = 2 * np.pi / HOUR_S * now[:, None] / PERIODS_H
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    columns = []
    for n in range(_CYCLES):
        x, y = sums[..., n], sums[..., _CYCLES + n]
        at_now = x * cos[:, n, None] + y * sin[:, n, None]
        columns += [at_now / (count + 1), np.sqrt(x * x + y * y) / (count + 1), at_now / (count + 4)]
    return columns


def activation(features: NDArray[np.float32], similarity: Floats, rules: RulesConfig) -> NDArray[np.float64]:
    """Activation of entries, (B, C), by which they are retrieved: their features (B, C, F) and their similarity to the
    state (B, C), weighted by `rules.activation`.
    """
    weights = np.array([rules.activation.get(name, 0.0) for name in FEATURES])
    relevance = rules.activation.get("similarity", 0.0) * similarity.astype(np.float64)
    return np.asarray((features * weights).sum(axis=-1) + relevance, np.float64)


@dataclass(frozen=True)
class Habit:
    """The habit of one memory at the time of a request.

    count: how often the item was taken. since_s: s since it was last taken. mean_gap_s: mean gap in s; None: it was
    taken once. at_this_hour, on_this_day: whether it is usually taken at this time of the day, and of the week.
    """

    count: int
    since_s: float
    mean_gap_s: float | None
    at_this_hour: bool
    on_this_day: bool


def habit_of(features: NDArray[np.float32]) -> Habit:
    """The features (F,) of one memory in readable units."""
    by_name = dict(zip(FEATURES, features.tolist(), strict=True))
    count = max(1, round(float(np.exp(by_name["log_count"]))))

    def falls_on_now(period: str) -> bool:
        return count >= FEW and by_name[f"now_{period}_hours"] * (count + 1) / count > REGULAR

    return Habit(
        count=count,
        since_s=float(np.expm1(2 * by_name["log_hours_since"])) * HOUR_S,
        mean_gap_s=float(np.expm1(2 * by_name["log_mean_gap_hours"])) * HOUR_S if by_name["has_gap"] else None,
        at_this_hour=falls_on_now("24"),
        on_this_day=falls_on_now("168"),
    )


def usual_time(frequency: int, sums: Floats, period_h: float) -> float | None:
    """When in a period an item is usually taken, in hours from its beginning; None: too seldom, or at any time.

    sums: (SUMS,). period_h: 24 or 168; periods begin at midnight UTC, the week on a Thursday.
    """
    nth = int(np.flatnonzero(period_h == PERIODS_H)[0])
    x, y = float(sums[_OCCASIONS + _DAYS + nth]), float(sums[_OCCASIONS + _DAYS + _CYCLES + nth])
    if frequency < FEW or np.hypot(x, y) < REGULAR * frequency:
        return None
    return float(np.arctan2(y, x) / (2 * np.pi) % 1.0) * period_h
