"""Prediction for catalogues that are too large to score every item: only items that may be recommended are scored.

These are the items that the index finds nearest to the fused state, and the items whose probability repeat bias or
copies may raise: those that the user had and those in memories of others. Their scores are exact except for log Z,
which the index estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.memory.rules import Bools, Ints
from model.network.fusion import Copying, Fused, MemoryFusion, MemoryTokens
from model.network.tensors import CPU

if TYPE_CHECKING:
    from model.serving.item_index import ItemTableIndex
    from model.serving.recommender import Query

EXACT_ITEMS = 100_000
"""Number of items up to which all are scored: up to this size it takes no longer than a search of the index."""
FETCH = 2000
"""Items fetched for each query."""
WIDER, FETCH_LIMIT = 4, 32_000
"""If too few of the fetched items are permitted, WIDER times as many are fetched, up to FETCH_LIMIT."""
SCORED = 16_384
"""If at most this many items are permitted, all of them are scored and the index is not searched."""


@dataclass(frozen=True)
class Shortlist:
    """P as in `Prediction`, for the items that are asked for. On the CPU, except `fused`.

    directions (B, d): their products with the item table are the logits without the repeat bias. near (B, n): the items
    that the index found, best first. seen: the items that each user had, ascending. log_z (B,). memories: what the
    prediction was made from; fused, added (B, own), present_lift (B, P) and copying: its parts.
    """

    index: ItemTableIndex
    directions: NDArray[np.float32]
    near: NDArray[np.int64]
    seen: Sequence[Ints]
    log_z: NDArray[np.float32]
    repeat_bias: float
    memories: MemoryTokens
    fused: Fused
    added: Tensor
    present_lift: Tensor
    copying: Copying

    def best(self, row: int, query: Query) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `top_n` permitted items with the largest scores, best first, and the scores. Ties: lower index first."""
        most = max([self.index.items, *self.memories.copied[row].tolist()])
        items = self._pool(row, query.top_n, permitted(query, most + 1))
        scores = self.scores(row, items)
        order = np.argsort(-scores, kind="stable")
        order = order[np.isfinite(scores[order])][: query.top_n]
        return items[order], scores[order]

    def scores(self, row: int, items: Ints) -> NDArray[np.float32]:
        """log P (n,) of items (n,), ascending, for one query; −inf for unknown items that are not copied."""
        known, share = items <= self.index.items, self.copying.share[row].numpy()
        logits = self.index.logits(self.directions[row], np.where(known, items, 0))
        logits += np.float32(self.repeat_bias) * np.isin(items, self.seen[row])
        logits += _at(items, self.memories.item[row, : self.memories.own].numpy(), self.added[row].numpy())
        logits += _at(items, self.memories.present[row].numpy(), self.present_lift[row].numpy())
        model = np.where(known, logits - self.log_z[row] + np.log1p(-share), -np.inf)
        with np.errstate(divide="ignore"):
            copied = np.log(self._copied(row, items) * share)
            scores: NDArray[np.float32] = np.logaddexp(model, copied).astype(np.float32)
        return scores

    def _copied(self, row: int, items: Ints) -> NDArray[np.float32]:
        """The share (n,) of the copies that each item has."""
        return _at(items, self.memories.copied[row].numpy(), self.copying.weights[row].numpy())

    def _pool(self, row: int, top_n: int, may: Bools) -> NDArray[np.int64]:
        """Permitted items, ascending, among them the best `top_n`. may (items + 1 or more,): which are permitted."""
        near = self.near[row]
        if np.count_nonzero(may) <= SCORED:
            return np.flatnonzero(may)
        while not self._suffices(row, near, top_n, may):
            if len(near) * WIDER > FETCH_LIMIT:
                return np.flatnonzero(may)
            near = self.index.nearest(self.directions[row : row + 1], len(near) * WIDER)[0][0]
        named = (self.seen[row], self.memories.item[row, : self.memories.own], self.memories.copied[row])
        items: NDArray[np.int64] = np.unique(np.concatenate([near, *map(np.asarray, named)]))
        return items[may[items]]

    def _suffices(self, row: int, near: Ints, top_n: int, may: Bools) -> bool:
        """Whether enough of the fetched items without gaps are permitted; items that the user had do not count, as the
        repeat bias may lower them.
        """
        if len(near) >= self.index.items:
            return True
        first = near[: self.index.complete(len(near))]
        return int(np.count_nonzero(may[first] & ~np.isin(first, self.seen[row]))) >= top_n


