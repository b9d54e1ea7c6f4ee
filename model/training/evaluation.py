"""Evaluation: leave-one-out on test items, all items ranked, with and without memory.

Protocols: `unmasked` ranks all items. `masked` leaves out the items that the user had, except the target; it is not
used if users come back to items, as it would leave out possible answers. If `dataset.holdout` is "last-basket", all
items of each user's last basket are asked for before the first of them.

The own scope holds the user's own earlier events, the validation item included. The stores of the collective scope are
`train` (training interactions of others) and `live` (their validation items, too); neither holds test items. Both are
transductive: interactions of others that are later than the test item are visible. `strict`, for logs with times, is
`live` without these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset, Targets, split_of
from model.errors import RamrecError
from model.memory.retrieval import Retrieved
from model.memory.rules import collective_k, own_k, unit
from model.serving.recommender import Recommender
from model.training.fusion_stage import memory_ranks
from model.training.memory_rules import REPEATS_MATTER
from model.training.metrics import basket_summary, ndcg, relative_gain, summary
from model.training.replay import (
    MemorySpace,
    Replay,
    Replayed,
    Store,
    adaptive,
    collective,
    fixed,
    own_memories,
    replay,
    trajectory,
)

PROTOCOLS = ("unmasked", "masked")
STORES: tuple[Store, ...] = ("train", "live", "strict")
FIXED_K = (5, 10, 20)
FIXED_COLLECTIVE_K = (10, 20, 30, 50, 100)
BASELINE, MEMORY, SHUFFLED = "encoder+calibration", "memory", "shuffled"


class EvaluationError(RamrecError):
    """The run and the dataset do not fit together; the message says why."""


@dataclass(frozen=True)
class Asked:
    """The questions of all users before their test items, answered with the most memories that K allows, and the banks
    at that time.

    strangers (N,): for each question another user, whose memories are retrieved when memories are shuffled.
    """

    replayed: Replayed
    space: MemorySpace
    store: Store
    strangers: NDArray[np.int64]

    @property
    def questions(self) -> Replay:
        """The questions and their answers."""
        return self.replayed.replay


@dataclass(frozen=True)
class Variant:
    """What a ranking may use.

    memories: which are retrieved. calibrated: whether repeat bias and shift are added. repeats: whether the repeat head
    is used. stores: those of the collective scope to rank with; "none" if it uses no collective memory.
    """

    name: str
    memories: Callable[[Asked], Retrieved]
    calibrated: bool = True
    repeats: bool = True
    stores: tuple[str, ...] = ("train",)


def no_memory(asked: Asked) -> Retrieved:
    """Nothing retrieved."""
    retrieved = asked.questions.retrieved
    return Retrieved.nothing(retrieved.entropy, retrieved.bank_size)


def own_only(asked: Asked) -> Retrieved:
    """Memories of the own scope, with the adaptive K."""
    return own_memories(asked.questions)


def collective_only(asked: Asked) -> Retrieved:
    """Memories of the collective scope, with the adaptive K."""
    chosen = adaptive(asked.questions)
    return chosen.first(np.zeros_like(chosen.k), chosen.collective_k)


def both_scopes(asked: Asked) -> Retrieved:
    """Memories of both scopes, as serving retrieves them."""
    return adaptive(asked.questions)


def fixed_own(k: int) -> Callable[[Asked], Retrieved]:
    """The same K of the own scope for all users; the collective scope as usual."""

    def retrieve(asked: Asked) -> Retrieved:
        retrieved = asked.questions.retrieved
        return fixed(retrieved, k, collective_k(retrieved.entropy, asked.space.rules))

    return retrieve


def fixed_collective(k: int) -> Callable[[Asked], Retrieved]:
    """The same K of the collective scope for all users; the own scope as usual."""

    def retrieve(asked: Asked) -> Retrieved:
        retrieved = asked.questions.retrieved
        return fixed(retrieved, own_k(retrieved.entropy, retrieved.bank_size, asked.space.rules), k)

    return retrieve


def shuffled(asked: Asked) -> Retrieved:
    """Memories of other users' banks, and those that other users' questions retrieve."""
    questions = asked.questions
    right = adaptive(questions)
    banks, times = asked.replayed.banks, questions.times if asked.space.rules.activation else None
    own = banks.retrieve(asked.strangers, unit(questions.state), asked.space.clusters, now=times)
    order = np.random.default_rng(len(right.k)).permutation(len(right.k))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return replace(own, collective=right.collective.take(other), collective_k=right.collective_k)


MAIN_VARIANTS = (
    Variant("encoder", no_memory, calibrated=False, repeats=False, stores=("none",)),
    Variant(BASELINE, no_memory, repeats=False, stores=("none",)),
    Variant("own", own_only, stores=("none",)),
    Variant("collective", collective_only, stores=STORES),
    Variant(MEMORY, both_scopes, stores=STORES),
    Variant("memory-uncalibrated", both_scopes, calibrated=False),
    Variant(SHUFFLED, shuffled, stores=("train", "live")),
)
FIXED_VARIANTS = (
    *(Variant(f"own-k-{k}", fixed_own(k)) for k in FIXED_K),
    *(Variant(f"collective-k-{k}", fixed_collective(k)) for k in FIXED_COLLECTIVE_K),
)
VARIANTS = MAIN_VARIANTS + FIXED_VARIANTS


@dataclass(frozen=True)
class Tested:
    """Results of one run on the test items.

    ranks: (N,) by (variant, protocol, store). entropy, k, collective_k, bank_size (N,): what memory decided for each
    question. repeat (N,): whether the user had the item before. basket (N,): numbers, equal for the items of a basket.
    """

    ranks: dict[tuple[str, str, str], NDArray[np.int64]]
    entropy: NDArray[np.float32]
    k: NDArray[np.int64]
    collective_k: NDArray[np.int64]
    bank_size: NDArray[np.int64]
    repeat: NDArray[np.bool_]
    basket: NDArray[np.int64]


def evaluate(recommenders: Sequence[Recommender], dataset: Dataset, name: str) -> dict[str, Any]:
    """Evaluate one or several runs (seeds) on a dataset's test items; all figures are means over the runs.

    Returns:
        {"rows": [{dataset, variant, protocol, store, seeds, hr@5, …, mrr}], "gains": [{dataset, variant, protocol,
        store, over, gain, low, high}] (relative NDCG@10, 95 % paired bootstrap over users), "entropy", "k",
        "collective_k": {mean, distinct values, …}}. The store of variants without collective memories is "none".

    Raises:
        EvaluationError: a run was trained on other items.
    """
    return report([rank_test_items(recommender, dataset) for recommender in recommenders], name)


def report(tested: Sequence[Tested], name: str) -> dict[str, Any]:
    """The report of tested runs, see `evaluate`."""
    rows, gains = [], []
    for variant, protocol, store in tested[0].ranks:
        found = [run.ranks[variant, protocol, store] for run in tested]
        label = {"dataset": name, "variant": variant, "protocol": protocol, "store": store}
        figures = [_figures(ranks, run) for ranks, run in zip(found, tested, strict=True)]
        rows.append({**label, "seeds": len(tested), **_mean(figures)})
        if variant not in ("encoder", BASELINE):
            base = np.mean([ndcg(run.ranks[BASELINE, protocol, "none"]) for run in tested], axis=0)
            gain = relative_gain(np.mean([ndcg(ranks) for ranks in found], axis=0), base)
            gains.append({**label, "over": BASELINE, **gain})
    spreads = [spread_of(run) for run in tested]
    return {"rows": rows, "gains": gains, **{part: _mean([spread[part] for spread in spreads]) for part in spreads[0]}}


def _figures(ranks: NDArray[np.int64], tested: Tested) -> dict[str, float]:
    """HR, NDCG and MRR over all targets; over repeats and new items separately, if there are both; and metrics of whole
    baskets, if some hold more than one item.
    """
    figures, repeat = summary(ranks), tested.repeat
    if repeat.any() and not repeat.all():
        for name, part in (("repeat", repeat), ("explore", ~repeat)):
            of_part = summary(ranks[part])
            figures |= {f"{name}-hr@10": of_part["hr@10"], f"{name}-ndcg@10": of_part["ndcg@10"]}
        figures["repeat-share"] = float(repeat.mean())
    if len(np.unique(tested.basket)) < len(tested.basket):
        figures |= basket_summary(ranks, tested.basket)
    return figures


def rank_test_items(recommender: Recommender, dataset: Dataset, variants: Sequence[Variant] = VARIANTS) -> Tested:
    """Rank the test items with the variants of one run. Raises EvaluationError, see `evaluate`."""
    check_items(recommender, dataset)
    state = trajectory(dataset, recommender.encoder)
    protocols = PROTOCOLS[:1] if recommender.config.rules.repeat_share >= REPEATS_MATTER else PROTOCOLS
    ranks: dict[tuple[str, str, str], NDArray[np.int64]] = {}
    possible = STORES if dataset.has_times else STORES[:2]
    wanted = [store for store in possible if any(store in variant.stores for variant in variants)] or [STORES[0]]
    for store in wanted:
        asked = ask_test(recommender, dataset, store, state)
        for variant in variants:
            label = store if store in variant.stores else "none"
            if label in variant.stores and (label != "none" or store == wanted[0]):
                found = memory_ranks(
                    recommender.fusion,
                    recommender.table,
                    dataset,
                    asked.questions,
                    variant.memories(asked),
                    calibrated=variant.calibrated,
                    repeats=variant.repeats,
                )
                ranks |= {(variant.name, protocol, label): getattr(found, protocol) for protocol in protocols}
    chosen, questions = adaptive(asked.questions), asked.questions
    return Tested(
        ranks,
        chosen.entropy,
        chosen.k,
        chosen.collective_k,
        chosen.bank_size,
        repeat=dataset.is_repeat()[questions.event],
        basket=questions.before,
    )


def ask_test(recommender: Recommender, dataset: Dataset, store: Store, state: NDArray[np.float32]) -> Asked:
    """Ask for every user's memories just before their test item. state: the dataset's `trajectory`."""
    split, owner = split_of(dataset), dataset.owners()
    space = memory_space_of(recommender, dataset.item_count)
    asked = replay(dataset, state, space, Targets.of(split.test, split.test_end))
    questions = collective(dataset, state, space, asked.replay, store)
    users, place = np.unique(owner[questions.event], return_inverse=True)
    order = np.random.default_rng([recommender.config.training.seed, 5]).permutation(len(users))
    strangers = users[np.roll(order, 1)]
    return Asked(Replayed(questions, asked.banks), space, store, _without_self(users, strangers)[place])


def memory_space_of(recommender: Recommender, items: int = 0) -> MemorySpace:
    """Rules, clusters and layout of a checkpoint; unknown items up to `items` have no cluster."""
    checkpoint = recommender.checkpoint
    unknown = max(0, items - recommender.item_count)
    clusters = np.pad(checkpoint.item_clusters, (0, unknown), constant_values=-1)
    return MemorySpace(checkpoint.config.rules, clusters, checkpoint.layout)


def check_items(recommender: Recommender, dataset: Dataset) -> None:
    """Raise EvaluationError if the run was trained on other items than the dataset's."""
    if recommender.checkpoint.item_ids != dataset.item_ids:
        raise EvaluationError(
            f"the run knows {len(recommender.checkpoint.item_ids)} items, the dataset has {dataset.item_count}: "
            "evaluate on the dataset that the run was trained on"
        )


