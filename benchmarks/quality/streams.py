"""No forgetting, measured: what live memory gives a frozen model, against training it anew.

over_time   ML-100K by the clock: trained on the first 70 % of the interactions, the rest streamed, predict then ingest
new_users   trained on a random 80 % of the users, the other 20 % arrive through the memory alone
new_items   5 % of the items are kept out of training entirely; can they be recommended through the memory?

All go through `model.memory`, as serving does. Trainings are kept in the run folder and reused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.config import Config
from model.data.dataset import Dataset, Targets, split_of
from model.memory.bank import Banks
from model.memory.collective.layout import cells
from model.memory.retrieval import Retrieved
from model.memory.rules import unit
from model.serving.recommender import Recommender
from model.training.evaluation import ask_test, both_scopes, memory_space_of
from model.training.fusion_stage import memory_ranks
from model.training.metrics import summary
from model.training.optimisation import Epoch
from model.training.replay import Replay, adaptive, ask_others, index_of, last_items, replay, trajectory
from model.training.train import train

CHUNK = 0.01
"""Share of all interactions that is predicted before it is ingested."""
RETRAIN = 0.05
TRAINED = 0.70


def quiet(epoch: Epoch) -> None:
    print(f"  {epoch.stage} {epoch.epoch}/{epoch.of} NDCG@10 {epoch.validation['ndcg@10']:.4f}", flush=True)


def restricted(dataset: Dataset, keep: np.ndarray) -> Dataset:
    """Only some of the interactions (N,) bool; users without any are gone, items keep their numbers."""
    count = np.bincount(dataset.owners()[keep], minlength=dataset.users)
    return replace(
        dataset,
        user_ids=tuple(np.array(dataset.user_ids, object)[count > 0]),
        offsets=np.concatenate([[0], np.cumsum(count[count > 0])]),
        items=dataset.items[keep],
        times=dataset.times[keep],
        ratings=dataset.ratings[keep],
    )


def trained(dataset: Dataset, config: Config, folder: Path) -> Recommender:
    """The run in a folder, trained first if it is not there."""
    if not (folder / "checkpoint.json").exists():
        train(dataset, config, folder, quiet)
    return Recommender.load(folder)


# ------------------------------------------------------------------------------------------------- over time


def over_time(dataset: Dataset, config: Config, folder: Path) -> dict[str, Any]:
    """Metrics of every 5 % of the stream: the frozen model without and with live memory, and retrained."""
    order = np.argsort(dataset.times, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    cut = int(TRAINED * len(order))
    recommender = trained(restricted(dataset, rank < cut), config, folder / "frozen")
    state = trajectory(dataset, recommender.encoder)
    stream = np.sort(order[cut:])
    own = _own_answers(dataset, state, recommender, rank >= cut)
    bucket = (rank[stream] - cut) * int((1 - TRAINED) / RETRAIN + 0.5) // (len(order) - cut)
    found = {
        "frozen model, nothing since": _frozen_ranks(dataset, recommender, state, own, rank, cut),
        "frozen model, live sequences": _ranks(dataset, recommender, own, nothing(own)),
        "frozen model, live memory": _live_ranks(dataset, recommender, state, own, rank, cut),
        "retrained every 5 %, live sequences": _retrained_ranks(dataset, config, folder, own, rank, bucket),
    }
    curves = {name: [summary(ranks[bucket == n]) for n in range(bucket.max() + 1)] for name, ranks in found.items()}
    totals = {name: summary(ranks) for name, ranks in found.items()}
    return {"curves": curves, "totals": totals, "closed": _closed(totals), "events": len(stream)}


def _closed(totals: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """Share of the gap between frozen and retrained that live memory closes, for both meanings of frozen."""
    nothing_since, live_sequences, memory, retrained = totals
    return {
        f"{frozen} ({metric})": gap_closed(totals[frozen][metric], totals[memory][metric], totals[retrained][metric])
        for frozen in (nothing_since, live_sequences)
        for metric in ("hr@10", "ndcg@10")
    }


def gap_closed(frozen: float, live: float, retrained: float) -> float | None:
    """Share of the way from frozen to retrained; None where retraining does not help."""
    return (live - frozen) / (retrained - frozen) if retrained > frozen else None


def nothing(asked: Replay) -> Retrieved:
    return Retrieved.nothing(asked.retrieved.entropy, asked.retrieved.bank_size)


def _ranks(dataset: Dataset, recommender: Recommender, asked: Replay, memories: Retrieved) -> np.ndarray:
    return memory_ranks(recommender.fusion, recommender.table, dataset, asked, memories).masked


def _own_answers(dataset: Dataset, state: np.ndarray, recommender: Recommender, asked: np.ndarray) -> Replay:
    """Own-scope answers before each asked event, in order of the events."""
    event = np.flatnonzero(asked)
    return replay(dataset, state, memory_space_of(recommender), Targets(event, event)).replay


def _frozen_ranks(
    dataset: Dataset, recommender: Recommender, state: np.ndarray, own: Replay, rank: np.ndarray, cut: int
) -> np.ndarray:
    """As if nothing had happened since the training: every user's state is the one at the cut."""
    first = dataset.offsets[dataset.owners()[own.event]]
    known = np.array([np.count_nonzero(rank[start:event] < cut) for start, event in zip(first, own.event, strict=True)])
    return _ranks(dataset, recommender, replace(own, state=state[first + known]), nothing(own))