@torch.inference_mode()
def shortlist(
    fusion: MemoryFusion,
    index: ItemTableIndex,
    table: Tensor,
    states: Tensor,
    memories: MemoryTokens,
    seen: Sequence[Ints],
) -> Shortlist:
    """`recommender.predict` without scoring every item. seen: the items that each user had."""
    fused = fusion(states[:, : table.shape[1]], memories, table)
    directions, bias = (fused.state + fusion.shift).cpu().numpy(), float(fusion.seen_bias)
    near, products = index.nearest(directions, FETCH)
    had = [np.unique(items[items > 0]) for items in seen]
    log_z = torch.from_numpy(_log_z(index, directions, near, products, had, bias)).to(fusion.device)
    logits = _Logits(fusion, table, fused.state + fusion.shift, had)
    own = memories.item[:, : memories.own]
    log_p = (logits(own)[0] - log_z[:, None]).masked_fill(own == 0, 0.0)
    added, present_lift = fusion.own_lift(memories, log_p), fusion.present_lift(memories)
    log_z = log_z + torch.log1p((log_p.exp() * added.expm1()).sum(dim=1))
    log_p = logits(memories.present)[0] + _lift(memories.present, own, added) - log_z[:, None]
    log_p = log_p.masked_fill(memories.present == 0, 0.0)
    log_z = log_z + torch.log1p((log_p.exp() * present_lift.expm1()).sum(dim=1))
    copying = _copying(fusion, logits, log_z, memories, added, present_lift)
    return Shortlist(
        index,
        directions,
        near,
        had,
        log_z.cpu().numpy(),
        bias,
        memories.to(CPU),
        fused,
        added.cpu(),
        present_lift.cpu(),
        Copying(copying.weights.cpu(), copying.share.cpu()),
    )


def _log_z(
    index: ItemTableIndex,
    directions: NDArray[np.float32],
    near: NDArray[np.int64],
    products: NDArray[np.float32],
    had: Sequence[Ints],
    bias: float,
) -> NDArray[np.float32]:
    """log Z (B,) of the logits, of which those of the items that each user had include the bias."""
    lift = np.stack([np.isin(*row) for row in zip(near, had, strict=True)]).astype(np.float32) * np.float32(bias)
    log_z = index.log_z(directions, products, products + lift)
    for row, items in enumerate(had):
        farther = np.setdiff1d(items, near[row, : index.complete(near.shape[1])])
        share = float(np.exp(index.logits(directions[row], farther) - log_z[row]).sum())
        log_z[row] += np.log1p(min(share, 1.0) * np.expm1(bias))
    return log_z


@dataclass(frozen=True)
class _Logits:
    """Computes logits of some items of each query. directions (B, d); seen: the items that each user had."""

    fusion: MemoryFusion
    table: Tensor
    directions: Tensor
    seen: Sequence[Ints]

    def __call__(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (B, K) of items (B, K), and the repeat bias (B, K) that is in them."""
        had = [np.isin(row, seen) for row, seen in zip(item.cpu().numpy(), self.seen, strict=True)]
        repeat = self.fusion.seen_bias * torch.from_numpy(np.stack(had)).to(item.device)
        return torch.einsum("bkd,bd->bk", self.table[item], self.directions) + repeat, repeat


def _copying(
    fusion: MemoryFusion, logits: _Logits, log_z: Tensor, memories: MemoryTokens, added: Tensor, present_lift: Tensor
) -> Copying:
    """`MemoryFusion.copying`, computed from the logits of the memories' items alone."""
    own, item = memories.item[:, : memories.own], memories.item[:, memories.own :]
    if not item.shape[1] or not fusion.config.copying:
        return Copying(log_z.new_zeros(item.shape), log_z.new_zeros(len(item), 1))
    wanted, repeat = logits(item)
    lifted = _lift(item, own, added) + _lift(item, memories.present, present_lift)
    log_p = (wanted + lifted - log_z[:, None]).masked_fill(item == 0, 0.0)
    copying: Copying = fusion.copy(memories, log_p, repeat)
    return copying


def _lift(item: Tensor, named: Tensor, values: Tensor) -> Tensor:
    """(B, K) for each item (B, K) the sum of the values (B, M) whose item in `named` (B, M) is the same."""
    return ((item[:, :, None] == named[:, None]) * values[:, None]).sum(dim=2)


def _at(items: Ints, named: Ints, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) for each of the items (n,), ascending, the sum of the values (K,) whose item in `named` (K,) is the same."""
    found = np.zeros(len(items), np.float32)
    if len(items):
        place = np.searchsorted(items, named)
        place[place == len(items)] = 0
        same = items[place] == named
        np.add.at(found, place[same], values[same])
    return found


def permitted(query: Query, width: int) -> Bools:
    """(width,) bool: which items may be returned."""
    may = np.full(width, query.candidates is None)
    if query.candidates is not None:
        may[query.candidates[query.candidates < width]] = True
    if query.passing is not None:
        passing = query.passing[:width]
        may[: len(passing)] &= passing
    may[query.excluded[query.excluded < width]] = False
    may[0] = False
    return may
