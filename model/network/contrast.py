"""DuoRec's contrastive regularisation (Qiu et al. 2022), an option of the encoder's objective.

Two views of a window must be alike: two dropout passes of it (unsupervised), and a pass of another window that leads to
the same next item (supervised).
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
    """Draws, for a next item, windows of training users that lead to it."""

    def __init__(self, dataset: Dataset, users: NDArray[np.bool_], window: int) -> None:
        owner = dataset.owners()
        event = np.arange(len(dataset))
        inside = users[owner] & training_part(dataset) & (dataset.positions() > 0)
        order = np.argsort(dataset.items[inside], kind="stable")
        self._events = event[inside][order]
        self._edges = np.searchsorted(dataset.items[self._events], np.arange(dataset.item_count + 2))
        self._items, self._window = dataset.items, window
        self._first = dataset.offsets[:-1][owner]

    def loss(self, encoder: SequenceEncoder, targets: Tensor, rng: np.random.Generator, temperature: float) -> Tensor:
        """Both terms for windows `targets` (B, T), right-padded with 0, whose last items are the next items."""
        length = (targets > 0).sum(dim=1)
        rows = torch.arange(len(targets))
        last = targets[rows, length - 1].numpy()
        known = np.flatnonzero((length.numpy() > 1) & (self._edges[last + 1] > self._edges[last]))
        if len(known) < 2:
            return torch.zeros(())
        here, before = rows[: len(known)], length[known] - 1
        inputs = targets[known, :-1].clone()
        inputs[torch.arange(inputs.shape[1]) >= before[:, None]] = 0
        first, second = (encoder(inputs)[here, before] for _ in range(2))
        windows, reach = self._leading_to(last[known], rng)
        third = encoder(torch.from_numpy(windows))[here, torch.from_numpy(reach)]
        return contrastive_loss(first, second, temperature) + contrastive_loss(second, third, temperature)

    def _leading_to(self, item: Ints, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Windows before a random training event of each item, and their lengths."""
        low, high = self._edges[item], self._edges[item + 1]
        event = self._events[low + (rng.random(len(item)) * (high - low)).astype(np.int64)]
        begin = np.maximum(self._first[event], event - self._window)
        return pad_windows(self._items, begin, event - begin), event - begin