def _live_ranks(
    dataset: Dataset, recommender: Recommender, state: np.ndarray, own: Replay, rank: np.ndarray, cut: int
) -> np.ndarray:
    """Own memory up to the event; collective memory up to the last chunk, updated chunk by chunk."""
    space, owner, key = memory_space_of(recommender), dataset.owners(), unit(state)
    banks = Banks(dataset.users, key.shape[1], space.rules)
    _ingest(banks, dataset, key, np.flatnonzero(rank < cut))
    index = index_of(banks, space)
    found = np.zeros(len(own.event), np.int64)
    for low in range(cut, len(rank), int(CHUNK * len(rank))):
        high = min(len(rank), low + int(CHUNK * len(rank)))
        rows = np.flatnonzero((rank[own.event] >= low) & (rank[own.event] < high))
        asked = own.take(rows)
        asked = ask_others(asked, owner[asked.event], last_items(dataset, asked.before), index)
        found[rows] = _ranks(dataset, recommender, asked, adaptive(asked))
        changed = _ingest(banks, dataset, key, asked.event)
        index.put(changed, banks.rows(changed))
    return found


def _ingest(banks: Banks, dataset: Dataset, key: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Write events, the first of each user, then the second, and so on; returns the users."""
    owner, opens = dataset.owners(), dataset.opens()
    for step in _rounds(owner[events], events):
        cell = cells(*last_items(dataset, step, 2).T)
        item, time, rating = dataset.items[step], dataset.times[step], dataset.ratings[step]
        banks.write(owner[step], item, key[step], time, rating, cell, opens[step])
    return np.unique(owner[events])


def _rounds(owner: np.ndarray, events: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], owner[order], side="left")
    nth = np.arange(len(order)) - starts
    for n in range(int(nth.max(initial=-1)) + 1):
        yield events[order[nth == n]]


def _retrained_ranks(
    dataset: Dataset, config: Config, folder: Path, own: Replay, rank: np.ndarray, bucket: np.ndarray
) -> np.ndarray:
    """Before every bucket an encoder is trained on all that came before it; no memory."""
    found = np.zeros(len(own.event), np.int64)
    few = {"fusion_max_epochs": 1, "repeat_max_epochs": 1}  # its memory is not asked
    settings = config.training.model_copy(update=few)
    encoder_only = config.model_copy(update={"training": settings})
    for n in range(bucket.max() + 1):
        rows = np.flatnonzero(bucket == n)
        past = restricted(dataset, rank < rank[own.event[rows]].min())
        recommender = trained(past, encoder_only, folder / f"retrained-{n}")
        asked = own.take(rows)
        asked = replace(asked, state=trajectory(dataset, recommender.encoder)[asked.event])
        found[rows] = _ranks(dataset, recommender, asked, nothing(asked))
    return found


# ------------------------------------------------------------------------------------------------- new users


def new_users(dataset: Dataset, config: Config, folder: Path, whole: Recommender) -> dict[str, Any]:
    """Test items of the 20 % of users that training never saw. `whole` was trained on everybody."""
    known = np.random.default_rng(7).random(dataset.users) < 0.8
    recommender = trained(restricted(dataset, known[dataset.owners()]), config, folder / "most-users")
    split = split_of(dataset)
    new = ~known & (split.test >= 0)
    found = {}
    for name, model in (("frozen", recommender), ("retrained", whole)):
        asked = ask_test(model, dataset, "live", trajectory(dataset, model.encoder))
        rows = new[dataset.owners()[asked.questions.event]]
        questions = asked.questions.take(rows)
        found[f"{name}, no memory"] = summary(_ranks(dataset, model, questions, nothing(questions)))
        found[f"{name}, live memory"] = summary(_ranks(dataset, model, questions, both_scopes(asked).take(rows)))
    frozen, live = found["frozen, no memory"], found["frozen, live memory"]
    anew = found["retrained, no memory"]
    closed = {metric: gap_closed(frozen[metric], live[metric], anew[metric]) for metric in ("hr@10", "ndcg@10")}
    return {"rows": found, "closed": closed, "users": int(new.sum())}


# ------------------------------------------------------------------------------------------------- new items


def new_items(dataset: Dataset, config: Config, folder: Path) -> dict[str, Any]:
    """Test items among the 5 % that the model has never seen, and among the others."""
    order = np.random.default_rng(9).permutation(dataset.item_count) + 1
    count = int(0.05 * dataset.item_count)
    renumbered = np.zeros(dataset.item_count + 1, np.int32)
    renumbered[order] = np.roll(np.arange(dataset.item_count), count) + 1  # the first `count` get the last numbers
    ids = [""] * dataset.item_count
    for old, new in enumerate(renumbered[1:]):
        ids[new - 1] = dataset.item_ids[old]
    everything = replace(dataset, items=renumbered[dataset.items], item_ids=tuple(ids))
    known = dataset.item_count - count
    seen = restricted(everything, everything.items <= known)
    recommender = trained(replace(seen, item_ids=tuple(ids[:known])), config, folder / "most-items")
    asked = ask_test(recommender, everything, "live", trajectory(everything, recommender.encoder))
    questions = asked.questions
    unseen = everything.items[questions.event] > known
    memories, without = both_scopes(asked), nothing(questions)
    return {
        "targets": int(unseen.sum()),
        "new items, no memory": summary(_ranks(everything, recommender, questions.take(unseen), without.take(unseen))),
        "new items, live memory": summary(
            _ranks(everything, recommender, questions.take(unseen), memories.take(unseen))
        ),
        "known items, no memory": summary(
            _ranks(everything, recommender, questions.take(~unseen), without.take(~unseen))
        ),
        "known items, live memory": summary(
            _ranks(everything, recommender, questions.take(~unseen), memories.take(~unseen))
        ),
    }
