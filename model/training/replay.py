"""Replaying a dataset through the memory: what would memory have answered before each event?

The same `Banks` that serves requests is written event by event, all users at once, one step a position; the steps in
between are where the questions are asked. Own scope: only strictly earlier events of the user are ever in the bank.
Collective scope: the banks of all others as a store holds them, `train` (training interactions), `live` (validation
items too) or `strict` (live, but only what is older than the event asked about); the user's own entries are always
left out.
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
from model.memory.bank import Banks, Entries, Retrieved
from model.memory.collective import LAST, CollectiveIndex, Layout, cells
from model.memory.rules import Bools, Floats, Ints
from model.network.encoder import SequenceEncoder, StateRequests, encode_states

Store = Literal["train", "live", "strict"]
SEARCH_ROWS, PUT_ROWS = 512, 512
EXACT_ROWS = 64


@dataclass(frozen=True)
class MemorySpace:
    """What the memories of one model are measured by: its rules, item clusters (items + 1,) and collective index."""

    rules: RulesConfig
    clusters: NDArray[np.int32]
    layout: Layout


@dataclass(frozen=True)
class Replay:
    """Answers to N questions: what follows, asked before the event `before` (N,) at the time of the event `event` (N,)
    that is to be found (indices into `dataset.items`; one and the same, or the first of its basket); state (N, d)
    float32 of the user then, times (N,) of the questions, and the k_max best memories, to be cut by `adaptive` or to a
    fixed K.
    """

    event: NDArray[np.int64]
    before: NDArray[np.int64]
    times: NDArray[np.float64]
    state: NDArray[np.float32]
    retrieved: Retrieved
    rules: RulesConfig

    def take(self, rows: Ints | Bools | slice) -> Replay:
        """Some of the questions; a mask, indices or a slice."""
        event, before, times = self.event[rows], self.before[rows], self.times[rows]
        return Replay(event, before, times, self.state[rows], self.retrieved.take(rows), self.rules)


@dataclass(frozen=True)
class Replayed:
    """The answers, and the banks as they are after the last event written."""

    replay: Replay
    banks: Banks


def adaptive(asked: Replay) -> Retrieved:
    """Only as many of the retrieved memories as adaptive K says, in both scopes."""
    retrieved, rules = asked.retrieved, asked.rules
    own = rule.own_k(retrieved.entropy, retrieved.bank_size, rules)
    return fixed(retrieved, own, rule.collective_k(retrieved.entropy, rules))


def own_memories(asked: Replay) -> Retrieved:
    """As `adaptive`, nothing of others."""
    rules, retrieved = asked.rules, asked.retrieved
    return fixed(retrieved, rule.own_k(retrieved.entropy, retrieved.bank_size, rules), 0)


def fixed(retrieved: Retrieved, k: Ints | int, collective_k: Ints | int) -> Retrieved:
    """Only the best k memories of each scope; k (B,) or one number."""
    shape = retrieved.bank_size.shape
    own = np.minimum(np.broadcast_to(k, shape), retrieved.bank_size)
    return retrieved.first(own, np.broadcast_to(np.asarray(collective_k, np.int64), shape))


def trajectory(dataset: Dataset, encoder: SequenceEncoder) -> NDArray[np.float32]:
    """(N, d) every user's state just before each of their events, by the one window rule."""
    return encode_states(encoder, state_requests(dataset, np.arange(len(dataset)), encoder.item_count))


def replay(
    dataset: Dataset, state: Floats, space: MemorySpace, targets: Targets, k: int | None = None, habits: bool = False
) -> Replayed:
    """Write every user's events up to their last question, asking the own scope before each target. `state` (N, d) is
    the dataset's `trajectory`.

    Args:
        k: memories retrieved for each question; none: as many as adaptive K may want. habits: whether their features
            are told; they are where they decide what is retrieved.
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
    """All users' banks after their first `lengths` (users,) events."""
    key = rule.unit(state)
    banks, opens = Banks(dataset.users, key.shape[1], space.rules), dataset.opens()
    for rows, event in _steps(dataset, lengths):
        cell = cells(*last_items(dataset, event, 2).T)
        _write(banks, dataset, key, opens, rows, event, cell)
    return banks


def collective(dataset: Dataset, state: Floats, space: MemorySpace, asked: Replay, store: Store) -> Replay:
    """The questions with the collective_k_max best memories of others that a store holds."""
    split = split_of(dataset)
    end = split.train_end if store == "train" else np.maximum(split.train_end, split.validation_end)
    lengths = end - dataset.offsets[:-1]
    banks, owners = filled(dataset, state, space, lengths), dataset.owners()[asked.event]
    if store == "strict":
        return _ask_older(asked, owners, asked.times, banks)
    return ask_others(asked, owners, last_items(dataset, asked.before), index_of(banks, space))


def index_of(banks: Banks, space: MemorySpace) -> CollectiveIndex:
    """A collective index of all the banks; a user's slot is their row."""
    index = CollectiveIndex(space.layout, space.rules)
    for at in range(0, len(banks), PUT_ROWS):
        rows = np.arange(at, min(at + PUT_ROWS, len(banks)))
        index.put(rows, banks.rows(rows))
    return index


