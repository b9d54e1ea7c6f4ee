"""Memory fusion: the state asks K memories by cross-attention, a gate decides how much they count.

    m_j = value(item_j) + features_j                      one token a memory
    a_j = softmax_j(q(h)·k(m_j)/√d + similarity_j/τ)      a head at a time
    h_mem = Σ_j a_j·o(v(m_j))                             linear in the memories: no norm or MLP after it
    h̃ = (1 − g)·h + g·h_mem,  g = gate(h, h_mem, H, n)

Because h_mem is linear, each memory's part in every logit is exact. Without memories h̃ = h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.bank import Entries, Retrieved
from model.config import FusionConfig

OWN, COLLECTIVE = 0.0, 1.0
GATE_START = -2.0
"""Bias of the fresh gate: memory starts with a small say."""


@dataclass(frozen=True)
class MemoryTokens:
    """Memories as tensors: item (B, K) int64 (0 = unknown to the model), features (B, K, 5) float32 (similarity,
    quality, recency, rating, scope), valid (B, K) bool, entropy and size (B,) float32.
    """

    item: Tensor
    features: Tensor
    valid: Tensor
    entropy: Tensor
    size: Tensor

    FEATURES = ("similarity", "quality", "recency", "rating", "scope")

    @classmethod
    def of(cls, retrieved: Retrieved) -> MemoryTokens:
        """Own and collective memories of a batch side by side."""
        scopes = ((retrieved.own, OWN), (retrieved.collective, COLLECTIVE))
        return cls(
            item=torch.from_numpy(np.concatenate([entries.item for entries, _ in scopes], axis=1)),
            features=torch.from_numpy(np.concatenate([_features(*scope) for scope in scopes], axis=1)),
            valid=torch.from_numpy(np.concatenate([entries.valid for entries, _ in scopes], axis=1)),
            entropy=torch.from_numpy(retrieved.entropy.astype(np.float32)),
            size=torch.from_numpy(retrieved.bank_size.astype(np.float32)),
        )


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


class MemoryFusion(nn.Module):
    """Cross-attention over memories, the gate, and the repeat bias."""

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

    def forward(self, state: Tensor, memories: MemoryTokens, item_table: Tensor) -> Fused:
        """States (B, d) and their memories to fused states. `item_table` (items + 1, d) holds the values."""
        heads = self.config.heads
        tokens = self._tokens(memories, item_table)
        batch, count, dim = tokens.shape
        split = (batch, count, heads, dim // heads)
        values = self.value(tokens).view(split)
        weights = self._attention(state, self.key(tokens).view(split), memories)
        mixed = torch.einsum("bhk,bkhe->bhe", weights, values).reshape(batch, dim)
        recalled = self.out(mixed)
        gate = self._gate(state, recalled, memories)
        return Fused((1 - gate) * state + gate * recalled, gate, weights, values)

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
        return opening * self.config.gate_max * memories.valid.any(dim=1, keepdim=True)

    def entry_parts(self, fused: Fused) -> Tensor:
        """Each memory's share of the fused state, (B, K, d); with (1 − g)·h they add up to h̃."""
        weighted = fused.weights.transpose(1, 2)[..., None] * fused.values
        parts: Tensor = self.out(weighted.flatten(2))
        return fused.gate[..., None] * parts
