"""What `explain` adds to a response: the parts of each item's probability, and the memories behind it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from api.catalogue.catalogue import CatalogueMirror
from api.http.schemas.recommend import Because, Habit, MemoryUse, Parts, Recommended, RetrievedMemory
from api.models.engine import Engine
from model.memory.habits import habit_of
from model.memory.ids import CatalogueNumber
from model.memory.retrieval import Retrieved
from model.serving.explanation import Explanation, Influence
from model.serving.recommender import Ranked

REASONS = 3
"""Memories named for each item, those that raise it most first; a negative part lowers it."""


def add_explanation(
    engine: Engine, retrieved: Retrieved, row: int, ranked: Ranked, items: list[Recommended], memory: MemoryUse
) -> None:
    """Add the explanation of one response to its items and its memory block. Popular items have no parts and no
    memories.
    """
    explanation = ranked.explanation
    if explanation is None:
        memory["gate"], memory["copying"], memory["memories"] = 0.0, 0.0, []
        for item in items:
            item["because"] = []
        return
    memory["gate"], memory["copying"] = explanation.gate, explanation.copying
    memory["log_z"] = explanation.log_z
    has_times = engine.recommender.config.rules.time_unit == "seconds"
    memories = [
        _retrieved(engine.catalogue, retrieved, row, influence, has_times) for influence in explanation.influences
    ]
    memory["memories"] = memories
    for n, (item, parts) in enumerate(zip(items, _parts(explanation), strict=True)):
        item["because"] = _because(memories, explanation, n)
        item["parts"] = parts


def _retrieved(
    catalogue: CatalogueMirror, retrieved: Retrieved, row: int, influence: Influence, has_times: bool
) -> RetrievedMemory:
    entries = retrieved.own if influence.scope == "own" else retrieved.collective
    memory: RetrievedMemory = {
        "item_id": catalogue.item_id(CatalogueNumber(int(entries.item[row, influence.entry]))),
        "scope": influence.scope,
        "similarity": float(entries.similarity[row, influence.entry]),
        "weight": influence.weight,
    }
    if influence.scope == "own" and retrieved.habits.shape[2]:
        memory["habit"] = _habit(retrieved.habits[row, influence.entry], influence.habit, has_times)
    return memory


def _habit(features: NDArray[np.float32], logit: float, has_times: bool) -> Habit:
    """The habit that the features (F,) of one memory describe; `has_times`: whether the model's data has times."""
    habit = habit_of(features)
    return {
        "count": habit.count,
        "since_s": habit.since_s if has_times else None,
        "mean_gap_s": habit.mean_gap_s,
        "at_this_hour": habit.at_this_hour,
        "on_this_day": habit.on_this_day,
        "logit": logit,
    }


def _parts(explanation: Explanation) -> list[Parts]:
    """The parts of each item's probability. An item that the model does not know is recommended by copying alone."""
    columns = (explanation.state, explanation.calibration, explanation.memories, explanation.copied)
    parts: list[Parts] = []
    for state, calibration, memories, copied in zip(*(column.tolist() for column in columns), strict=True):
        if np.isnan(state):
            parts.append({"state": None, "calibration": None, "memories": None, "copied": copied})
        else:
            parts.append({"state": state, "calibration": calibration, "memories": memories, "copied": copied})
    return parts


def _because(memories: list[RetrievedMemory], explanation: Explanation, n: int) -> list[Because]:
    """The memories that raise the log-probability of the n-th item most, through its logit or by copying."""
    pairs = zip(memories, explanation.influences, strict=True)
    strongest = sorted(pairs, key=lambda pair: -pair[1].raises(n))[:REASONS]
    return [
        {**memory, "logit": float(influence.part[n]), "copied": float(influence.copied[n])}
        for memory, influence in strongest
    ]
