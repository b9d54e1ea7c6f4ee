"""Replaying a dataset through the memory: what would each user's bank have answered before each event?

The same `Banks` that serves requests is written event by event, all users at once, one step a position; the
steps in between are where the questions are asked. Only strictly earlier events of a user are ever in the bank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model import rules as rule
from model.bank import Banks, Entries, Retrieved
from model.config import RulesConfig
from model.dataset import Dataset
from model.encoder import SequenceEncoder, StateRequests, encode_states
from model.rules import Bools, Ints


@dataclass(frozen=True)
class Replay:
    """Answers to N questions, each "before event e": event (N,) index into `dataset.items`, state (N, d) float32 of the
    user then, and the k_max best memories, to be cut by `adaptive` or to a fixed K.
    """

    event: NDArray[np.int64]
    state: NDArray[np.float32]
    retrieved: Retrieved
    rules: RulesConfig

    def take(self, rows: Ints | Bools) -> Replay:
        """Some of the questions; a mask or indices."""
        return Replay(self.event[rows], self.state[rows], self.retrieved.take(rows), self.rules)


@dataclass(frozen=True)
class Replayed:
    """The answers, and the banks as they are after the last event written."""

    replay: Replay
    banks: Banks


def adaptive(retrieved: Retrieved, rules: RulesConfig) -> Retrieved:
    """Only as many of the retrieved memories as adaptive K says."""
    return fixed(retrieved, rule.own_k(retrieved.entropy, retrieved.bank_size, rules))


def fixed(retrieved: Retrieved, k: Ints | int) -> Retrieved:
    """Only the best k memories; k (B,) or one number."""
    wanted = np.minimum(np.broadcast_to(k, retrieved.bank_size.shape), retrieved.bank_size)
    return Retrieved(retrieved.entropy, wanted, retrieved.bank_size, retrieved.own.first(wanted), retrieved.collective)


def replay(
    dataset: Dataset,
    encoder: SequenceEncoder,
    rules: RulesConfig,
    clusters: NDArray[np.int32],
    asked: Bools,
) -> Replayed:
    """Write every user's events up to their last question, asking before each event marked in `asked` (N,).

    `clusters` maps item index to item cluster.
    """
    lengths = last_question(dataset, asked)
    state = _states(dataset, encoder, lengths)
    key = rule.unit(state)
    banks = Banks(dataset.users, state.shape[1], rules)
    events, answers = [], []
    for position in range(int(lengths.max(initial=0))):
        rows = np.flatnonzero(lengths > position)
        event = dataset.offsets[rows] + position
        asking = asked[event]
        if asking.any():
            events.append(event[asking])
            answers.append(banks.retrieve(rows[asking], key[event[asking]], clusters, k=rules.k_max))
        before_last = lengths[rows] > position + 1
        rows, event = rows[before_last], event[before_last]
        banks.write(rows, dataset.items[event], key[event], dataset.times[event], dataset.ratings[event])
    event = np.concatenate(events)
    return Replayed(Replay(event, state[event], _stack(answers, rules.k_max), rules), banks)


def last_question(dataset: Dataset, asked: Bools) -> NDArray[np.int64]:
    """(users,) how many events matter: up to the last one asked about, 0 where none is."""
    reach = np.where(asked, dataset.positions() + 1, 0)
    filled = np.maximum.reduceat(reach, np.minimum(dataset.offsets[:-1], len(reach) - 1))
    return np.where(dataset.lengths() > 0, filled, 0).astype(np.int64)


def state_requests(dataset: Dataset, events: Ints) -> StateRequests:
    """The user's state just before each of `events` (R,), indices into `dataset.items`."""
    owner = dataset.owners()[events]
    starts = np.zeros(dataset.users, np.int64)
    items = dataset.items.astype(np.int64)
    return StateRequests(items, dataset.offsets, starts, owner, events - dataset.offsets[owner])


def _states(dataset: Dataset, encoder: SequenceEncoder, lengths: Ints) -> NDArray[np.float32]:
    """(N, d) state before each event that matters, by the one window rule; zero for the others."""
    needed = np.flatnonzero(dataset.positions() < lengths[dataset.owners()])
    states = np.zeros((len(dataset), encoder.config.dim), np.float32)
    states[needed] = encode_states(encoder, state_requests(dataset, needed))
    return states


def _stack(answers: list[Retrieved], width: int) -> Retrieved:
    def joined(name: str) -> Entries:
        padded = [_widen(getattr(one, name), width if name == "own" else 0) for one in answers]
        return Entries(*(np.concatenate([getattr(e, c) for e in padded]) for c in Entries.COLUMNS))

    return Retrieved(
        np.concatenate([one.entropy for one in answers]),
        np.concatenate([one.k for one in answers]),
        np.concatenate([one.bank_size for one in answers]),
        joined("own"),
        joined("collective"),
    )


def _widen(entries: Entries, width: int) -> Entries:
    missing = width - entries.item.shape[1]
    if missing <= 0:
        return entries
    return Entries(*(np.pad(getattr(entries, name), ((0, 0), (0, missing))) for name in Entries.COLUMNS))
