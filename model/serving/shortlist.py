"""Prediction in a catalogue that is too large to score whole: only the items that may matter are scored.

Those are what the index finds nearest to the fused state, and what repeat bias or copies may lift: the items that the
user had and those that others took. Their scores are exact but for log Z, which the index estimates.
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

if TYPE_CHECKING:
    from model.serving.item_index import ItemIndex
    from model.serving.recommender import Query

EXACT_ITEMS = 100_000
"""The largest catalogue whose items are all scored: up to here that takes no longer than the index."""
FETCH = 2000
"""Items fetched for each query; where too few of them are allowed, WIDER times as many, up to FETCH_LIMIT."""
WIDER, FETCH_LIMIT = 4, 32_000
SCORED = 16_384
"""Where no more than this are permitted, all of them are scored; else the index is searched."""


@dataclass(frozen=True)
class Shortlist:
    """P as in `Prediction`, for the items that are asked about.

    directions (B, d): their products with the item table are the logits, but for the repeat bias; near (B, n): the
    items that the index found, best first; seen: what each user had; log_z (B,); fused, added (B, own), at_once (B, P)
    and copying: how.
    """

    index: ItemIndex
    directions: NDArray[np.float32]
    near: NDArray[np.int64]
    seen: Sequence[Ints]
    log_z: NDArray[np.float32]
    repeat_bias: float
    memories: MemoryTokens
    fused: Fused
    added: Tensor
    at_once: Tensor
    copying: Copying

    def best(self, row: int, query: Query) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `top_n` allowed items with the largest scores, best first, and the scores. Ties go to the lower index."""
        most = max([self.index.items, *self.memories.copied[row].tolist()])
        items = self._pool(row, query.top_n, permitted(query, most + 1))
        scores = self.scores(row, items)
        order = np.argsort(-scores, kind="stable")
        order = order[np.isfinite(scores[order])][: query.top_n]
        return items[order], scores[order]

    def scores(self, row: int, items: Ints) -> NDArray[np.float32]:
        """log P of items (n,), ascending, for one query; −inf for one that the model never saw and nobody copies."""
        known, share = items <= self.index.items, self.copying.share[row].numpy()
        logits = self.index.logits(self.directions[row], np.where(known, items, 0))
        logits += np.float32(self.repeat_bias) * np.isin(items, self.seen[row])
        logits += _at(items, self.memories.item[row, : self.memories.own].numpy(), self.added[row].numpy())
        logits += _at(items, self.memories.present[row].numpy(), self.at_once[row].numpy())
        model = np.where(known, logits - self.log_z[row] + np.log1p(-share), -np.inf)
        with np.errstate(divide="ignore"):
            copied = np.log(self._copied(row, items) * share)
            scores: NDArray[np.float32] = np.logaddexp(model, copied).astype(np.float32)
        return scores

    def _copied(self, row: int, items: Ints) -> NDArray[np.float32]:
        """What share of the copies each item has."""
        return _at(items, self.memories.copied[row].numpy(), self.copying.weights[row].numpy())

    def _pool(self, row: int, top_n: int, may: Bools) -> NDArray[np.int64]:
        """Permitted items, ascending, with the best `top_n` among them. may (items + 1 or more,): which."""
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
        """Whether enough is permitted of what was fetched before any gap; what the user had may fall behind."""
        if len(near) >= self.index.items:
            return True
        first = near[: self.index.complete(len(near))]
        return int(np.count_nonzero(may[first] & ~np.isin(first, self.seen[row]))) >= top_n


