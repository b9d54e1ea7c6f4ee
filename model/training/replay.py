"""Replays a dataset through the memory: what would memory have answered before each event?

The same `Banks` that serve requests are written event by event, all users at once, position by position; questions are
asked between the writes. In the own scope, a bank holds only earlier events of its user. The collective scope searches
the banks of all other users as a store holds them: `train` (training interactions), `live` (validation items, too) or
`strict` (live, but only entries older than the event that is asked for).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.data.dataset import Dataset, Targets, split_of
from model.memory import rules as rule
from model.memory.bank import Banks
from model.memory.collective.index import CollectiveIndex
from model.memory.collective.layout import LAST, Layout, cells
from model.memory.retrieval import Entries, Retrieved
from model.memory.rules import Bools, Floats, Ints
from model.network.encoder import SequenceEncoder, StateRequests, encode_states

Store = Literal["train", "live", "strict"]
SEARCH_ROWS, PUT_ROWS = 512, 512
"""Queries searched and users put into the index at once."""
EXACT_ROWS = 64
"""Queries of an exact search at once."""


@dataclass(frozen=True)
class MemorySpace:
    """What a model defines for its memories: rules, item clusters (items + 1,) and the layout of the index."""

    rules: RulesConfig
    clusters: NDArray[np.int32]
    layout: Layout


@dataclass(frozen=True)
class Replay:
    """Answers to N questions: which event comes next?

    event (N,): the event to be predicted. before (N,): the event that the question is asked before, which is `event` or
    the first of its basket. Both are indices into `dataset.items`. times (N,): of the questions. state (N, d) float32:
    the user's state then. retrieved: the k_max best memories, to be cut by `adaptive` or to a `fixed` K.
    """

    event: NDArray[np.int64]
    before: NDArray[np.int64]
    times: NDArray[np.float64]
    state: NDArray[np.float32]
    retrieved: Retrieved
    rules: RulesConfig

    def take(self, rows: Ints | Bools | slice) -> Replay:
        """Some of the questions."""
        event, before, times = self.event[rows], self.before[rows], self.times[rows]
        return Replay(event, before, times, self.state[rows], self.retrieved.take(rows), self.rules)


@dataclass(frozen=True)
class Replayed:
    """The answers, and the banks after the last write."""

    replay: Replay
    banks: Banks


def adaptive(asked: Replay) -> Retrieved:
    """The retrieved memories cut to the adaptive K, in both scopes."""
    retrieved, rules = asked.retrieved, asked.rules
    own = rule.own_k(retrieved.entropy, retrieved.bank_size, rules)
    return fixed(retrieved, own, rule.collective_k(retrieved.entropy, rules))


def own_memories(asked: Replay) -> Retrieved:
    """As `adaptive`, without memories of others."""
    rules, retrieved = asked.rules, asked.retrieved
    return fixed(retrieved, rule.own_k(retrieved.entropy, retrieved.bank_size, rules), 0)


def fixed(retrieved: Retrieved, k: Ints | int, collective_k: Ints | int) -> Retrieved:
    """Only the best memories of each scope; k and collective_k are (B,) or one number."""
    shape = retrieved.bank_size.shape
    own = np.minimum(np.broadcast_to(k, shape), retrieved.bank_size)
    return retrieved.first(own, np.broadcast_to(np.asarray(collective_k, np.int64), shape))


def trajectory(dataset: Dataset, encoder: SequenceEncoder) -> NDArray[np.float32]:
    """(N, d) float32 the user's state just before each event of the dataset."""
    return encode_states(encoder, state_requests(dataset, np.arange(len(dataset)), encoder.item_count))


