"""Why an item was recommended: exact parts of its probability.

For each returned item v, with p = P(v) and m over all retrieved memories:

    p·(1 − copied) = (1 − λ)·exp(state + calibration + Σ_m logit_m − log Z),    copied = Σ_m copied_m

`state` is (1 − g)·h·e, the part of the user's state alone. `calibration` is shift·e and the biases of items that the
user had. logit_m is a memory's part in h̃·e, and what it adds to the logit of its own item. copied_m is the share of p
that is copied from the memory. Both sums are exact (`model.network.fusion`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.memory.retrieval import Retrieved
from model.network.fusion import Copying, Fused, MemoryTokens

if TYPE_CHECKING:
    from model.serving.recommender import Query, Ranked, Recommender


@dataclass(frozen=True)
class Influence:
    """What one memory did: its scope, its column in the retrieved entries, and its mean attention weight.

    part (n,): its exact part in the logit of each returned item; copied (n,): the exact share of each item's
    probability that is copied from it; habit: the portion of `part` for its own item that the repeat head gave.
    """

    scope: Literal["own", "collective"]
    entry: int
    weight: float
    part: NDArray[np.float32]
    copied: NDArray[np.float32]
    habit: float = 0.0

    def raises(self, n: int) -> float:
        """How much this memory adds to log P of the n-th item: its part in the logit, and what its copy adds."""
        return float(self.part[n] - np.log1p(-min(float(self.copied[n]), 1 - 1e-6)))


@dataclass(frozen=True)
class Explanation:
    """One answer explained: gate, copying (λ) in [0, 1], log_z, and the influences of all memories.

    state, calibration (n,): parts of each returned item's logit; NaN for items that the model does not know, which are
    only copied.
    """

    gate: float
    copying: float
    log_z: float
    state: NDArray[np.float32]
    calibration: NDArray[np.float32]
    influences: list[Influence]

    @property
    def memories(self) -> NDArray[np.float32]:
        """What all memories together add to the logit of each item, (n,)."""
        return sum((influence.part for influence in self.influences), np.zeros_like(self.state))

    @property
    def copied(self) -> NDArray[np.float32]:
        """The share of each item's probability that was copied, (n,)."""
        return sum((influence.copied for influence in self.influences), np.zeros_like(self.state))


class Predicted(Protocol):
    """What an explanation reads of a prediction for B queries."""

    @property
    def memories(self) -> MemoryTokens:
        """The memories that it was made from."""

    @property
    def fused(self) -> Fused:
        """The fused states."""

    @property
    def added(self) -> Tensor:
        """What own memories added to the logits of their items, (B, own)."""

    @property
    def copying(self) -> Copying:
        """What was copied."""

    @property
    def log_z(self) -> Any:
        """log Z of each query, (B,) or (B, 1)."""


@torch.inference_mode()
def explain(
    recommender: Recommender, prediction: Predicted, row: int, query: Query, retrieved: Retrieved, ranked: Ranked
) -> Explanation:
    """Explain the items `ranked` for one query. retrieved: the memories of the whole batch."""
    fusion, items, only = recommender.fusion, ranked.items, slice(row, row + 1)
    known = items <= recommender.item_count
    values = recommender.table[np.where(known, items, 0)]
    gate, copying = prediction.fused.gate[row], prediction.copying
    state = torch.tensor(query.state[: values.shape[1]], device=values.device)
    bias = fusion.seen_bias.item() * np.isin(items, query.seen)
    if fusion.config.repeats and retrieved.habits.shape[2]:
        bias = bias + fusion.repeats.present.item() * np.isin(items, retrieved.present[row])
    return Explanation(
        gate=float(gate),
        copying=float(copying.share[row]),
        log_z=float(prediction.log_z[row]),
        state=np.where(known, ((1 - gate) * (values @ state)).cpu().numpy(), np.float32(np.nan)),
        calibration=np.where(known, (values @ fusion.shift).cpu().numpy() + bias, np.nan).astype(np.float32),
        influences=_influences(recommender, prediction, row, state, values, retrieved.take(only), ranked),
    )


def _influences(
    recommender: Recommender,
    prediction: Predicted,
    row: int,
    state: Tensor,
    values: Tensor,
    retrieved: Retrieved,
    ranked: Ranked,
) -> list[Influence]:
    """What each memory of one query did. state (d,): the query's; values (n, d): the ranked items' rows of the item
    table; retrieved: of this query alone.
    """
    fusion, only, own, others = recommender.fusion, slice(row, row + 1), retrieved.own, retrieved.collective
    memories = prediction.memories.take(only).to(values.device)
    attention, attended = fusion.attend(state[None], memories, recommender.table)
    memory_parts = fusion.parts(prediction.fused.gate[only], attention, attended)[0]
    parts, habit = (values @ memory_parts.T).cpu().numpy(), prediction.added[row].cpu().numpy()
    parts[:, : len(habit)] += (own.item[0] == ranked.items[:, None]) * habit
    weight = attention[0].mean(dim=0).tolist()
    share = (prediction.copying.weights[row] * prediction.copying.share[row]).cpu().numpy()
    copied = (others.item[0] == ranked.items[:, None]) * share
    copied = np.minimum(copied / np.exp(ranked.scores)[:, None], 1).astype(np.float32)
    width, none = own.item.shape[1], np.zeros(len(values), np.float32)
    of_own = [
        Influence("own", column, weight[column], parts[:, column], none, float(habit[column]))
        for column in np.flatnonzero(own.valid[0]).tolist()
    ]
    of_others = [
        Influence("collective", column, weight[width + column], parts[:, width + column], copied[:, column])
        for column in np.flatnonzero(others.valid[0]).tolist()
    ]
    return of_own + of_others