def last_items(dataset: Dataset, before: Ints, count: int = LAST) -> NDArray[np.int64]:
    """(N, count) what each user took last before the events `before` (N,), the newest first; 0 = nothing."""
    place = np.asarray(before)[:, None] - 1 - np.arange(count)
    own = place >= dataset.offsets[dataset.owners()[before]][:, None]
    return np.where(own, dataset.items[np.maximum(place, 0)], 0).astype(np.int64)


def ask_others(asked: Replay, owners: Ints, last: Ints, index: CollectiveIndex) -> Replay:
    """The questions with the collective_k_max best memories of others. owners (N,): the asking users' slots; last
    (N, L): what they took last.
    """
    _, first, place = np.unique(asked.before, return_index=True, return_inverse=True)  # a basket's are one question
    queries, width = rule.unit(asked.state[first]), asked.rules.collective_k_max
    last, askers, wanted = last[first], owners[first], np.full(len(first), width)
    chunks = [slice(at, at + SEARCH_ROWS) for at in range(0, len(queries), SEARCH_ROWS)]
    parts = [_widen(index.search(queries[rows], last[rows], askers[rows], wanted[rows]), width) for rows in chunks]
    found = Entries(*(np.concatenate([getattr(part, name) for part in parts]) for name in Entries.COLUMNS))
    collective_k = np.full(len(owners), width)
    return replace(asked, retrieved=replace(asked.retrieved, collective=found.take(place), collective_k=collective_k))


def _ask_older(asked: Replay, owners: Ints, times: Floats, banks: Banks) -> Replay:
    """As `ask_others`, by exact search over the entries older than each question's time (N,)."""
    usable = banks.valid() & (banks.fields["cell"] >= 0)
    who, slot = np.nonzero(usable)
    keys, age = banks.key[who, slot].astype(np.float32), banks.fields["time"][who, slot]
    everything, width = banks.everything(), asked.rules.collective_k_max
    found = []
    for at in range(0, len(owners), EXACT_ROWS):
        rows = slice(at, at + EXACT_ROWS)
        similarity = rule.unit(asked.state[rows]) @ keys.T
        similarity[(who == owners[rows, None]) | (age >= times[rows, None])] = -np.inf
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :width]
        score = np.take_along_axis(similarity, best, 1)
        valid = np.isfinite(score)
        columns = {name: getattr(everything, name)[who[best], slot[best]] for name in Entries.COLUMNS}
        columns = {name: np.where(valid, values, 0) for name, values in columns.items()}
        found.append(Entries(**columns | {"similarity": np.where(valid, score, 0).astype(np.float32), "valid": valid}))
    joined = Entries(*(np.concatenate([getattr(one, name) for one in found]) for name in Entries.COLUMNS))
    wanted = np.full(len(owners), width)
    return replace(asked, retrieved=replace(asked.retrieved, collective=joined, collective_k=wanted))


def last_question(dataset: Dataset, asked: Bools) -> NDArray[np.int64]:
    """(users,) how many events matter: up to the last one asked about, 0 where none is."""
    reach = np.where(asked, dataset.positions() + 1, 0)
    filled = np.maximum.reduceat(np.append(reach, 0), dataset.offsets[:-1])
    return np.where(dataset.lengths() > 0, filled, 0).astype(np.int64)


def state_requests(dataset: Dataset, events: Ints, known_items: int) -> StateRequests:
    """The user's state just before each of `events` (R,), indices into `dataset.items`. Items beyond `known_items` are
    unknown to the encoder and skipped.
    """
    owner = dataset.owners()[events]
    starts = np.zeros(dataset.users, np.int64)
    items = np.where(dataset.items > known_items, 0, dataset.items).astype(np.int64)
    return StateRequests(items, dataset.offsets, starts, owner, events - dataset.offsets[owner])


def _steps(dataset: Dataset, lengths: Ints) -> Iterator[tuple[Ints, Ints]]:
    """(users, their events) position by position, for all users that reach so far."""
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
    own = [_widen(one.own, width) for one in answers]
    entropy, k, size = (np.concatenate([getattr(one, n) for one in answers]) for n in ("entropy", "k", "bank_size"))
    joined = Entries(*(np.concatenate([getattr(one, name) for one in own]) for name in Entries.COLUMNS))
    told = [np.pad(one.habits, ((0, 0), (0, width - one.habits.shape[1]), (0, 0))) for one in answers]
    most = max(one.present.shape[1] for one in answers)
    present = [np.pad(one.present, ((0, 0), (0, most - one.present.shape[1]))) for one in answers]
    return replace(
        Retrieved.nothing(entropy, size),
        k=k,
        own=joined,
        habits=np.concatenate(told),
        present=np.concatenate(present),
    )


def _widen(entries: Entries, width: int) -> Entries:
    missing = width - entries.item.shape[1]
    if missing <= 0:
        return entries
    return Entries(*(np.pad(getattr(entries, name), ((0, 0), (0, missing))) for name in Entries.COLUMNS))