def replay(
    dataset: Dataset, state: Floats, space: MemorySpace, targets: Targets, k: int | None = None, habits: bool = False
) -> Replayed:
    """Write every user's events up to their last question, and ask the own scope before each target.

    Args:
        state: (N, d) the dataset's `trajectory`.
        k: memories to retrieve for each question; None: as many as the adaptive K may need.
        habits: whether to return features of habits; they are always returned if retrieval depends on them.
    """
    key, rules = rule.unit(state), space.rules
    asked = np.zeros(len(dataset), bool)
    asked[targets.before] = True
    lengths = last_question(dataset, asked)
    banks, opens = Banks(dataset.users, key.shape[1], rules), dataset.opens()
    width, answers, before = rules.k_max if k is None else k, [], []
    for rows, now in _steps(dataset, lengths):
        asking = asked[now]
        if asking.any():
            before.append(now[asking])
            times = dataset.times[now[asking]] if habits or rules.activation else None
            answers.append(banks.retrieve(rows[asking], key[now[asking]], space.clusters, width, times))
        before_last = now - dataset.offsets[rows] < lengths[rows] - 1
        _write(banks, dataset, key, opens, rows[before_last], now[before_last])
    asked_before: NDArray[np.int64] = np.concatenate([*before, np.zeros(0, np.int64)]).astype(np.int64)
    order = np.argsort(asked_before)
    place = order[np.searchsorted(asked_before, targets.before, sorter=order)]
    retrieved = _stack(answers, width).take(place)
    times = dataset.times[targets.before]
    return Replayed(Replay(targets.event, targets.before, times, state[targets.before], retrieved, rules), banks)


def filled(dataset: Dataset, state: Floats, space: MemorySpace, lengths: Ints) -> Banks:
    """All users' banks after their first `lengths` (users,) events. state (N, d): the dataset's `trajectory`."""
    key = rule.unit(state)
    banks, opens = Banks(dataset.users, key.shape[1], space.rules), dataset.opens()
    for rows, event in _steps(dataset, lengths):
        cell = cells(*last_items(dataset, event, 2).T)
        _write(banks, dataset, key, opens, rows, event, cell)
    return banks


def collective(dataset: Dataset, state: Floats, space: MemorySpace, asked: Replay, store: Store) -> Replay:
    """The questions, answered with the collective_k_max best memories of others that a store holds, too."""
    split = split_of(dataset)
    end = split.train_end if store == "train" else np.maximum(split.train_end, split.validation_end)
    lengths = end - dataset.offsets[:-1]
    banks, owners = filled(dataset, state, space, lengths), dataset.owners()[asked.event]
    if store == "strict":
        return _ask_older(asked, owners, asked.times, banks)
    return ask_others(asked, owners, last_items(dataset, asked.before), index_of(banks, space))


def index_of(banks: Banks, space: MemorySpace) -> CollectiveIndex:
    """A collective index of all banks; the slot of a user is their row."""
    index = CollectiveIndex(space.layout, space.rules)
    for at in range(0, len(banks), PUT_ROWS):
        rows = np.arange(at, min(at + PUT_ROWS, len(banks)))
        index.put(rows, banks.rows(rows))
    return index


def last_items(dataset: Dataset, before: Ints, count: int = LAST) -> NDArray[np.int64]:
    """(N, count) the items that each user took last before the events `before` (N,), newest first; 0 = none."""
    place = np.asarray(before)[:, None] - 1 - np.arange(count)
    own = place >= dataset.offsets[dataset.owners()[before]][:, None]
    return np.where(own, dataset.items[np.maximum(place, 0)], 0).astype(np.int64)


def ask_others(asked: Replay, owners: Ints, last: Ints, index: CollectiveIndex) -> Replay:
    """The questions, answered with the collective_k_max best memories of others, too. owners (N,): the asking users'
    slots. last (N, L): the items that they took last.
    """
    _, first, place = np.unique(
        asked.before, return_index=True, return_inverse=True
    )  # the items of a basket are one question
    queries, width = rule.unit(asked.state[first]), asked.rules.collective_k_max
    last, askers, wanted = last[first], owners[first], np.full(len(first), width)
    chunks = [slice(at, at + SEARCH_ROWS) for at in range(0, len(queries), SEARCH_ROWS)]
    parts = [_widen(index.search(queries[rows], last[rows], askers[rows], wanted[rows]), width) for rows in chunks]
    found = Entries(*(np.concatenate([getattr(part, name) for part in parts]) for name in Entries.COLUMNS))
    collective_k = np.full(len(owners), width)
    return replace(asked, retrieved=replace(asked.retrieved, collective=found.take(place), collective_k=collective_k))


