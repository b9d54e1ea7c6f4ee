"""Why an item was recommended: exact parts of its probability.

For each returned item v, with p = P(v), and m over all memories that were retrieved:

    p·(1 − copied) = (1 − λ)·exp(state + calibration + Σ_m logit_m − log Z),    copied = Σ_m copied_m

`state` is (1 − g)·h·e, what the user's state alone gives; `calibration` is shift·e and the biases of what the user had;
logit_m is a memory's part in h̃·e, with what it adds to its own item's logit, and copied_m the share of p that is copied
from it. Both sums are exact (`model.network.fusion`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.memory.bank import Retrieved
from model.network.fusion import Copying, Fused, MemoryFusion

if TYPE_CHECKING:
    from model.serving.recommender import Query, Ranked, Recommender


@dataclass(frozen=True)
class Influence:
    """What one memory did: scope, its column in the retrieved entries, mean attention weight, its exact part (n,) in
    the logit of each returned item, and the exact share (n,) of each one's probability that is copied from it. `habit`:
    what the part of its own item holds for being what the user comes back to.
    """

    scope: Literal["own", "collective"]
    entry: int
    weight: float
    part: NDArray[np.float32]
    copied: NDArray[np.float32]
    habit: float = 0.0

    def raises(self, n: int) -> float:
        """How much the n-th item's log P owes to this memory: its part in the logit and what its copy adds."""
        return float(self.part[n] - np.log1p(-min(float(self.copied[n]), 1 - 1e-6)))


@dataclass(frozen=True)
class Explanation:
    """gate, copying (λ) in [0, 1] and log_z of one answer; state and calibration (n,) of its items, NaN for those that
    the model does not know, which are copied only; influences of all memories.
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
        return sum((one.part for one in self.influences), np.zeros_like(self.state))

    @property
    def copied(self) -> NDArray[np.float32]:
        """How much of each item's probability was copied, (n,)."""
        return sum((one.copied for one in self.influences), np.zeros_like(self.state))


class Predicted(Protocol):
    """What a prediction for B queries tells of itself; log_z (B,) or (B, 1)."""

    @property
    def fused(self) -> Fused:
        """How the states were fused."""

    @property
    def added(self) -> Tensor:
        """What own memories added to the logits of their items, (B, own)."""

    @property
    def copying(self) -> Copying:
        """What was copied."""

    @property
    def log_z(self) -> Any:
        """log Z of each query."""


@torch.inference_mode()
def explain(
    recommender: Recommender, prediction: Predicted, row: int, query: Query, retrieved: Retrieved, ranked: Ranked
) -> Explanation:
    """Explain what was ranked for one query. retrieved: what the whole batch was predicted from."""
    fusion, items, one = recommender.fusion, ranked.items, slice(row, row + 1)
    known = items <= recommender.item_count
    values = recommender.table[np.where(known, items, 0)]
    columns = ("state", "gate", "weights", "values")
    fused = Fused(*(getattr(prediction.fused, name)[one] for name in columns))
    copying = Copying(prediction.copying.weights[one], prediction.copying.share[one])
    state = (1 - fused.gate[0]) * (values @ torch.tensor(query.state[: values.shape[1]]))
    repeat = fusion.seen_bias.item() * np.isin(items, query.seen)
    if fusion.config.repeats and retrieved.habits.shape[2]:
        repeat = repeat + fusion.repeats.present.item() * np.isin(items, retrieved.present[row])
    return Explanation(
        gate=float(fused.gate[0]),
        copying=float(copying.share[0]),
        log_z=float(prediction.log_z[row]),
        state=np.where(known, state.numpy(), np.float32(np.nan)),
        calibration=np.where(known, (values @ fusion.shift).numpy() + repeat, np.nan).astype(np.float32),
        influences=_influences(fusion, values, fused, prediction.added[row], copying, retrieved.take(one), ranked),
    )


def _influences(
    fusion: MemoryFusion,
    values: Tensor,
    fused: Fused,
    added: Tensor,
    copying: Copying,
    retrieved: Retrieved,
    ranked: Ranked,
) -> list[Influence]:
    """What each memory of one query did; values (n, d): the ranked items' embeddings."""
    own, others = retrieved.own, retrieved.collective
    parts, habit = (values @ fusion.entry_parts(fused)[0].T).numpy(), added.numpy()
    parts[:, : len(habit)] += (own.item[0] == ranked.items[:, None]) * habit
    weight = fused.weights[0].mean(dim=0).tolist()
    copied = (others.item[0] == ranked.items[:, None]) * (copying.weights * copying.share)[0].numpy()
    shares = np.minimum(copied / np.exp(ranked.scores)[:, None], 1).astype(np.float32)
    width, none = own.item.shape[1], np.zeros(len(values), np.float32)
    mine = [
        Influence("own", c, weight[c], parts[:, c], none, float(habit[c]))
        for c in np.flatnonzero(own.valid[0]).tolist()
    ]
    theirs = [
        Influence("collective", c, weight[width + c], parts[:, width + c], shares[:, c])
        for c in np.flatnonzero(others.valid[0]).tolist()
    ]
    return mine + theirs
