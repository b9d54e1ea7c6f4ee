"""The sequence encoder: a causal transformer that gives the user's state after every item of a window.

State t of a window is the encoder over `[BOS] + items[:t]`; a window's first state is the BOS token's. Windows are
padded on the right, where causal attention never looks, so padding cannot change a state.
`StateRequests` turns "the state of user u at absolute position t" into windows by the one window rule.
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
from model.memory.events import EncodeJob
from model.memory.rules import Ints, window_start

BATCH_TOKENS = 16384
SKETCH_SEED = 0
"""The sketches do not depend on a run's seed, nor its training on them."""


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
        """(B, T, d) → (B, T, d), or with `at` (B, P) → (B, P, d): only what is at these places."""
        normed = self.norm_attention(x)
        x = (x if at is None else _taken(x, at)) + self._drop(self.out(self._attend(normed, at)))
        return x + self._drop(self.mlp(self.norm_mlp(x)))

    def _attend(self, x: Tensor, at: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if at is None:
            q, k, v = self._heads(self.qkv(x), 3)
            mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            dim = x.shape[-1]
            (q,) = self._heads(functional.linear(_taken(x, at), self.qkv.weight[:dim], self.qkv.bias[:dim]), 1)
            k, v = self._heads(functional.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]), 2)
            before = torch.arange(x.shape[1]) <= at[:, None, :, None]
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=before, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, projected: Tensor, parts: int) -> Tensor:
        """(B, T, parts · d) to (parts, B, heads, T, d / heads)."""
        batch, length, width = projected.shape
        shape = (batch, length, parts, self.heads, width // (parts * self.heads))
        return projected.view(shape).permute(2, 0, 3, 1, 4)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class SequenceEncoder(nn.Module):
    """Items to states. `items` is the number of items; index 0 is padding."""

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

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def forward(self, items: Tensor, at: Tensor | None = None) -> Tensor:
        """Windows of items (B, T) int64, right-padded with 0, to states (B, T + 1, d); T ≤ window. With `at` (B, P)
        only to the states after so many items, (B, P, d), for which the last block does a fraction of its work.

        State t is the one after t items; states beyond a window's own length mean nothing.
        """
        x = torch.cat([self.bos.expand(len(items), 1, -1), self.item(items)], dim=1)
        x = x + self.position.weight[: x.shape[1]]
        x = functional.dropout(x, self.config.dropout, self.training)
        for n, block in enumerate(self.blocks, start=1):
            x = block(x, at if n == len(self.blocks) else None)
        states = self.norm(x)
        if self.config.skip:
            taken = functional.normalize(self.item(items), dim=-1)  # padding is a zero row
            states = functional.normalize(states, dim=-1) + self.skip * _decayed(taken, self.config.skip_decay, at)
        return self._scaled(states)

    def sketched(self, items: Tensor, at: Tensor | None = None) -> Tensor:
        """States as memories are kept and asked by, (B, T + 1 or P, width): `forward`, then the sketch of the last
        items.

        Every item has a random direction, fixed with the weights; the sketch is that of their decayed sum. States of
        users with like tastes are close anyway; the sketch finds those who took exactly the same items last.
        """
        states: Tensor = self(items, at)
        if not self.config.sketch:
            return states
        sketch = _decayed(self.sketches[items], self.config.sketch_decay, at)
        return torch.cat([states, self._scaled(sketch)], dim=-1)

    def table(self) -> Tensor:
        """What states are scored against, (items + 1, d): a logit is state · row. Row 0 is padding."""
        return self._scaled(self.item.weight)

    def logits(self, states: Tensor) -> Tensor:
        """States (…, d or width) to a logit for every item index (…, items + 1); padding gets −inf."""
        scores = states[..., : self.config.dim] @ self.table().T
        scores[..., 0] = -torch.inf
        return scores

    def _scaled(self, vectors: Tensor) -> Tensor:
        """With cosine scores, all vectors get length 1/√temperature, so that a dot product is cosine / temperature."""
        if self.config.score == "dot":
            return vectors
        return functional.normalize(vectors, dim=-1) / math.sqrt(self.config.temperature)


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """(B, T, d) at places (B, P): (B, P, d)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _decayed(vectors: Tensor, decay: float, at: Tensor | None = None) -> Tensor:
    """(B, T, e) to (B, T + 1, e), or to (B, P, e) at places `at`: direction of the sum of the vectors before each
    place, each weighing `decay` times the one after it; zero before any.
    """
    length = vectors.shape[1]
    places = torch.arange(length + 1) if at is None else at
    before = places[..., None] - 1 - torch.arange(length)
    weight = torch.where(before >= 0, decay ** before.clamp(min=0).float(), 0.0)
    return functional.normalize(torch.matmul(weight, vectors), dim=-1)


@dataclass(frozen=True)
class StateRequests:
    """Which states are wanted of which sequences.

    items: (N,) all sequences one after another, 0 = unknown item (skipped); offsets: (S + 1,) their borders; starts:
    (S,) absolute position of each sequence's first item; rows, positions: (R,) the wanted states, position −1 =
    the state before any item.
    """

    items: Ints
    offsets: Ints
    starts: Ints
    rows: Ints
    positions: Ints

    @classmethod
    def of_jobs(cls, jobs: Sequence[EncodeJob]) -> StateRequests:
        """For each job its positions and then its end."""
        wanted = [np.append(job.positions, job.start + len(job.items)) for job in jobs]
        return cls(
            items=np.concatenate([job.items for job in jobs]).astype(np.int64),
            offsets=np.cumsum([0, *(len(job.items) for job in jobs)]),
            starts=np.array([job.start for job in jobs], np.int64),
            rows=np.repeat(np.arange(len(jobs)), [len(one) for one in wanted]),
            positions=np.concatenate(wanted).astype(np.int64),
        )


@torch.inference_mode()
def encode_states(encoder: SequenceEncoder, requests: StateRequests) -> NDArray[np.float32]:
    """The wanted states, (R, width) float32, each window encoded once. Leaves the encoder in eval mode."""
    encoder.eval()
    config = encoder.config
    begin, inverse, after = _windows(requests, config.window, config.window_stride)
    known = np.concatenate([[0], np.cumsum(requests.items > 0)])
    place = np.where(requests.positions < 0, 0, known[after] - known[begin[inverse]])
    length = np.zeros(len(begin), np.int64)
    np.maximum.at(length, inverse, place)
    compact = requests.items[requests.items > 0]
    out = np.empty((len(inverse), config.width), np.float32)
    for windows in length_batches(length + 1, BATCH_TOKENS):
        items = torch.from_numpy(pad_windows(compact, known[begin[windows]], length[windows]))
        index = np.full(len(begin), -1)
        index[windows] = np.arange(len(windows))
        mine = np.flatnonzero(index[inverse] >= 0)
        row, wanted = index[inverse[mine]], place[mine]
        nth = _ranks(row)
        if 2 * int(nth.max()) < items.shape[1]:
            at = np.zeros((len(windows), int(nth.max()) + 1), np.int64)
            at[row, nth] = wanted
            out[mine] = encoder.sketched(items, torch.from_numpy(at)).numpy()[row, nth]
        else:
            out[mine] = encoder.sketched(items).numpy()[row, wanted]
    return out


def _ranks(groups: Ints) -> Ints:
    """(n,) the how manieth of its group each one is, from 0."""
    order = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[order], groups[order])
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - first
    return ranks


def _windows(requests: StateRequests, window: int, stride: int) -> tuple[Ints, Ints, Ints]:
    """Windows needed: begin (W,) in `items`, the window of each request (R,), and where each request ends (R,)."""
    start = requests.starts[requests.rows]
    first = np.maximum(window_start(requests.positions, window, stride), start)
    base = requests.offsets[requests.rows] - start
    before_all = requests.positions < 0
    begin = np.where(before_all, requests.offsets[requests.rows], base + first)
    after = np.where(before_all, begin, base + requests.positions)
    keys, inverse = np.unique(np.stack([requests.rows, begin]), axis=1, return_inverse=True)
    return keys[1], inverse.reshape(-1), after
