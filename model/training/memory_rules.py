"""Fits the memory rules to logs in which users come back to items: which memories are worth keeping, and which are
worth retrieving. Both are a few readable numbers in `RulesConfig`, which `model.memory.rules` and `model.memory.habits`
read.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from model.config import RulesConfig, TrainingConfig
from model.data.dataset import Dataset, Targets, split_of, training_part
from model.memory import rules as rule
from model.memory.habits import DAY_S, FEATURES, HOUR_S
from model.memory.rules import Bools, Floats
from model.training.replay import MemorySpace, Replay, replay

REPEATS_MATTER = 0.01
"""Share of repeated events below which nothing is fitted."""
EARLIEST = 5
"""Events that a user must have before the first question: with fewer there is little to come back to."""
RULE_QUESTIONS = 15_000
"""Most questions that the rules are fitted on; each holds a whole bank."""
HALF_LIVES_D = (120.0, 60.0, 30.0, 14.0, 7.0, 4.0, 2.0, 1.0, 0.5)
"""Half-lives to try, in days, longest first: among equally good ones the longest is taken."""
FREQUENCY_SHARES = np.linspace(0, 1, 11)
"""Shares to try of frequency in the weight of frequency and recency together."""
KEPT_PARTS = (10, 25)
"""Bank sizes that quality is fitted for."""
ROUNDS, RATE, DECAY = 400, 0.05, 1e-3
"""Steps, learning rate and weight decay of fitting the activation."""


def measured_rules(dataset: Dataset, rules: RulesConfig) -> RulesConfig:
    """The rules with what is measured on the training part: how often items repeat, and how long users stay away."""
    training = training_part(dataset)
    repeats = dataset.is_repeat()[training]
    share = float(repeats.mean()) if len(repeats) else 0.0
    gaps = np.diff(dataset.times)[training[1:] & (np.diff(dataset.owners()) == 0)]
    longest = float(np.quantile(gaps, 0.999)) if len(gaps) and dataset.has_times else 0.0
    found = {"repeat_share": round(share, 6)}
    return rules.model_copy(update=found | ({"longest_gap_s": longest} if longest > 0 else {}))


def recent_targets(dataset: Dataset, settings: TrainingConfig, most: int) -> Targets:
    """The newest training events of each user (`repeat_positions` of them), at most `most`, drawn by the seed."""
    event, end = np.arange(len(dataset)), split_of(dataset).train_end[dataset.owners()]
    near = (event < end) & (event >= end - settings.repeat_positions)
    # if whole baskets are predicted, all items of a basket are asked for before its first event
    before = dataset.basket_starts() if dataset.holdout == "last-basket" else event
    chosen = event[near & (dataset.positions()[before] >= EARLIEST)]
    return some_of(Targets(chosen, before[chosen]), most, settings.seed)


def some_of(targets: Targets, most: int, seed: int) -> Targets:
    """At most `most` of the targets, in their order, drawn by the seed."""
    if len(targets) <= most:
        return targets
    return targets.take(np.sort(np.random.default_rng([seed, 6]).choice(len(targets), most, replace=False)))


def fit_rules(dataset: Dataset, state: Floats, space: MemorySpace, settings: TrainingConfig) -> RulesConfig:
    """The rules of quality and retrieval that fit the log best. state: the dataset's `trajectory`."""
    rules = space.rules
    targets = recent_targets(dataset, settings, RULE_QUESTIONS)
    if rules.repeat_share < REPEATS_MATTER or not len(targets):
        return rules
    asked = replay(dataset, state, space, targets, k=rules.capacity, habits=True).replay
    hit = asked.retrieved.own.valid & (asked.retrieved.own.item == dataset.items[asked.event][:, None])
    rules = rules.model_copy(update=_quality(asked, hit, rules))
    return rules.model_copy(update={"activation": _activation(asked, hit, settings.seed)})


def _quality(asked: Replay, hit: Bools, rules: RulesConfig) -> dict[str, float]:
    """Weights of frequency and recency, and the half-life, with which the best entries of a bank (KEPT_PARTS of them)
    hold most of what users take next. Other weights keep their shares. hit (N, C): the entry that is taken next.
    """
    own = asked.retrieved.own
    habits = dict(zip(FEATURES, np.moveaxis(asked.retrieved.habits, -1, 0), strict=True))
    frequency = np.exp(habits["log_count"])
    age_s = (np.expm1(2 * habits["log_hours_since"]) - np.expm1(2 * habits["log_hours_idle"])) * HOUR_S
    timed = rules.time_unit == "seconds"
    best, found = -1.0, {}
    for half_life in HALF_LIVES_D if timed else (None,):
        recency = np.exp2(-np.maximum(age_s, 0) / (half_life * DAY_S)) if half_life else own.recency
        for share in FREQUENCY_SHARES:
            both = rules.weight_frequency + rules.weight_recency
            weights = {"weight_frequency": share * both, "weight_recency": (1 - share) * both}
            tried = rules.model_copy(update=weights)
            worth = rule.quality(frequency, recency, np.zeros_like(own.item), np.full(recency.shape, np.nan), tried)
            kept = _kept(np.where(own.valid, worth, -np.inf), hit)
            if kept > best:
                best = kept
                found = {name: round(float(weight), 4) for name, weight in weights.items()}
                found |= {"half_life_s": half_life * DAY_S} if half_life else {}
    return found


def _kept(worth: Floats, hit: Bools) -> float:
    """How often the entry taken next (`hit`) is among the best entries of its bank, summed over KEPT_PARTS. Among equal
    entries it counts as the last. worth, hit: (N, C).
    """
    in_bank = hit.any(axis=1)
    least = np.max(np.where(hit, worth, -np.inf), axis=1, keepdims=True)
    rank = (worth >= np.where(np.isfinite(least), least, np.inf)).sum(axis=1)
    return float(sum((in_bank & (rank <= part)).mean() for part in KEPT_PARTS))


def _activation(asked: Replay, hit: Bools, seed: int) -> dict[str, float]:
    """Weights of the features, by name, that make the entry taken next stand out in its bank: a softmax over entries,
    fitted on the questions whose answer is in the bank. Empty if there are none. hit (N, C): the entry taken next.
    """
    rows = np.flatnonzero(hit.any(axis=1))
    if not len(rows):
        return {}
    own = asked.retrieved.own
    inputs = np.concatenate([asked.retrieved.habits[rows], own.similarity[rows][..., None]], axis=-1)
    valid = torch.from_numpy(own.valid[rows])
    values, target = torch.from_numpy(inputs), torch.from_numpy(hit[rows].argmax(axis=1))
    known = values[valid]
    scale = known.std(dim=0).clamp(min=1e-3)
    values = (values - known.mean(dim=0)) / scale
    weights = torch.zeros(values.shape[-1], requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=RATE, weight_decay=DECAY)
    rng = np.random.default_rng([seed, 7])
    for _ in range(ROUNDS):
        batch = torch.from_numpy(rng.integers(0, len(rows), min(len(rows), 1024)))
        scores = (values[batch] @ weights).masked_fill(~valid[batch], -torch.inf)
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(scores, target[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    raw: NDArray[np.float32] = (weights.detach() / scale).numpy()
    return {name: round(float(value), 6) for name, value in zip((*FEATURES, "similarity"), raw, strict=True)}
