"""The sequence encoder: a causal transformer that gives the user's state after every item of a window.

State t of a window is the encoder's output over `[BOS] + items[:t]`; state 0 is the output of the BOS token alone.
Windows are padded on the right, where causal attention never looks, so padding cannot change a state.
`StateRequests` says which states are wanted; `encode_states` finds the windows (`rules.window_start`) and encodes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from model.config import EncoderConfig
from model.data.dataset import length_batches, pad_windows
from model.memory.record import EncodeJob
from model.memory.rules import Ints, window_start
from model.network.tensors import evaluating

BATCH_TOKENS = 16384
"""Positions that `encode_states` encodes at once, padding included."""
SKETCH_SEED = 0
"""Seed of the sketches. It is fixed, so that they do not depend on the seed of a run, nor draw from its generator."""


class Block(nn.Module):
    """Pre-norm transformer block with causal self-attention."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.norm_attention = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm_mlp = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim),
        )

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """(B, T, d) → (B, T, d), or (B, P, d) at the places `at` (B, P) alone."""
        normed = self.norm_attention(x)
        x = (x if at is None else _rows_at(x, at)) + self._drop(self.out(self._attend(normed, at)))
        return x + self._drop(self.mlp(self.norm_mlp(x)))

    def _attend(self, x: Tensor, at: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if at is None:
            q, k, v = self._heads(self.qkv(x), 3)
            mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            dim = x.shape[-1]
            (q,) = self._heads(functional.linear(_rows_at(x, at), self.qkv.weight[:dim], self.qkv.bias[:dim]), 1)
            k, v = self._heads(functional.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]), 2)
            before = torch.arange(x.shape[1], device=x.device) <= at[:, None, :, None]
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=before, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, projected: Tensor, parts: int) -> Tensor:
        """(B, T, parts · d) → (parts, B, heads, T, d / heads)."""
        batch, length, width = projected.shape
        shape = (batch, length, parts, self.heads, width // (parts * self.heads))
        return projected.view(shape).permute(2, 0, 3, 1, 4)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class SequenceEncoder(nn.Module):
    """Turns items into states. `items` is the number of items; index 0 is padding."""

    def __init__(self, config: EncoderConfig, items: int) -> None:
        super().__init__()
        self.config, self.item_count = config, items
        self.item = nn.Embedding(items + 1, config.dim, padding_idx=0)
        self.bos = nn.Parameter(torch.empty(config.dim))
        self.position = nn.Embedding(config.window + 1, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.skip = nn.Parameter(torch.ones(()), requires_grad=config.skip)
        drawn = torch.randn(items + 1, config.sketch, generator=torch.Generator().manual_seed(SKETCH_SEED))
        self.sketches: Tensor = nn.Buffer(functional.normalize(drawn, dim=-1))
        self.apply(self._initialise)
        nn.init.normal_(self.bos, std=0.02)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bos.device

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def forward(self, items: Tensor, at: Tensor | None = None) -> Tensor:
        """Windows of items (B, T) int64, right-padded with 0, to states (B, T + 1, d); T ≤ window.

        State t is the state after t items. States beyond a window's own length have no meaning. With `at` (B, P), only
        the states after these numbers of items are computed, (B, P, d): the last block then does a part of its work.
        """
        x = torch.cat([self.bos.expand(len(items), 1, -1), self.item(items)], dim=1)
        x = x + self.position.weight[: x.shape[1]]
        x = functional.dropout(x, self.config.dropout, self.training)
        for n, block in enumerate(self.blocks, start=1):
            x = block(x, at if n == len(self.blocks) else None)
        states = self.norm(x)
        if self.config.skip:
            taken = functional.normalize(self.item(items), dim=-1)  # the row of padding is zero
            states = functional.normalize(states, dim=-1) + self.skip * _decayed(taken, self.config.skip_decay, at)
        return self._scaled(states)

    def sketched(self, items: Tensor, at: Tensor | None = None) -> Tensor:
        """States for memory keys and queries, (B, T + 1 or P, width): `forward`, followed by the sketch of the last
        items.

        Every item has a random direction, which is stored with the weights; the sketch is the direction of their
        decayed sum. States alone bring together users of similar taste; the sketch brings together users whose last
        items are the same.
        """
        states: Tensor = self(items, at)
        if not self.config.sketch:
            return states
        sketch = _decayed(self.sketches[items], self.config.sketch_decay, at)
        return torch.cat([states, self._scaled(sketch)], dim=-1)

    def table(self) -> Tensor:
        """The item table, (items + 1, d): the logit of an item is state · row. Row 0 is padding."""
        return self._scaled(self.item.weight)

    def logits(self, states: Tensor) -> Tensor:
        """States (…, d or width) to logits of all items (…, items + 1); the logit of padding is −inf."""
        scores = states[..., : self.config.dim] @ self.table().T
        scores[..., 0] = -torch.inf
        return scores

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Vectors scaled for cosine scores: to length 1/√temperature, so that a dot product is cosine / temperature."""
        if self.config.score == "dot":
            return vectors
        return functional.normalize(vectors, dim=-1) / math.sqrt(self.config.temperature)


def _rows_at(x: Tensor, at: Tensor) -> Tensor:
    """(B, T, d) and places (B, P) → (B, P, d)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _decayed(vectors: Tensor, decay: float, at: Tensor | None = None) -> Tensor:
    """Directions of decayed sums: (B, T, e) → (B, T + 1, e), or (B, P, e) at the places `at` alone.

    At each place it is the sum of the vectors before it, where each weighs `decay` times the next one. Place 0 is zero.
    """
    length, device = vectors.shape[1], vectors.device
    places = torch.arange(length + 1, device=device) if at is None else at
    before = places[..., None] - 1 - torch.arange(length, device=device)
    weight = torch.where(before >= 0, decay ** before.clamp(min=0).float(), 0.0)
    return functional.normalize(torch.matmul(weight, vectors), dim=-1)


@dataclass(frozen=True)
class StateRequests:
    """Which states are wanted of which sequences.

    items (N,): all sequences one after another; 0 is an unknown item, which is skipped. offsets (S + 1,): where each
    sequence begins and ends. starts (S,): absolute position of each sequence's first item. rows, positions (R,): the
    sequence and the absolute position of each wanted state; position −1 is the state before any item.
    """

    items: Ints
    offsets: Ints
    starts: Ints
    rows: Ints
    positions: Ints

    @classmethod
    def of_jobs(cls, jobs: Sequence[EncodeJob]) -> StateRequests:
        """The states of each job's positions, followed by the state after its last item."""
        wanted = [np.append(job.positions, job.start + len(job.items)) for job in jobs]
        return cls(
            items=np.concatenate([job.items for job in jobs]).astype(np.int64),
            offsets=np.cumsum([0, *(len(job.items) for job in jobs)]),
            starts=np.array([job.start for job in jobs], np.int64),
            rows=np.repeat(np.arange(len(jobs)), [len(positions) for positions in wanted]),
            positions=np.concatenate(wanted).astype(np.int64),
        )


@torch.inference_mode()
def encode_states(encoder: SequenceEncoder, requests: StateRequests) -> NDArray[np.float32]:
    """The wanted states, (R, width) float32. Each window is encoded once, without dropout."""
    config = encoder.config
    begin, window_of, after = _windows(requests, config.window, config.window_stride)
    known = np.concatenate([[0], np.cumsum(requests.items > 0)])
    place = np.where(requests.positions < 0, 0, known[after] - known[begin[window_of]])
    length = np.zeros(len(begin), np.int64)
    np.maximum.at(length, window_of, place)
    compact = requests.items[requests.items > 0]
    states = np.empty((len(window_of), config.width), np.float32)
    with evaluating(encoder):
        for batch in length_batches(length + 1, BATCH_TOKENS):
            row_of = np.full(len(begin), -1)
            row_of[batch] = np.arange(len(batch))
            wanted = np.flatnonzero(row_of[window_of] >= 0)
            windows = pad_windows(compact, known[begin[batch]], length[batch])
            states[wanted] = _encode_windows(encoder, windows, row_of[window_of[wanted]], place[wanted])
    return states


def _encode_windows(
    encoder: SequenceEncoder, windows: NDArray[np.int64], row: Ints, place: Ints
) -> NDArray[np.float32]:
    """States (n, width) at `place` (n,) of the windows (B, T) numbered `row` (n,)."""
    items, column = torch.from_numpy(windows).to(encoder.device), place
    at: Tensor | None = None
    rank = _ranks(row)
    most = int(rank.max()) + 1
    if 2 * (most - 1) < windows.shape[1]:  # few places of each window: the last block computes these alone
        places = np.zeros((len(windows), most), np.int64)
        places[row, rank] = place
        at, column = torch.from_numpy(places).to(encoder.device), rank
    states: NDArray[np.float32] = encoder.sketched(items, at).cpu().numpy()[row, column]
    return states


def _ranks(groups: Ints) -> Ints:
    """(n,) how many earlier elements have the same value: 0 for the first of each group."""
    order = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[order], groups[order])
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - first
    return ranks


def _windows(requests: StateRequests, window: int, stride: int) -> tuple[Ints, Ints, Ints]:
    """The windows to encode: where each begins in `items` (W,), the window of each request (R,), and where the
    sequence of each request ends in `items` (R,).
    """
    start = requests.starts[requests.rows]
    first = np.maximum(window_start(requests.positions, window, stride), start)
    base = requests.offsets[requests.rows] - start
    before_all = requests.positions < 0
    begin = np.where(before_all, requests.offsets[requests.rows], base + first)
    after = np.where(before_all, begin, base + requests.positions)
    keys, inverse = np.unique(np.stack([requests.rows, begin]), axis=1, return_inverse=True)
    return keys[1], inverse.reshape(-1), after