def _ask_older(asked: Replay, owners: Ints, times: Floats, banks: Banks) -> Replay:
    """As `ask_others`, by exact search over the entries that are older than each question. times (N,): of questions."""
    usable = banks.valid() & (banks.fields["cell"] >= 0)
    who, slot = np.nonzero(usable)
    keys, age = banks.key[who, slot].astype(np.float32), banks.fields["time"][who, slot]
    entries, width = banks.all_entries(), asked.rules.collective_k_max
    found = []
    for at in range(0, len(owners), EXACT_ROWS):
        rows = slice(at, at + EXACT_ROWS)
        similarity = rule.unit(asked.state[rows]) @ keys.T
        similarity[(who == owners[rows, None]) | (age >= times[rows, None])] = -np.inf
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :width]
        score = np.take_along_axis(similarity, best, 1)
        valid = np.isfinite(score)
        columns = {name: getattr(entries, name)[who[best], slot[best]] for name in Entries.COLUMNS}
        columns = {name: np.where(valid, values, 0) for name, values in columns.items()}
        found.append(Entries(**columns | {"similarity": np.where(valid, score, 0).astype(np.float32), "valid": valid}))
    joined = Entries(*(np.concatenate([getattr(part, name) for part in found]) for name in Entries.COLUMNS))
    wanted = np.full(len(owners), width)
    return replace(asked, retrieved=replace(asked.retrieved, collective=joined, collective_k=wanted))


def last_question(dataset: Dataset, asked: Bools) -> NDArray[np.int64]:
    """(users,) the number of events up to and including the last one that is asked about (N,), or 0."""
    reach = np.where(asked, dataset.positions() + 1, 0)
    filled = np.maximum.reduceat(np.append(reach, 0), dataset.offsets[:-1])
    return np.where(dataset.lengths() > 0, filled, 0).astype(np.int64)


def state_requests(dataset: Dataset, events: Ints, known_items: int) -> StateRequests:
    """Requests of the user's state just before each of `events` (R,), indices into `dataset.items`. Items beyond
    `known_items` are unknown to the encoder and skipped.
    """
    owner = dataset.owners()[events]
    starts = np.zeros(dataset.users, np.int64)
    items = np.where(dataset.items > known_items, 0, dataset.items).astype(np.int64)
    return StateRequests(items, dataset.offsets, starts, owner, events - dataset.offsets[owner])


def _steps(dataset: Dataset, lengths: Ints) -> Iterator[tuple[Ints, Ints]]:
    """(users, their events) for one position after another, each with all users that have an event there."""
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    reach = -np.asarray(lengths)[longest_first]
    for position in range(int(np.max(lengths, initial=0))):
        rows = np.sort(longest_first[: np.searchsorted(reach, -position, side="left")])
        yield rows, dataset.offsets[rows] + position


def _write(
    banks: Banks, dataset: Dataset, key: Floats, opens: Bools, rows: Ints, event: Ints, cell: Ints | None = None
) -> None:
    if len(rows):
        item, time, rating = dataset.items[event], dataset.times[event], dataset.ratings[event]
        banks.write(rows, item, key[event], time, rating, cell, opens[event])


def _stack(answers: list[Retrieved], width: int) -> Retrieved:
    own = [_widen(answer.own, width) for answer in answers]
    entropy, k, size = (
        np.concatenate([getattr(answer, n) for answer in answers]) for n in ("entropy", "k", "bank_size")
    )
    joined = Entries(*(np.concatenate([getattr(entries, name) for entries in own]) for name in Entries.COLUMNS))
    habits = [np.pad(answer.habits, ((0, 0), (0, width - answer.habits.shape[1]), (0, 0))) for answer in answers]
    most = max(answer.present.shape[1] for answer in answers)
    present = [np.pad(answer.present, ((0, 0), (0, most - answer.present.shape[1]))) for answer in answers]
    return replace(
        Retrieved.nothing(entropy, size),
        k=k,
        own=joined,
        habits=np.concatenate(habits),
        present=np.concatenate(present),
    )


def _widen(entries: Entries, width: int) -> Entries:
    missing = width - entries.item.shape[1]
    if missing <= 0:
        return entries
    return Entries(*(np.pad(getattr(entries, name), ((0, 0), (0, missing))) for name in Entries.COLUMNS))
