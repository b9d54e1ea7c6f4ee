"""Memory fusion: the state asks K memories by cross-attention, a gate decides how much they count; what others took in
alike situations may be copied.

    m_j = value(item_j) + features_j                      one token a memory
    a_j = softmax_j(q(h)·k(m_j)/√d + similarity_j/τ)      a head at a time
    h_mem = Σ_j a_j·o(v(m_j))                             linear in the memories: no norm or MLP after it
    h̃ = (1 − g)·h + g·h_mem,  g = gate(h, h_mem, H, n)
    l = (h̃ + shift)·Eᵀ + repeat bias + Σ_i r_i·1[item_i]                           i over the own memories
    P = (1 − λ)·softmax(l) + λ·Σ_j c_j·1[item_j]                                   j over the collective memories

Because h_mem is linear, each memory's part in every logit is exact, and so is each copy's share of a probability; what
an own memory adds to the logit of its item (`RepeatHead`) is exact by itself.
Without memories h̃ = h and r is nothing, without collective memories λ = 0. What does not help on validation items is
not there at all (`FusionConfig.attention`, `copying`, `repeats`). Shift and repeat bias calibrate the encoder to users
that it was not trained on; they need no memories and belong to the model that memory is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import FusionConfig
from model.memory.bank import Entries, Retrieved
from model.memory.habits import FEATURES as HABITS

OWN, COLLECTIVE = 0.0, 1.0
GATE_START = -2.0
"""Bias of the fresh gate: memory starts with a small say."""
COPY_START = -2.0
"""The same for λ."""
TINY = 1e-12
"""Weights below this are taken for it where a slope at 0 would be infinite."""
LOG_P_SCALE = 8.0
"""Brings logarithms of probabilities and sizes near 1."""


@dataclass(frozen=True)
class MemoryTokens:
    """Memories as tensors: item (B, K) int64 (0 = unknown to the model), copied (B, K') int64 the items of the
    collective ones as they came (unknown ones beyond the model's items), features (B, K, 5) float32 (similarity,
    quality, recency, rating, scope), valid (B, K) bool, entropy and size (B,) float32, habits (B, own, F) float32 what
    the own ones tell (`habits.features`; F may be 0). The first `own` columns are the own scope's, the others
    collective.
    """

    item: Tensor
    copied: Tensor
    features: Tensor
    valid: Tensor
    entropy: Tensor
    size: Tensor
    habits: Tensor
    present: Tensor

    FEATURES = ("similarity", "quality", "recency", "rating", "scope")

    @classmethod
    def of(cls, retrieved: Retrieved, items: int) -> MemoryTokens:
        """Own and collective memories of a batch side by side; `items` is the number of items that the model knows."""
        scopes = ((retrieved.own, OWN), (retrieved.collective, COLLECTIVE))
        item = np.concatenate([entries.item for entries, _ in scopes], axis=1)
        return cls(
            item=torch.from_numpy(np.where(item > items, 0, item)),
            copied=torch.from_numpy(retrieved.collective.item),
            features=torch.from_numpy(np.concatenate([_features(*scope) for scope in scopes], axis=1)),
            valid=torch.from_numpy(np.concatenate([entries.valid for entries, _ in scopes], axis=1)),
            entropy=torch.from_numpy(retrieved.entropy.astype(np.float32)),
            size=torch.from_numpy(retrieved.bank_size.astype(np.float32)),
            habits=torch.from_numpy(retrieved.habits),
            present=torch.from_numpy(np.where(retrieved.present > items, 0, retrieved.present)),
        )

    def take(self, rows: slice) -> MemoryTokens:
        """Those of some of the batch."""
        return MemoryTokens(*(getattr(self, column.name)[rows] for column in fields(self)))

    @property
    def own(self) -> int:
        """Columns of the own scope."""
        return self.item.shape[1] - self.copied.shape[1]


def _features(entries: Entries, scope: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    columns = [getattr(entries, name) for name in MemoryTokens.FEATURES[:-1]]
    return np.stack([*columns, np.full(entries.item.shape, scope)], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class Fused:
    """state (B, d): h̃; gate (B, 1); weights (B, heads, K): attention; values (B, K, heads, d / heads)."""

    state: Tensor
    gate: Tensor
    weights: Tensor
    values: Tensor


@dataclass(frozen=True)
class ProjectedItems:
    """What the projections of `MemoryFusion` make of every item and feature, ahead of any request: items
    (items + 1, 2 d), row 0 the unknown item's; features (5, 2 d). A memory's key and value are its item's row plus its
    features · features: exact, as both projections are linear. For serving, where the weights stand still.
    """

    items: Tensor
    features: Tensor

    def __call__(self, memories: MemoryTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, K, d) each."""
        rows = functional.embedding(memories.item, self.items)
        both = torch.addmm(rows.flatten(0, 1), memories.features.flatten(0, 1), self.features).view_as(rows)
        keys, values = both.chunk(2, dim=-1)
        return keys, values


@dataclass(frozen=True)
class Copying:
    """What is copied from the collective memories: weights (B, K') adding up to 1 (0 without any), share (B, 1): λ."""

    weights: Tensor
    share: Tensor


class CopyHead(nn.Module):
    """How much each collective memory is copied, and how much copying counts.

    c_j ∝ exp(β·similarity_j + w·(quality, recency, rating, log p(item_j))); λ from the best and mean similarity, how
    concentrated c is, the user's entropy and bank size, how sure the model is itself, and how much probability it gives
    the memories' items: log Σ_j c_j·p(item_j), c without its last term. Were λ's odds proportional to that sum, P would
    be ∝ p·(1 + κ·c): votes for what the model finds plausible.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(math.log(config.copy_sharpness)))
        self.features = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(self.features.weight)
        nn.init.constant_(self.features.weight[0, 3:], LOG_P_SCALE / 2)
        last = nn.Linear(16, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, COPY_START)
        self.share = nn.Sequential(nn.Linear(8, 16), nn.GELU(), last)

    def forward(self, memories: MemoryTokens, log_p: Tensor, repeat: Tensor) -> Copying:
        """log_p (B, K): the model's own log-probability of each collective item, 0 where it has none; repeat (B, K):
        the repeat bias that applies to each.
        """
        valid, features = memories.valid[:, memories.own :], memories.features[:, memories.own :]
        similarity = features[..., 0]
        scaled = torch.cat([features[..., 1:4], log_p[..., None] / LOG_P_SCALE], dim=-1)
        affinity = similarity * self.sharpness.exp() + self.features(scaled)[..., 0] + repeat
        affinity = affinity.masked_fill(~valid, -1e9)
        weights = torch.softmax(affinity, dim=1).masked_fill(~valid, 0.0)
        by_vote = affinity - self.features.weight[0, 3] * scaled[..., 3]
        evidence = torch.logsumexp(torch.log_softmax(by_vote, dim=1) + log_p, dim=1).clamp(min=-3 * LOG_P_SCALE)
        return Copying(weights, self._share(memories, weights, similarity, log_p, evidence, valid))

    def _share(
        self,
        memories: MemoryTokens,
        weights: Tensor,
        similarity: Tensor,
        log_p: Tensor,
        evidence: Tensor,
        valid: Tensor,
    ) -> Tensor:
        count = valid.sum(dim=1).clamp(min=1)
        concentration = torch.special.entr(weights.clamp(min=TINY)).sum(dim=1) / math.log(100)
        context = torch.stack(
            [
                similarity.amax(dim=1),
                similarity.sum(dim=1) / count,
                concentration,
                memories.entropy,
                torch.log1p(memories.size) / LOG_P_SCALE,
                (weights * log_p).sum(dim=1) / LOG_P_SCALE,
                log_p.masked_fill(~valid, -LOG_P_SCALE).amax(dim=1) / LOG_P_SCALE,
                evidence / LOG_P_SCALE,
            ],
            dim=1,
        )
        share: Tensor = torch.sigmoid(self.share(context)) * valid.any(dim=1, keepdim=True)
        return share


class RepeatHead(nn.Module):
    """What each own memory adds to the logit of its item, for being what the user may come back to: a small network
    over its habits (standardised), its similarity, the model's own log-probability of the item, and the user's entropy
    and bank size. It starts at 0.

    Two numbers stand beside it: `seen` is added to all that the user had, retrieved or not, and `present` to what the
    user takes at this very time: nobody comes back to what is in the same basket.
    """

    CONTEXT = 4

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, hidden = len(HABITS) + self.CONTEXT, config.repeat_hidden
        self.mean: Tensor = nn.Buffer(torch.zeros(width))
        self.scale: Tensor = nn.Buffer(torch.ones(width))
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), last)
        self.seen = nn.Parameter(torch.zeros(()))
        self.present = nn.Parameter(torch.zeros(()))
        self.dropout = config.dropout

    def forward(self, memories: MemoryTokens, log_p: Tensor) -> Tensor:
        """(B, own) from the model's log-probabilities of the items (B, own); 0 where there is no memory, or its item is
        unknown to the model.
        """
        standard = (self.inputs(memories, log_p) - self.mean) / self.scale
        added = self.layers(functional.dropout(standard, self.dropout, self.training))[..., 0]
        there = memories.valid[:, : memories.own] & (memories.item[:, : memories.own] > 0)
        return added * there  # type: ignore[no-any-return]

    def inputs(self, memories: MemoryTokens, log_p: Tensor) -> Tensor:
        """What is looked at, (B, own, F + CONTEXT)."""
        shape = log_p.shape
        context = [
            memories.features[:, : memories.own, 0],
            log_p / LOG_P_SCALE,
            memories.entropy[:, None].expand(shape),
            torch.log1p(memories.size)[:, None].expand(shape) / LOG_P_SCALE,
        ]
        return torch.cat([memories.habits, torch.stack(context, dim=-1)], dim=-1)

    @torch.no_grad()
    def standardise(self, inputs: Tensor) -> None:
        """Learn mean and spread from inputs (n, F + CONTEXT)."""
        self.mean.copy_(inputs.mean(dim=0))
        self.scale.copy_(inputs.std(dim=0).clamp(min=1e-3))


class MemoryFusion(nn.Module):
    """Cross-attention over memories, the gate, the repeat bias and head, and copying."""

    def __init__(self, config: FusionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.unknown = nn.Parameter(torch.zeros(dim))
        self.features = nn.Linear(len(MemoryTokens.FEATURES), dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim, bias=False)
        gate_out = nn.Linear(dim, 1)
        nn.init.constant_(gate_out.bias, GATE_START)
        self.gate = nn.Sequential(nn.Linear(2 * dim + 2, dim), nn.GELU(), gate_out)
        self.repeat_bias = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(dim))
        self.copy = CopyHead(config)
        self.repeats = RepeatHead(config)

    def calibration(self) -> list[nn.Parameter]:
        """Parameters that work without any memory."""
        return [self.repeat_bias, self.shift]

    def attention(self) -> Iterator[nn.Parameter]:
        """Parameters of cross-attention and gate."""
        apart = {id(one) for one in (*self.calibration(), *self.copy.parameters(), *self.repeats.parameters())}
        return (one for one in self.parameters() if id(one) not in apart)

    def forward(self, state: Tensor, memories: MemoryTokens, items: Tensor | ProjectedItems) -> Fused:
        """States (B, d) and their memories to fused states. items: the values (items + 1, d), or `project(values)`."""
        heads = self.config.heads
        keys, values = items(memories) if isinstance(items, ProjectedItems) else self._project(memories, items)
        batch, count, dim = values.shape
        split = (batch, count, heads, dim // heads)
        values = values.reshape(split)
        weights = self._attention(state, keys.reshape(split), memories)
        mixed = torch.einsum("bhk,bkhe->bhe", weights, values).reshape(batch, dim)
        recalled = self.out(mixed)
        gate = self._gate(state, recalled, memories)
        return Fused((1 - gate) * state + gate * recalled, gate, weights, values)

    @torch.no_grad()
    def project(self, item_table: Tensor) -> ProjectedItems:
        """Keys and values of every item of the table (items + 1, d), for as long as the weights stand still."""
        known = torch.cat([self.unknown[None], item_table[1:]]) + self.features.bias
        both = (self.key, self.value)
        items = torch.cat([part(known) for part in both], dim=1)
        features = torch.cat([self.features.weight.T @ part.weight.T for part in both], dim=1)
        return ProjectedItems(items, features.contiguous())

    def _project(self, memories: MemoryTokens, item_table: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(memories, item_table)
        return self.key(tokens), self.value(tokens)

    def _tokens(self, memories: MemoryTokens, item_table: Tensor) -> Tensor:
        value = item_table[memories.item]
        value = torch.where((memories.item == 0)[..., None], self.unknown, value)
        tokens: Tensor = value + self.features(memories.features)
        return functional.dropout(tokens, self.config.dropout, self.training)

    def _attention(self, state: Tensor, keys: Tensor, memories: MemoryTokens) -> Tensor:
        """(B, heads, K), rows sum to 1, or to 0 where there is no memory."""
        query = self.query(state).view(len(state), self.config.heads, -1)
        affinity = torch.einsum("bhe,bkhe->bhk", query, keys) / math.sqrt(keys.shape[-1])
        affinity = affinity + (memories.features[..., 0] / self.config.temperature)[:, None]
        hidden = ~memories.valid[:, None]
        weights = torch.softmax(affinity.masked_fill(hidden, -1e9), dim=-1)
        return weights.masked_fill(hidden, 0.0)

    def _gate(self, state: Tensor, recalled: Tensor, memories: MemoryTokens) -> Tensor:
        context = torch.stack([memories.entropy, torch.log1p(memories.size)], dim=1)
        opening = torch.sigmoid(self.gate(torch.cat([state, recalled, context], dim=1)))
        limit = self.config.gate_max if self.config.attention else 0.0
        return opening * limit * memories.valid.any(dim=1, keepdim=True)

    @property
    def seen_bias(self) -> Tensor:
        """What is added to the logits of all items that a user had."""
        return self.repeat_bias + self.repeats.seen if self.config.repeats else self.repeat_bias

    def coming_back(self, memories: MemoryTokens, log_p: Tensor) -> Tensor:
        """What own memories add to the logits of their items, (B, own). log_p (B, own): the model's own."""
        if not self.config.repeats or memories.habits.shape[2] != len(HABITS):
            return log_p.new_zeros(log_p.shape)
        added: Tensor = self.repeats(memories, self.looked_at(log_p))
        return added

    def looked_at(self, log_p: Tensor) -> Tensor:
        """The model's log-probabilities as the repeat head sees them: 0 where it is not to look (`repeat_log_p`)."""
        return log_p.detach() if self.config.repeat_log_p else torch.zeros_like(log_p)

    def at_once(self, memories: MemoryTokens) -> Tensor:
        """What is added to the logits of the items that are taken at this very time, (B, P); 0 for padding."""
        return self.repeats.present * ((memories.present > 0) & self.config.repeats)

    def copying(self, memories: MemoryTokens, logits: Tensor, log_z: Tensor, seen: Tensor) -> Copying:
        """What is copied. logits (B, items + 1) and log_z (B, 1): the model's own; seen (B, items + 1) bool: items that
        each user had.
        """
        item = memories.item[:, memories.own :]
        if not item.shape[1] or not self.config.copying:
            return Copying(logits.new_zeros(item.shape), logits.new_zeros(len(logits), 1))
        own_log_p = (logits.detach().gather(1, item) - log_z.detach()).masked_fill(item == 0, 0.0)
        return self.copy(memories, own_log_p, self.seen_bias * seen.gather(1, item))  # type: ignore[no-any-return]

    def entry_parts(self, fused: Fused) -> Tensor:
        """Each memory's share of the fused state, (B, K, d); with (1 − g)·h they add up to h̃."""
        weighted = fused.weights.transpose(1, 2)[..., None] * fused.values
        parts: Tensor = self.out(weighted.flatten(2))
        return fused.gate[..., None] * parts