def _without_self(users: NDArray[np.int64], strangers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The strangers, with another user for whom it would be themselves; (users,) each."""
    same = users == strangers
    return np.where(same, np.roll(users, 1), strangers)


def spread_of(tested: Tested) -> dict[str, dict[str, float]]:
    """The spread of entropy and adaptive K over all users, and over the quarter with the fullest banks."""
    entropy, k = tested.entropy, tested.k
    full = tested.bank_size >= np.quantile(tested.bank_size, 0.75)
    varied = np.std(k[full]) > 0 and np.std(entropy[full]) > 0
    return {
        "entropy": {
            "mean": float(entropy.mean()),
            "std": float(entropy.std()),
            "std_at_full_bank": float(entropy[full].std()),
        },
        "k": {
            "mean": float(k.mean()),
            "distinct": float(len(np.unique(k))),
            "distinct_at_full_bank": float(len(np.unique(k[full]))),
            "correlation_with_entropy_at_full_bank": float(np.corrcoef(entropy[full], k[full])[0, 1])
            if varied
            else 0.0,
        },
        "collective_k": {
            "mean": float(tested.collective_k.mean()),
            "distinct": float(len(np.unique(tested.collective_k))),
        },
    }


def _mean(figures: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([values[key] for values in figures])) for key in figures[0]}
