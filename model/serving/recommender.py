"""Recommender: encode, fuse, score, top-N. What training, evaluation and serving all call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from model.config import Config
from model.data.marks import mark
from model.memory.bank import Retrieved
from model.memory.events import EncodeJob
from model.memory.rules import Bools, Ints, unit
from model.network.encoder import SequenceEncoder, StateRequests, encode_states
from model.network.fusion import Copying, Fused, MemoryFusion, MemoryTokens, ProjectedItems
from model.serving.explanation import Explanation
from model.serving.explanation import explain as explained
from model.serving.shortlist import EXACT_ITEMS, WIDER, Shortlist, permitted, shortlist

TINY = 1e-30
NO_ITEMS: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Query:
    """One request. Items are model item indices; index 0 (unknown to the model) is ignored.

    state (width,) float32 to score with; seen: items the user had (the repeat bias applies); excluded: never
    returned; candidates: the only ones to return, None = all; passing: item → whether it may be returned, None = all.
    """

    state: NDArray[np.float32]
    seen: NDArray[np.int64] = field(default_factory=lambda: NO_ITEMS)
    excluded: NDArray[np.int64] = field(default_factory=lambda: NO_ITEMS)
    candidates: NDArray[np.int64] | None = None
    top_n: int = 10
    passing: Bools | None = None


@dataclass(frozen=True)
class Prediction:
    """P = (1 − λ)·exp(log_p) + λ·Σ_j c_j·1[item_j] for B queries.

    logits (B, items + 1): the fused state's, with the repeat bias and what own memories add, −inf at 0; log_z (B, 1):
    log Σ exp of them; memories: what it was made from; fused, added (B, own) and copying: how.
    """

    logits: Tensor
    log_z: Tensor
    memories: MemoryTokens
    fused: Fused
    added: Tensor
    copying: Copying

    @property
    def log_p(self) -> Tensor:
        """log-softmax of the logits, (B, items + 1)."""
        return self.logits - self.log_z

    def scores(self) -> Tensor:
        """log P of every item index, (B, width). Wider than the model's items where an unknown one was copied."""
        copied, weights = self.memories.copied, self.copying.weights * self.copying.share
        model = self.logits + (torch.log1p(-self.copying.share) - self.log_z)
        if not copied.shape[1]:
            return model
        wider = max(0, int(copied.max()) + 1 - model.shape[1])
        if wider:
            model = functional.pad(model, (0, wider), value=-torch.inf)
        shares = torch.zeros_like(model).scatter_add_(1, copied, weights)
        shares[:, 0] = 0.0
        row, column = torch.nonzero(shares > TINY, as_tuple=True)  # below it, slopes of the logarithm overflow
        both = torch.logaddexp(model[row, column], shares[row, column].log())
        return model.index_put((row, column), both)

    def of(self, target: Tensor) -> Tensor:
        """log P of one item that the model knows for each query; target (B,). Differentiable."""
        model = (self.logits.gather(1, target[:, None]) - self.log_z + torch.log1p(-self.copying.share))[:, 0]
        same = self.memories.copied == target[:, None]
        copied = (self.copying.weights * self.copying.share * same).sum(dim=1)
        return torch.logaddexp(model, (copied + TINY).log())


def predict(
    fusion: MemoryFusion,
    table: Tensor,
    states: Tensor,
    memories: MemoryTokens,
    had: Tensor,
    calibrated: bool = True,
    projected: ProjectedItems | None = None,
) -> Prediction:
    """Fuse, score, copy. states (B, d or width); table: `encoder.table()`; had (B, items + 1) bool: items each user has
    had. `calibrated` False leaves repeat bias and shift out, for comparison. `projected`: `fusion.project(table)`,
    where the weights stand still.
    """
    fused = fusion(states[:, : table.shape[1]], memories, projected or table)
    logits = fused.state @ table.T
    if calibrated:
        logits = logits + fusion.shift @ table.T + fusion.seen_bias * had
    logits[:, 0] = -torch.inf
    log_z = torch.logsumexp(logits, dim=1, keepdim=True)
    added = logits.new_zeros(len(logits), memories.own)
    if fusion.config.repeats and memories.habits.shape[2]:
        own = memories.item[:, : memories.own]
        known = own > 0
        added = fusion.coming_back(memories, (logits.gather(1, own) - log_z).masked_fill(~known, 0.0))
        logits = logits.scatter_add(1, own, added).scatter_add(1, memories.present, fusion.at_once(memories))
        log_z = torch.logsumexp(logits, dim=1, keepdim=True)
    return Prediction(logits, log_z, memories, fused, added, fusion.copying(memories, logits, log_z, had))


