"""Objectives of the encoder as pure functions of states, item table and targets.

`softmax_loss` is the full softmax over all items. Its logits never exist as a whole: rows are taken in tiles that stay
in the cache, and the gradient of a tile is made while its softmax is at hand (as in Liger's and Apple's fused linear
cross-entropy), which on a CPU halves the time and keeps memory flat for large catalogues.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TILE = 128
"""Rows of logits that exist at a time."""
SAFE = 60.0
"""Bound on |logit| under which exponentials and their sums stay finite in float32 without shifting."""


class _LogPartition(torch.autograd.Function):
    """log Σ_v exp(s·w_v) for each row, the gradient computed on the way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, d), (V, d) float32 → (N,); products and exponentials in `dtype`, sums in float32."""
        rows, narrow = len(states), table.to(dtype)
        transposed = narrow.t().contiguous()
        expected, total = torch.empty_like(states), torch.empty(rows, 1)
        scaled = torch.zeros_like(table)  # the gradient for equal row weights; rows weigh alike in a mean
        shift = states.new_zeros(rows, 1)
        bound = float(states.norm(dim=1).max() * table.norm(dim=1).max()) if rows else 0.0
        buffer = narrow.new_empty(min(TILE, rows), len(table))
        for at in range(0, rows, TILE):
            tile = states[at : at + TILE]
            p = torch.mm(tile.to(dtype), transposed, out=buffer[: len(tile)])
            if not bound < SAFE:
                shift[at : at + TILE] = p.amax(dim=1, keepdim=True)
                p.sub_(shift[at : at + TILE])
            p.exp_()
            z = torch.sum(p, dim=1, keepdim=True, dtype=torch.float32, out=total[at : at + TILE])
            expected[at : at + TILE] = torch.mm(p, narrow)
            scaled += torch.mm(p.t(), (tile / z).to(dtype))
        ctx.save_for_backward(expected / total, scaled)
        return (total.log() + shift)[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Every row must weigh alike, as in a mean over rows."""
        expected, scaled = ctx.saved_tensors
        return expected * gradient[:, None], scaled * gradient[0], None


def softmax_loss(states: Tensor, table: Tensor, target: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean cross-entropy of the full softmax: states (N, d), table (V, d), target (N,) rows of the table → scalar.

    `dtype` is that of the products with the table: bfloat16 is three times as fast where the processor multiplies it.
    """
    partition: Tensor = _LogPartition.apply(states, table, dtype)  # type: ignore[no-untyped-call]
    return (partition - (states * table[target]).sum(dim=1)).mean()


def sampled_softmax_loss(states: Tensor, table: Tensor, target: Tensor, negatives: int) -> Tensor:
    """Cross-entropy against `negatives` items drawn uniformly for the whole batch, corrected by log Q.

    Each drawn item stands for V / negatives items (Bengio and Senécal 2008), so the loss estimates the full one;
    a row's own target is not counted twice.
    """
    drawn = torch.randint(len(table), (negatives,))
    against = states @ table[drawn].t() + math.log(len(table) / negatives)
    against = against.masked_fill(drawn == target[:, None], -torch.inf)
    positive = (states * table[target]).sum(dim=1)
    return (torch.logsumexp(torch.cat([positive[:, None], against], dim=1), dim=1) - positive).mean()


def gbce_loss(states: Tensor, table: Tensor, target: Tensor, negatives: int, calibration: float) -> Tensor:
    """Generalised binary cross-entropy (gSASRec, Petrov and Macdonald 2023) with uniform negatives.

    `calibration` t in [0, 1]: the positive probability is raised to β = α·(t·(1 − 1/α) + 1/α), α = negatives / (V − 1).
    """
    drawn = torch.randint(len(table), (negatives,))
    rate = negatives / max(len(table) - 1, 1)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    positive = (states * table[target]).sum(dim=1)
    against = states @ table[drawn].t()
    against = functional.softplus(against).masked_fill(drawn == target[:, None], 0.0).sum(dim=1)
    return (beta * functional.softplus(-positive) + against).mean() / (negatives + 1)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE between two views (B, d) of the same rows, all others as negatives (DuoRec, Qiu et al. 2022)."""
    views = functional.normalize(torch.cat([first, second]), dim=1)
    similarity = views @ views.t() / temperature
    similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    partner = torch.arange(len(views)).roll(len(first))
    return functional.cross_entropy(similarity, partner)


def smooth_ndcg_loss(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    """−mean 1/log2(1 + r) with the smooth rank r = 1 + Σ_v σ((score_v − score_target)/temperature) (approxNDCG, Qin et
    al. 2010). scores (B, V), −inf for what cannot be ranked; target (B,) columns.

    It looks where recommendations are made, at the head of the list: likelihood does not reward a memory that moves
    the target from rank 15 to 8 while it costs probability elsewhere.
    """
    margin = (scores - scores.gather(1, target[:, None])) / temperature
    rank = 0.5 + torch.sigmoid(margin).sum(dim=1)  # the target's own σ(0) is the other half
    return -(1 / torch.log2(1 + rank)).mean()
