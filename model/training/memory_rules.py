"""What the memory rules learn from a log in which people come back to things: which memories are worth keeping, and
which are worth retrieving. Both are a few readable numbers of `RulesConfig`, and used by `model.memory.rules` and
`model.memory.habits` alone. See `model.training`.
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
"""Share of repeated events below which nothing is learned about coming back."""
EARLIEST = 5
"""Events of a user before the first question: with fewer there is nothing to come back to."""
RULE_QUESTIONS = 15_000
"""Questions that the rules are fitted on: each holds a whole bank."""
HALF_LIVES_D = (120.0, 60.0, 30.0, 14.0, 7.0, 4.0, 2.0, 1.0, 0.5)
"""Longest first: where several do as well, the longest stays."""
FREQUENCY_SHARES = np.linspace(0, 1, 11)
KEPT_PARTS = (10, 25)
"""Bank sizes that quality is fitted for."""
ROUNDS, RATE, DECAY = 400, 0.05, 1e-3


def measured_rules(dataset: Dataset, rules: RulesConfig) -> RulesConfig:
    """The rules with what the training part says by itself: how much repeats, and how long users stay away."""
    training = training_part(dataset)
    repeats = dataset.is_repeat()[training]
    share = float(repeats.mean()) if len(repeats) else 0.0
    gaps = np.diff(dataset.times)[training[1:] & (np.diff(dataset.owners()) == 0)]
    longest = float(np.quantile(gaps, 0.999)) if len(gaps) and dataset.has_times else 0.0
    found = {"repeat_share": round(share, 6)}
    return rules.model_copy(update=found | ({"longest_gap_s": longest} if longest > 0 else {}))


def recent_targets(dataset: Dataset, settings: TrainingConfig, most: int) -> Targets:
    """The newest training events of each user (`repeat_positions` of them), at most `most`, chosen by the seed."""
    event, end = np.arange(len(dataset)), split_of(dataset).train_end[dataset.owners()]
    near = (event < end) & (event >= end - settings.repeat_positions)
    # where whole baskets are to be found, all of a basket is asked before its first event
    before = dataset.basket_starts() if dataset.holdout == "last-basket" else event
    chosen = event[near & (dataset.positions()[before] >= EARLIEST)]
    return some_of(Targets(chosen, before[chosen]), most, settings.seed)


def some_of(targets: Targets, most: int, seed: int) -> Targets:
    """At most so many of them, in their order, chosen by the seed."""
    if len(targets) <= most:
        return targets
    return targets.take(np.sort(np.random.default_rng([seed, 6]).choice(len(targets), most, replace=False)))


def fit_rules(dataset: Dataset, state: Floats, space: MemorySpace, settings: TrainingConfig) -> RulesConfig:
    """The rules of quality and of retrieval that fit the log best. `state`: the dataset's `trajectory`."""
    rules = space.rules
    targets = recent_targets(dataset, settings, RULE_QUESTIONS)
    if rules.repeat_share < REPEATS_MATTER or not len(targets):
        return rules
    asked = replay(dataset, state, space, targets, k=rules.capacity, habits=True).replay
    hit = asked.retrieved.own.valid & (asked.retrieved.own.item == dataset.items[asked.event][:, None])
    rules = rules.model_copy(update=_quality(asked, hit, rules))
    return rules.model_copy(update={"activation": _activation(asked, hit, settings.seed)})


def _quality(asked: Replay, hit: Bools, rules: RulesConfig) -> dict[str, float]:
    """Weights of frequency and recency and the half-life under which the best entries of a bank, as many as KEPT_PARTS
    say, hold most of what users take next; the other weights keep their shares.
    """
    own = asked.retrieved.own
    told = dict(zip(FEATURES, np.moveaxis(asked.retrieved.habits, -1, 0), strict=True))
    frequency = np.exp(told["log_count"])
    age_s = (np.expm1(2 * told["log_hours_since"]) - np.expm1(2 * told["log_hours_idle"])) * HOUR_S
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
    """How often what is taken next (`hit`) is among the worthiest entries of its bank, summed over KEPT_PARTS; of
    equals it counts as the last.
    """
    there = hit.any(axis=1)
    least = np.max(np.where(hit, worth, -np.inf), axis=1, keepdims=True)
    rank = (worth >= np.where(np.isfinite(least), least, np.inf)).sum(axis=1)
    return float(sum((there & (rank <= part)).mean() for part in KEPT_PARTS))


def _activation(asked: Replay, hit: Bools, seed: int) -> dict[str, float]:
    """Weights under which the memory of what is taken next stands out in its bank: a softmax over the entries, fitted
    on the questions whose answer is in the bank. Empty where there are none.
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
