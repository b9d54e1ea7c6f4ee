"""Memory fusion: the state attends to K memories, a gate decides how much they count, and items of other users'
memories may be copied.

    m_j = value(item_j) + features_j                      one token for each memory
    a_j = softmax_j(q(h)·k(m_j)/√d + similarity_j/τ)      for each head
    h_mem = Σ_j a_j·o(v(m_j))                             linear in the memories: no norm or MLP follows
    h̃ = (1 − g)·h + g·h_mem,  g = gate(h, h_mem, H, n)
    l = (h̃ + shift)·Eᵀ + repeat bias + Σ_i r_i·1[item_i]                           i over the own memories
    P = (1 − λ)·softmax(l) + λ·Σ_j c_j·1[item_j]                                   j over the collective memories

h_mem is linear, so the part of each memory in every logit can be computed exactly. So can the share of a probability
that each copy gives, and what an own memory adds to the logit of its item (`RepeatHead`).
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
from model.memory.habits import FEATURES as HABITS
from model.memory.retrieval import Entries, Retrieved

OWN, COLLECTIVE = 0.0, 1.0
GATE_START = -2.0
"""Initial bias of the gate: memory starts with little influence."""
COPY_START = -2.0
"""Initial bias of λ: copying starts with little influence."""
TINY = 1e-12
"""Lower limit of weights before a logarithm, whose slope at 0 is infinite."""
LOG_P_SCALE = 8.0
"""Scale that brings logarithms of probabilities and sizes near 1."""


@dataclass(frozen=True)
class MemoryTokens:
    """Memories as tensors. The first `own` columns are of the own scope, the others of the collective scope.

    item: (B, K) int64 item indices; 0 is an item that the model does not know.
    copied: (B, K') int64 item indices of the collective memories as retrieved; unknown items lie beyond the model's.
    features: (B, K, 5) float32, see FEATURES.
    valid: (B, K) bool.
    entropy, size: (B,) float32 of the users' banks.
    habits: (B, own, F) float32, see `habits.features`; F may be 0.
    present: (B, P) int64 item indices that the user takes at this very time; 0 is padding.
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
        """Own and collective memories of a batch side by side, on the CPU. `items`: how many items the model knows."""
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
        """The memories of some rows of the batch."""
        return MemoryTokens(*(getattr(self, column.name)[rows] for column in fields(self)))

    def to(self, device: torch.device) -> MemoryTokens:
        """The same on another device."""
        if self.item.device == device:
            return self
        return MemoryTokens(*(getattr(self, column.name).to(device) for column in fields(self)))

    @property
    def own(self) -> int:
        """How many columns are of the own scope."""
        return self.item.shape[1] - self.copied.shape[1]


def _features(entries: Entries, scope: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    columns = [getattr(entries, name) for name in MemoryTokens.FEATURES[:-1]]
    return np.stack([*columns, np.full(entries.item.shape, scope)], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class Fused:
    """Fused states: state (B, d) is h̃; gate (B, 1) is g, how much the memories count."""

    state: Tensor
    gate: Tensor


@dataclass(frozen=True)
class ProjectedItems:
    """Keys and values of every item and feature, computed ahead of requests; for serving, where weights do not change.

    items (items + 1, 2 d): a row for each item, row 0 for unknown ones; features (5, 2 d). Key and value of a memory
    are the row of its item plus its features times `features`. This is exact, as both projections are linear.
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
    """Copies of collective memories: weights (B, K') is c, rows sum to 1, or to 0 without any; share (B, 1) is λ."""

    weights: Tensor
    share: Tensor


class CopyHead(nn.Module):
    """Decides how much each collective memory is copied (c) and how much copying counts (λ).

    c_j ∝ exp(β·similarity_j + w·(quality, recency, rating, log p(item_j))). λ is computed from the best and the mean
    similarity, the concentration of c, the user's entropy and bank size, how certain the model itself is, and the
    probability that it gives to the memories' items: log Σ_j c_j·p(item_j), with c without its last term. If the odds
    of λ were proportional to that sum, P would be ∝ p·(1 + κ·c): votes among the items that the model finds plausible.
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
        """c and λ. log_p (B, K'): the model's own log-probability of each collective item, 0 for unknown items;
        repeat (B, K'): the repeat bias on each item.
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
    """Adds to the logit of an own memory's item, because users come back to items.

    What it adds is the output of a small network over the memory's habits (standardised), its similarity, the model's
    own log-probability of the item, and the user's entropy and bank size. It is 0 before training.
    Two more parameters apply without a retrieved memory: `seen` is added to all items that the user had, `present` to
    items that the user takes at this very time, as nobody comes back to what is in the same basket.
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
        """What is added to the logit of each item, (B, own); 0 without a memory and for unknown items.

        log_p (B, own): the model's log-probabilities of the items.
        """
        standard = (self.inputs(memories, log_p) - self.mean) / self.scale
        added = self.layers(functional.dropout(standard, self.dropout, self.training))[..., 0]
        known = memories.valid[:, : memories.own] & (memories.item[:, : memories.own] > 0)
        return added * known  # type: ignore[no-any-return]

    def inputs(self, memories: MemoryTokens, log_p: Tensor) -> Tensor:
        """The inputs of the network, (B, own, F + CONTEXT), not standardised."""
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
        """Take mean and standard deviation of the inputs (n, F + CONTEXT) for standardising."""
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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.shift.device

    def calibration_parameters(self) -> list[nn.Parameter]:
        """Parameters that have an effect without any memory."""
        return [self.repeat_bias, self.shift]

    def attention_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of cross-attention and gate."""
        others = (*self.calibration_parameters(), *self.copy.parameters(), *self.repeats.parameters())
        apart = {id(parameter) for parameter in others}
        return (parameter for parameter in self.parameters() if id(parameter) not in apart)

    def forward(self, state: Tensor, memories: MemoryTokens, items: Tensor | ProjectedItems) -> Fused:
        """Fuse states (B, d) with their memories. items: the item table (items + 1, d), or `project` of it."""
        if not (self.config.attention or self.training):  # in training, dropout must draw the same for any config
            return Fused(state, state.new_zeros(len(state), 1))
        weights, values = self.attend(state, memories, items)
        recalled = self.out(torch.einsum("bhk,bkhe->bhe", weights, values).flatten(1))
        gate = self._gate(state, recalled, memories)
        return Fused((1 - gate) * state + gate * recalled, gate)

    def attend(self, state: Tensor, memories: MemoryTokens, items: Tensor | ProjectedItems) -> tuple[Tensor, Tensor]:
        """Attention weights (B, heads, K) and values of the memories (B, K, heads, d / heads). Arguments: see
        `forward`.
        """
        keys, values = items(memories) if isinstance(items, ProjectedItems) else self._project(memories, items)
        batch, count, dim = values.shape
        split = (batch, count, self.config.heads, dim // self.config.heads)
        return self._attention(state, keys.reshape(split), memories), values.reshape(split)

    @torch.no_grad()
    def project(self, item_table: Tensor) -> ProjectedItems:
        """Keys and values of every item of the table (items + 1, d). They hold until the weights change."""
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
        """(B, heads, K); rows sum to 1, or to 0 without memories."""
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
        """What is added to the logits of all items that a user had, a scalar."""
        return self.repeat_bias + self.repeats.seen if self.config.repeats else self.repeat_bias

    def own_lift(self, memories: MemoryTokens, log_p: Tensor) -> Tensor:
        """What own memories add to the logits of their items, (B, own). log_p (B, own): the model's own."""
        if not self.config.repeats or memories.habits.shape[2] != len(HABITS):
            return log_p.new_zeros(log_p.shape)
        lift: Tensor = self.repeats(memories, self.visible_log_p(log_p))
        return lift

    def visible_log_p(self, log_p: Tensor) -> Tensor:
        """The log-probabilities that the repeat head is shown: zeros unless `repeat_log_p`."""
        return log_p.detach() if self.config.repeat_log_p else torch.zeros_like(log_p)

    def present_lift(self, memories: MemoryTokens) -> Tensor:
        """What is added to the logits of the items taken at this very time, (B, P); 0 for padding."""
        return self.repeats.present * ((memories.present > 0) & self.config.repeats)

    def copying(self, memories: MemoryTokens, logits: Tensor, log_z: Tensor, had: Tensor, seen_bias: Tensor) -> Copying:
        """What is copied.

        Args:
            logits, log_z: the model's own, (B, items + 1) and (B, 1).
            had: (B, items + 1) bool, items that each user had; seen_bias: what is added to their logits.
        """
        item = memories.item[:, memories.own :]
        if not item.shape[1] or not self.config.copying:
            return Copying(logits.new_zeros(item.shape), logits.new_zeros(len(logits), 1))
        own_log_p = (logits.detach().gather(1, item) - log_z.detach()).masked_fill(item == 0, 0.0)
        return self.copy(memories, own_log_p, seen_bias * had.gather(1, item))  # type: ignore[no-any-return]

    def parts(self, gate: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        """Each memory's part of the fused state, (B, K, d); with (1 − g)·h they sum to h̃. gate: of `forward`; weights
        and values: of `attend`.
        """
        weighted = weights.transpose(1, 2)[..., None] * values
        parts: Tensor = self.out(weighted.flatten(2))
        return gate[..., None] * parts