@dataclass(frozen=True)
class Ranked:
    """items (n,) int64 best first, scores (n,) float32 = log P; how they came about, where that was asked for."""

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    explanation: Explanation | None = None


class Recommender:
    """A trained model ready to answer. Not thread-safe: one thread at a time.

    Above `exact_items` items a FAISS index says which are worth scoring (`model.serving.item_index`).
    """

    def __init__(
        self, checkpoint: Checkpoint, encoder: SequenceEncoder, fusion: MemoryFusion, exact_items: int = EXACT_ITEMS
    ) -> None:
        self.checkpoint = checkpoint
        self.encoder = encoder.eval()
        self.fusion = fusion.eval()
        self.item_count = len(checkpoint.item_ids)
        with torch.inference_mode():
            self.table = encoder.table().clone()
        self.index, self.projected = None, None
        if self.item_count > exact_items:
            from model.serving.item_index import ItemIndex  # FAISS is loaded where it is needed

            self.index = ItemIndex(self.table.numpy())
        else:
            self.projected = self.fusion.project(self.table)
        order = np.argsort(-checkpoint.popularity, kind="stable")
        self._by_popularity = order[checkpoint.popularity[order] > 0]
        self.index_of = {item: index for index, item in enumerate(checkpoint.item_ids, start=1)}

    @property
    def version(self) -> str:
        """Content hash of the checkpoint."""
        return self.checkpoint.version

    @property
    def config(self) -> Config:
        """Configuration that the model was trained with."""
        return self.checkpoint.config

    @classmethod
    def load(cls, run: Path) -> Recommender:
        """Read a checkpoint folder. Raises CheckpointError."""
        return cls.of(load_checkpoint(Path(run)))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Recommender:
        """Build the networks that a checkpoint's weights belong to. Raises CheckpointError if they do not fit."""
        config = checkpoint.config
        _check_size(checkpoint)
        encoder = SequenceEncoder(config.encoder, len(checkpoint.item_ids))
        fusion = MemoryFusion(config.fusion, config.encoder.dim)
        try:
            for prefix, network in (("encoder.", encoder), ("fusion.", fusion)):
                network.load_state_dict(_part(checkpoint.weights, prefix))
        except RuntimeError as error:
            raise CheckpointError(f"weights do not fit the config: {error}") from error
        return cls(checkpoint, encoder, fusion)

    def encode(self, jobs: Sequence[EncodeJob]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Keys (n, width) of unit length for each job's positions, and the state (width,) after its last item.

        Job items are model item indices; 0 (unknown to the model) is skipped.
        """
        if not jobs:
            return []
        states = encode_states(self.encoder, StateRequests.of_jobs(jobs))
        per_job = np.split(states, np.cumsum([len(job.positions) + 1 for job in jobs])[:-1])
        return [(unit(one[:-1]), one[-1]) for one in per_job]

    @torch.inference_mode()
    def predict(
        self, states: NDArray[np.float32], retrieved: Retrieved, seen: Sequence[Ints]
    ) -> Prediction | Shortlist:
        """Probabilities after fusion, repeat bias and copying: of every item, or above `exact_items` of those that
        matter.
        """
        memories = MemoryTokens.of(retrieved, self.item_count)
        if self.index is not None:
            return shortlist(self.fusion, self.index, self.table, torch.from_numpy(states), memories, seen)
        had = mark(seen, self.item_count + 1)
        return predict(self.fusion, self.table, torch.from_numpy(states), memories, had, projected=self.projected)

    def recommend(self, queries: Sequence[Query], retrieved: Retrieved, explain: Sequence[bool]) -> list[Ranked]:
        """The top-N of each query. `retrieved` holds model item indices; an item unknown to the model is 0 in the own
        scope, and 0 or an index beyond the model's items in the collective one, which can then be recommended.
        """
        states = np.stack([query.state for query in queries])
        prediction = self.predict(states, retrieved, [query.seen for query in queries])
        return self.rank(prediction, queries, retrieved, explain)

    @torch.inference_mode()
    def rank(
        self,
        prediction: Prediction | Shortlist,
        queries: Sequence[Query],
        retrieved: Retrieved,
        explain: Sequence[bool],
    ) -> list[Ranked]:
        """The second half of `recommend`: from the prediction for these queries to their top-N."""
        if isinstance(prediction, Shortlist):
            best = [prediction.best(row, query) for row, query in enumerate(queries)]
        else:
            best = top_items(prediction.scores().numpy(), queries)
        ranked = [Ranked(*one) for one in best]
        for row in np.flatnonzero(explain).tolist():
            told = explained(self, prediction, row, queries[row], retrieved, ranked[row])
            ranked[row] = replace(ranked[row], explanation=told)
        return ranked

    def most_popular(self, query: Query) -> Ranked:
        """The most taken items of the training data; `query.state` does not matter."""
        may, looked_at = permitted(query, self.item_count + 1), query.top_n + len(query.excluded)
        while True:
            first = self._by_popularity[:looked_at]
            items = first[may[first]][: query.top_n]
            if len(items) == query.top_n or looked_at >= len(self._by_popularity):
                return Ranked(items, np.log(self.checkpoint.popularity[items]))
            looked_at *= WIDER


def top_items(
    scores: NDArray[np.float32], queries: Sequence[Query]
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """For each of B queries the best `top_n` allowed items with a finite score, best first, and their scores. Ties go
    to the lower index. scores (B, width) are overwritten.
    """
    _bar(scores, queries)
    most = min(max(query.top_n for query in queries), scores.shape[1] - 1)
    if most < 1:
        return [(NO_ITEMS, scores[0, :0])] * len(queries)
    values, items = (found.numpy() for found in torch.topk(torch.from_numpy(scores), most + 1, dim=1))
    for row in np.flatnonzero((values[:, :-1] == values[:, 1:]).any(axis=1)):
        pool = np.flatnonzero(scores[row] >= values[row, -1])  # the tie may reach beyond what was taken
        order = pool[np.argsort(-scores[row, pool], kind="stable")][: most + 1]
        items[row], values[row] = order, scores[row, order]
    count = np.minimum(np.isfinite(values).sum(axis=1), [query.top_n for query in queries]).tolist()
    return [(items[row, :n], values[row, :n]) for row, n in enumerate(count)]


def _bar(scores: NDArray[np.float32], queries: Sequence[Query]) -> None:
    """Set what must not be returned to −inf."""
    width = scores.shape[1]
    scores[:, 0] = -np.inf
    rows = np.repeat(np.arange(len(queries)), [len(query.excluded) for query in queries])
    items = np.concatenate([query.excluded for query in queries])
    inside = items < width
    scores[rows[inside], items[inside]] = -np.inf
    for row, query in enumerate(queries):
        if query.candidates is not None or query.passing is not None:
            scores[row, ~permitted(query, width)] = -np.inf


def _check_size(checkpoint: Checkpoint) -> None:
    """Refuse a config that is larger than the weights before networks of that size are made."""
    shape = checkpoint.config.encoder
    wanted = {
        "item.weight": (len(checkpoint.item_ids) + 1, shape.dim),
        "position.weight": (shape.window + 1, shape.dim),
        **{f"blocks.{n}.qkv.weight": (3 * shape.dim, shape.dim) for n in range(shape.layers)},
    }
    for name, size in wanted.items():
        found = checkpoint.weights.get(f"encoder.{name}")
        if found is None or found.shape != size:
            what = "missing" if found is None else f"of shape {found.shape}"
            raise CheckpointError(f"weights do not fit the config: encoder.{name} is {what}, wanted {size}")


def _part(weights: dict[str, NDArray[Any]], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(values)
        for name, values in weights.items()
        if name.startswith(prefix)
    }
