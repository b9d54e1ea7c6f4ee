"""DuoRec's contrastive regularisation (Qiu et al. 2022), an optional part of the encoder's objective.

It pulls two views of a window together: two dropout passes of the same window (unsupervised), and a pass of another
window that leads to the same next item (supervised).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Dataset, pad_windows, training_part
from model.memory.rules import Ints
from model.network.encoder import SequenceEncoder
from model.network.losses import contrastive_loss


class ContrastiveViews:
    """Draws windows of training users that lead to a given next item."""

    def __init__(self, dataset: Dataset, users: NDArray[np.bool_], window: int) -> None:
        owner = dataset.owners()
        event = np.arange(len(dataset))
        inside = users[owner] & training_part(dataset) & (dataset.positions() > 0)
        order = np.argsort(dataset.items[inside], kind="stable")
        self._events = event[inside][order]
        self._edges = np.searchsorted(dataset.items[self._events], np.arange(dataset.item_count + 2))
        self._items, self._window = dataset.items, window
        self._first = dataset.offsets[:-1][owner]

    def loss(
        self, encoder: SequenceEncoder, targets: NDArray[np.int64], rng: np.random.Generator, temperature: float
    ) -> Tensor:
        """The sum of both terms, a scalar. targets (B, T): windows of items, right-padded with 0; the last item of each
        is its next item.
        """
        length = np.count_nonzero(targets, axis=1)
        last = targets[np.arange(len(targets)), length - 1]
        known = np.flatnonzero((length > 1) & (self._edges[last + 1] > self._edges[last]))
        if len(known) < 2:
            return torch.zeros((), device=encoder.device)
        before = length[known] - 1
        inputs = targets[known, :-1].copy()
        inputs[np.arange(inputs.shape[1]) >= before[:, None]] = 0
        first, second = (_last_states(encoder, inputs, before) for _ in range(2))
        third = _last_states(encoder, *self._leading_to(last[known], rng))
        return contrastive_loss(first, second, temperature) + contrastive_loss(second, third, temperature)

    def _leading_to(self, item: Ints, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The window before a random training event of each item, and the lengths of these windows."""
        low, high = self._edges[item], self._edges[item + 1]
        event = self._events[low + (rng.random(len(item)) * (high - low)).astype(np.int64)]
        begin = np.maximum(self._first[event], event - self._window)
        return pad_windows(self._items, begin, event - begin), event - begin


def _last_states(encoder: SequenceEncoder, windows: NDArray[np.int64], length: Ints) -> Tensor:
    """(B, d) the state at the end of each window (B, T), of which `length` (B,) items are real."""
    states: Tensor = encoder(torch.from_numpy(windows).to(encoder.device))
    rows = torch.arange(len(windows), device=encoder.device)
    return states[rows, torch.from_numpy(length).to(encoder.device)]