@torch.inference_mode()
def shortlist(
    fusion: MemoryFusion, index: ItemIndex, table: Tensor, states: Tensor, memories: MemoryTokens, seen: Sequence[Ints]
) -> Shortlist:
    """Fuse, search, copy: `recommender.predict` where not every item is scored. seen: what each user had."""
    fused = fusion(states[:, : table.shape[1]], memories, table)
    directions, bias = (fused.state + fusion.shift).numpy(), float(fusion.seen_bias)
    near, products = index.nearest(directions, FETCH)
    had = [np.unique(items[items > 0]) for items in seen]
    log_z = torch.from_numpy(_log_z(index, directions, near, products, had, bias))
    logits = _Logits(fusion, table, torch.from_numpy(directions), had)
    own = memories.item[:, : memories.own]
    log_p = (logits(own)[0] - log_z[:, None]).masked_fill(own == 0, 0.0)
    added, at_once = fusion.coming_back(memories, log_p), fusion.at_once(memories)
    log_z = log_z + torch.log1p((log_p.exp() * added.expm1()).sum(dim=1))
    present = memories.present
    log_p = logits(present)[0] + _lifted(present, own, added) - log_z[:, None]
    log_p = log_p.masked_fill(present == 0, 0.0)
    log_z = log_z + torch.log1p((log_p.exp() * at_once.expm1()).sum(dim=1))
    copying = _copying(fusion, logits, log_z, memories, added, at_once)
    return Shortlist(index, directions, near, had, log_z.numpy(), bias, memories, fused, added, at_once, copying)


def _log_z(
    index: ItemIndex,
    directions: NDArray[np.float32],
    near: NDArray[np.int64],
    products: NDArray[np.float32],
    had: Sequence[Ints],
    bias: float,
) -> NDArray[np.float32]:
    """log Z, (B,), of logits where the items that each user had bear the bias."""
    lift = np.stack([np.isin(*row) for row in zip(near, had, strict=True)]).astype(np.float32) * np.float32(bias)
    log_z = index.log_z(directions, products, products + lift)
    for row, items in enumerate(had):
        farther = np.setdiff1d(items, near[row, : index.complete(near.shape[1])])
        share = float(np.exp(index.logits(directions[row], farther) - log_z[row]).sum())
        log_z[row] += np.log1p(min(share, 1.0) * np.expm1(bias))
    return log_z


@dataclass(frozen=True)
class _Logits:
    """Logits of some items of each query, and the repeat bias in them; directions (B, d), seen: what each user had."""

    fusion: MemoryFusion
    table: Tensor
    directions: Tensor
    seen: Sequence[Ints]

    def __call__(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) each; item (B, K)."""
        had = [np.isin(row, seen) for row, seen in zip(item.numpy(), self.seen, strict=True)]
        repeat = self.fusion.seen_bias * torch.from_numpy(np.stack(had))
        return torch.einsum("bkd,bd->bk", self.table[item], self.directions) + repeat, repeat


def _copying(
    fusion: MemoryFusion, logits: _Logits, log_z: Tensor, memories: MemoryTokens, added: Tensor, at_once: Tensor
) -> Copying:
    """`MemoryFusion.copying` from the logits of the memories' items alone."""
    own, item = memories.item[:, : memories.own], memories.item[:, memories.own :]
    if not item.shape[1] or not fusion.config.copying:
        return Copying(log_z.new_zeros(item.shape), log_z.new_zeros(len(item), 1))
    wanted, repeat = logits(item)
    lifted = _lifted(item, own, added) + _lifted(item, memories.present, at_once)
    log_p = (wanted + lifted - log_z[:, None]).masked_fill(item == 0, 0.0)
    copying: Copying = fusion.copy(memories, log_p, repeat)
    return copying


def _lifted(item: Tensor, named: Tensor, values: Tensor) -> Tensor:
    """For each item (B, K): the sum of the values (B, M) of those named (B, M)."""
    return ((item[:, :, None] == named[:, None]) * values[:, None]).sum(dim=2)


def _at(items: Ints, named: Ints, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """For each of the items (n,), ascending: the sum of the values (K,) of those named (K,)."""
    found = np.zeros(len(items), np.float32)
    if len(items):
        place = np.searchsorted(items, named)
        place[place == len(items)] = 0
        same = items[place] == named
        np.add.at(found, place[same], values[same])
    return found


def permitted(query: Query, width: int) -> Bools:
    """(width,) which items may be returned."""
    may = np.full(width, query.candidates is None)
    if query.candidates is not None:
        may[query.candidates[query.candidates < width]] = True
    if query.passing is not None:
        passing = query.passing[:width]
        may[: len(passing)] &= passing
    may[query.excluded[query.excluded < width]] = False
    may[0] = False
    return may
