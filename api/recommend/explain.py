"""What `explain` adds to an answer: where each item's probability comes from, and the memories that speak for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from api.catalogue.catalogue import CatalogueMirror
from api.http.schemas import Because, Habit, MemoryUse, Parts, Recommended, RetrievedMemory
from model.memory.bank import Entries, Retrieved
from model.memory.habits import habit_of
from model.serving.explanation import Explanation, Influence
from model.serving.recommender import Ranked

REASONS = 3
"""Memories named for each item, the largest part first; a negative part speaks against the item."""


def tell(
    catalogue: CatalogueMirror,
    retrieved: Retrieved,
    row: int,
    ranked: Ranked,
    items: list[Recommended],
    memory: MemoryUse,
    timed: bool,
) -> None:
    """Add the explanation of one answer to its items and its memory block. What is popular has no parts, and used no
    memories. timed: whether the model's data has times.
    """
    told = ranked.explanation
    memory["gate"], memory["copying"] = (told.gate, told.copying) if told else (0.0, 0.0)
    if told is None:
        memory["memories"] = []
        for item in items:
            item["because"] = []
        return
    memory["log_z"] = told.log_z
    memories = [_retrieved(catalogue, retrieved, row, one, timed) for one in told.influences]
    memory["memories"] = memories
    parts = _parts(told)
    for n, item in enumerate(items):
        item["because"] = _because(memories, told, n)
        item["parts"] = parts[n]


def _retrieved(
    catalogue: CatalogueMirror, retrieved: Retrieved, row: int, one: Influence, timed: bool
) -> RetrievedMemory:
    entries = _entries(retrieved, one)
    memory: RetrievedMemory = {
        "item_id": catalogue.item_id(int(entries.item[row, one.entry])),
        "scope": one.scope,
        "similarity": float(entries.similarity[row, one.entry]),
        "weight": one.weight,
    }
    if one.scope == "own" and retrieved.habits.shape[2]:
        memory["habit"] = _habit(retrieved.habits[row, one.entry], one.habit, timed)
    return memory


def _habit(told: NDArray[np.float32], logit: float, timed: bool) -> Habit:
    """What one memory's features (F,) say."""
    habit = habit_of(told)
    return {
        "count": habit.count,
        "since_s": habit.since_s if timed else None,
        "mean_gap_s": habit.mean_gap_s,
        "at_this_hour": habit.at_this_hour,
        "on_this_day": habit.on_this_day,
        "logit": logit,
    }


def _parts(told: Explanation) -> list[Parts]:
    """The parts of each item's probability. An item that the model does not know is copied, and nothing else."""
    columns = (told.state, told.calibration, told.memories, told.copied)
    parts: list[Parts] = []
    for state, calibration, memories, copied in zip(*(column.tolist() for column in columns), strict=True):
        if np.isnan(state):
            parts.append({"state": None, "calibration": None, "memories": None, "copied": copied})
        else:
            parts.append({"state": state, "calibration": calibration, "memories": memories, "copied": copied})
    return parts


def _because(memories: list[RetrievedMemory], told: Explanation, n: int) -> list[Because]:
    """The memories that raise the logarithm of the n-th item's probability most, in its logit or as copies."""
    both = zip(memories, told.influences, strict=True)
    strongest = sorted(both, key=lambda one: -one[1].raises(n))[:REASONS]
    return [{**memory, "logit": float(one.part[n]), "copied": float(one.copied[n])} for memory, one in strongest]


def _entries(retrieved: Retrieved, one: Influence) -> Entries:
    return retrieved.own if one.scope == "own" else retrieved.collective
