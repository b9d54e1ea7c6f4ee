"""Objectives as pure functions of states, item table and targets.

`softmax_loss` is the full softmax over all items. It never holds all logits at once: it takes rows in tiles that stay
in the cache and computes the gradient of each tile while its softmax is there (as Liger's and Apple's fused linear
cross-entropy do). On a CPU this halves the time; its memory does not grow with the number of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TILE = 128
"""Rows of logits that are held at once."""
SAFE = 60.0
"""Largest |logit| at which exponentials and their sums stay finite in float32 without a shift."""


class _LogPartition(torch.autograd.Function):
    """log Σ_v exp(s·w_v) for each row; the forward pass computes the gradient, too."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, d) and (V, d) float32 → (N,). Products and exponentials are in `dtype`, sums in float32."""
        rows, narrow = len(states), table.to(dtype)
        transposed = narrow.t().contiguous()
        expected, total = torch.empty_like(states), states.new_empty(rows, 1)
        scaled = torch.zeros_like(table)  # the gradient for rows of equal weight, as in a mean
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
        """Every row must have the same weight, as in a mean over rows."""
        expected, scaled = ctx.saved_tensors
        return expected * gradient[:, None], scaled * gradient[0], None


def softmax_loss(states: Tensor, table: Tensor, target: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean cross-entropy of the full softmax, a scalar. states (N, d); table (V, d); target (N,): rows of the table.

    dtype: of the products with the table. bfloat16 is three times as fast on a processor with instructions for it.
    """
    partition: Tensor = _LogPartition.apply(states, table, dtype)  # type: ignore[no-untyped-call]
    return (partition - (states * table[target]).sum(dim=1)).mean()


def sampled_softmax_loss(states: Tensor, table: Tensor, target: Tensor, negatives: int) -> Tensor:
    """Mean cross-entropy against `negatives` items drawn uniformly for the whole batch, corrected by log Q; a scalar.
    states (N, d); table (V, d); target (N,).

    Each drawn item stands for V / negatives items (Bengio and Senécal 2008), so the loss estimates the full one.
    A row whose target was drawn leaves that draw out.
    """
    drawn = torch.randint(len(table), (negatives,), device=table.device)
    against = states @ table[drawn].t() + math.log(len(table) / negatives)
    against = against.masked_fill(drawn == target[:, None], -torch.inf)
    positive = (states * table[target]).sum(dim=1)
    return (torch.logsumexp(torch.cat([positive[:, None], against], dim=1), dim=1) - positive).mean()


def gbce_loss(states: Tensor, table: Tensor, target: Tensor, negatives: int, calibration: float) -> Tensor:
    """Generalised binary cross-entropy (gSASRec, Petrov and Macdonald 2023) with uniform negatives, a scalar.
    states (N, d); table (V, d); target (N,).

    calibration: t in [0, 1]. The positive probability is raised to β = α·(t·(1 − 1/α) + 1/α), α = negatives / (V − 1).
    """
    drawn = torch.randint(len(table), (negatives,), device=table.device)
    rate = negatives / max(len(table) - 1, 1)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    positive = (states * table[target]).sum(dim=1)
    against = states @ table[drawn].t()
    against = functional.softplus(against).masked_fill(drawn == target[:, None], 0.0).sum(dim=1)
    return (beta * functional.softplus(-positive) + against).mean() / (negatives + 1)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE between two views (B, d) of the same rows, others as negatives (DuoRec, Qiu et al. 2022); a scalar."""
    views = functional.normalize(torch.cat([first, second]), dim=1)
    similarity = views @ views.t() / temperature
    similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)
    partner = torch.arange(len(views), device=views.device).roll(len(first))
    return functional.cross_entropy(similarity, partner)


def smooth_ndcg_loss(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    """−mean 1/log2(1 + r), a scalar, with the smooth rank r = 1 + Σ_v σ((score_v − score_target)/temperature)
    (approxNDCG, Qin et al. 2010). scores (B, V): −inf for items that cannot be ranked; target (B,): columns of scores.

    It rewards changes at the head of the list, where recommendations are made. Likelihood does not: it gives nothing
    to a memory that moves the target from rank 15 to 8 and costs probability elsewhere.
    """
    margin = (scores - scores.gather(1, target[:, None])) / temperature
    rank = 0.5 + torch.sigmoid(margin).sum(dim=1)  # the target's own σ(0) gives the other half
    return -(1 / torch.log2(1 + rank)).mean()
