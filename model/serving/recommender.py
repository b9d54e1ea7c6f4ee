"""The recommender: encode, fuse, score, choose the top-N. Training, evaluation and serving all call it."""

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
from model.memory.ids import ItemIndex
from model.memory.record import EncodeJob
from model.memory.retrieval import Retrieved
from model.memory.rules import Bools, Ints, unit
from model.network.encoder import SequenceEncoder, StateRequests, encode_states
from model.network.fusion import Copying, Fused, MemoryFusion, MemoryTokens, ProjectedItems
from model.network.tensors import CPU, item_mask
from model.serving.explanation import Explanation
from model.serving.explanation import explain as explained
from model.serving.shortlist import EXACT_ITEMS, WIDER, Shortlist, permitted, shortlist

TINY = 1e-30
"""Shares of copies up to this are taken for 0."""
NO_ITEMS: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Query:
    """One request. All items are item indices; index 0 (unknown to the model) is ignored.

    state: (width,) float32. seen: items that the user had; the repeat bias applies to them. excluded: items that are
    never returned. candidates: the only items that may be returned; None: all. passing: (items,) bool, by item index
    whether it may be returned; None: all. top_n: how many to return.
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

    logits (B, items + 1): of the fused states, with the repeat bias and what own memories add; −inf at 0. log_z (B, 1):
    log Σ exp of the logits. memories: what the prediction was made from; fused, added (B, own) and copying: its parts.
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
        """log P of every item index, (B, width); width exceeds items + 1 if an unknown item was copied."""
        copied, weights = self.memories.copied, self.copying.weights * self.copying.share
        model = self.logits + (torch.log1p(-self.copying.share) - self.log_z)
        if not copied.shape[1]:
            return model
        wider = max(0, int(copied.max()) + 1 - model.shape[1])
        if wider:
            model = functional.pad(model, (0, wider), value=-torch.inf)
        shares = torch.zeros_like(model).scatter_add_(1, copied, weights)
        shares[:, 0] = 0.0
        row, column = torch.nonzero(shares > TINY, as_tuple=True)  # below TINY, the slope of the logarithm overflows
        both = torch.logaddexp(model[row, column], shares[row, column].log())
        return model.index_put((row, column), both)

    def of(self, target: Tensor) -> Tensor:
        """log P (B,) of one known item for each query; target (B,). Differentiable."""
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
    *,
    calibrated: bool = True,
    repeats: bool = True,
    projected: ProjectedItems | None = None,
) -> Prediction:
    """Fuse, score, copy. All tensors are on the device of `fusion`.

    Args:
        table: `encoder.table()`. states: (B, d or width). had: (B, items + 1) bool, items that each user had.
        calibrated: whether repeat bias and shift are added; without them for comparison.
        repeats: whether the repeat head is used, if there is one; without it for comparison.
        projected: `fusion.project(table)`, if the weights do not change.
    """
    fused = fusion(states[:, : table.shape[1]], memories, projected or table)
    seen_bias = fusion.seen_bias if repeats else fusion.repeat_bias
    logits = fused.state @ table.T
    if calibrated:
        logits = logits + fusion.shift @ table.T + seen_bias * had
    logits[:, 0] = -torch.inf
    log_z = torch.logsumexp(logits, dim=1, keepdim=True)
    added = logits.new_zeros(len(logits), memories.own)
    if repeats and fusion.config.repeats and memories.habits.shape[2]:
        own = memories.item[:, : memories.own]
        added = fusion.own_lift(memories, (logits.gather(1, own) - log_z).masked_fill(own == 0, 0.0))
        logits = logits.scatter_add(1, own, added).scatter_add(1, memories.present, fusion.present_lift(memories))
        # summed again: a correction of the first sum would lose digits if the lifted items hold most of the probability
        log_z = torch.logsumexp(logits, dim=1, keepdim=True)
    return Prediction(logits, log_z, memories, fused, added, fusion.copying(memories, logits, log_z, had, seen_bias))


@dataclass(frozen=True)
class Ranked:
    """One answer: items (n,) int64, best first; scores (n,) float32, their log P; an explanation if asked for."""

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    explanation: Explanation | None = None


class Recommender:
    """A trained model ready to answer, on the device of its weights. Not thread-safe: one thread at a time.

    With more than `exact_items` items, a FAISS index finds the items to score (`model.serving.item_index`).
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
            from model.serving.item_index import ItemTableIndex  # FAISS is loaded where it is needed

            self.index = ItemTableIndex(self.table.cpu().numpy())
        else:
            self.projected = self.fusion.project(self.table)
        order = np.argsort(-checkpoint.popularity, kind="stable")
        self._by_popularity = order[checkpoint.popularity[order] > 0]
        self.index_of = {item: ItemIndex(index) for index, item in enumerate(checkpoint.item_ids, start=1)}

    @property
    def version(self) -> str:
        """Content hash of the checkpoint."""
        return self.checkpoint.version

    @property
    def config(self) -> Config:
        """Configuration that the model was trained with."""
        return self.checkpoint.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.table.device

    @classmethod
    def load(cls, run: Path, device: torch.device = CPU) -> Recommender:
        """Read a checkpoint folder. Raises CheckpointError."""
        return cls.of(load_checkpoint(Path(run)), device)

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device = CPU) -> Recommender:
        """Build the networks of a checkpoint's weights. Raises CheckpointError if the weights do not fit."""
        config = checkpoint.config
        _check_size(checkpoint)
        encoder = SequenceEncoder(config.encoder, len(checkpoint.item_ids))
        fusion = MemoryFusion(config.fusion, config.encoder.dim)
        try:
            for prefix, network in (("encoder.", encoder), ("fusion.", fusion)):
                network.load_state_dict(_part(checkpoint.weights, prefix))
        except RuntimeError as error:
            raise CheckpointError(f"weights do not fit the config: {error}") from error
        return cls(checkpoint, encoder.to(device), fusion.to(device))

    def encode(self, jobs: Sequence[EncodeJob]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """For each job the unit keys (n, width) of its positions, and the state (width,) after its last item.

        Items of jobs are item indices; 0 (unknown to the model) is skipped.
        """
        if not jobs:
            return []
        states = encode_states(self.encoder, StateRequests.of_jobs(jobs))
        per_job = np.split(states, np.cumsum([len(job.positions) + 1 for job in jobs])[:-1])
        return [(unit(found[:-1]), found[-1]) for found in per_job]

    @torch.inference_mode()
    def predict(
        self, states: NDArray[np.float32], retrieved: Retrieved, seen: Sequence[Ints]
    ) -> Prediction | Shortlist:
        """P of every item, or with more than `exact_items` items of those that may be recommended.

        Args:
            states: (B, width). retrieved: of these B users, see `recommend`. seen: the items that each user had.
        """
        memories = MemoryTokens.of(retrieved, self.item_count).to(self.device)
        state = torch.from_numpy(states).to(self.device)
        if self.index is not None:
            return shortlist(self.fusion, self.index, self.table, state, memories, seen)
        had = item_mask(seen, self.item_count + 1, self.device)
        return predict(self.fusion, self.table, state, memories, had, projected=self.projected)

    def recommend(self, queries: Sequence[Query], retrieved: Retrieved, explain: Sequence[bool]) -> list[Ranked]:
        """The top-N of each query; explain (B,): whether it is explained.

        `retrieved` holds item indices. An item that the model does not know is 0 in the own scope. In the collective
        scope it is 0, or an index beyond the model's items, which can then be recommended.
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
        """The second half of `recommend`: the top-N of each query from the prediction for these queries."""
        if isinstance(prediction, Shortlist):
            best = [prediction.best(row, query) for row, query in enumerate(queries)]
        else:
            best = top_items(prediction.scores().cpu().numpy(), queries)
        ranked = [Ranked(items, scores) for items, scores in best]
        for row in np.flatnonzero(explain).tolist():
            explanation = explained(self, prediction, row, queries[row], retrieved, ranked[row])
            ranked[row] = replace(ranked[row], explanation=explanation)
        return ranked

    def most_popular(self, query: Query) -> Ranked:
        """The permitted items that were taken most in the training data; `query.state` is not read."""
        may, count = permitted(query, self.item_count + 1), query.top_n + len(query.excluded)
        while True:
            first = self._by_popularity[:count]
            items = first[may[first]][: query.top_n]
            if len(items) == query.top_n or count >= len(self._by_popularity):
                return Ranked(items, np.log(self.checkpoint.popularity[items]))
            count *= WIDER


def top_items(
    scores: NDArray[np.float32], queries: Sequence[Query]
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """For each of B queries the `top_n` permitted items with the largest finite scores, best first, and their scores.
    Ties go to the lower index. scores (B, width): overwritten.
    """
    _remove_forbidden(scores, queries)
    most = min(max(query.top_n for query in queries), scores.shape[1] - 1)
    if most < 1:
        return [(NO_ITEMS, scores[0, :0])] * len(queries)
    values, items = (found.numpy() for found in torch.topk(torch.from_numpy(scores), most + 1, dim=1))
    for row in np.flatnonzero((values[:, :-1] == values[:, 1:]).any(axis=1)):
        pool = np.flatnonzero(scores[row] >= values[row, -1])  # the tie may reach beyond the items found
        order = pool[np.argsort(-scores[row, pool], kind="stable")][: most + 1]
        items[row], values[row] = order, scores[row, order]
    count = np.minimum(np.isfinite(values).sum(axis=1), [query.top_n for query in queries]).tolist()
    return [(items[row, :n], values[row, :n]) for row, n in enumerate(count)]


def _remove_forbidden(scores: NDArray[np.float32], queries: Sequence[Query]) -> None:
    """Set the scores of items that may not be returned to −inf."""
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
    """Refuse a config that does not fit the weights, before networks of its size are allocated."""
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
