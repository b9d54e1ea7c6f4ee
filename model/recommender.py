"""Recommender: encode, fuse, score, top-N. What training, evaluation and serving all call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.bank import Retrieved
from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from model.config import Config
from model.encoder import SequenceEncoder, StateRequests, encode_states
from model.events import EncodeJob
from model.fusion import Fused, MemoryFusion, MemoryTokens
from model.rules import Ints, unit

NO_ITEMS: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Query:
    """One request. Items are model item indices; index 0 (unknown to the model) is ignored.

    state (d,) float32 to score with; seen: items the user had (the repeat bias applies); excluded: never
    returned; candidates: the only ones to return, None = all.
    """

    state: NDArray[np.float32]
    seen: NDArray[np.int64] = field(default_factory=lambda: NO_ITEMS)
    excluded: NDArray[np.int64] = field(default_factory=lambda: NO_ITEMS)
    candidates: NDArray[np.int64] | None = None
    top_n: int = 10


@dataclass(frozen=True)
class Influence:
    """What one memory did: scope, its column in the retrieved entries, mean attention weight, and its exact part (n,)
    in the logit of each returned item.
    """

    scope: Literal["own", "collective"]
    entry: int
    weight: float
    part: NDArray[np.float32]


@dataclass(frozen=True)
class Ranked:
    """items (n,) int64 best first, scores (n,) float32 = log P; gate in [0, 1]; influences only when explained."""

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    gate: float = 0.0
    copy_share: NDArray[np.float32] | None = None
    influences: list[Influence] = field(default_factory=list)


class Recommender:
    """A trained model ready to answer. Not thread-safe: one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, encoder: SequenceEncoder, fusion: MemoryFusion) -> None:
        self.checkpoint = checkpoint
        self.encoder = encoder.eval()
        self.fusion = fusion.eval()
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
        encoder = SequenceEncoder(config.encoder, len(checkpoint.item_ids))
        fusion = MemoryFusion(config.fusion, config.encoder.dim)
        try:
            for prefix, network in (("encoder.", encoder), ("fusion.", fusion)):
                network.load_state_dict(_part(checkpoint.weights, prefix))
        except RuntimeError as error:
            raise CheckpointError(f"weights do not fit the config: {error}") from error
        return cls(checkpoint, encoder, fusion)

    def encode(self, jobs: Sequence[EncodeJob]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Keys (n, d) of unit length for each job's positions, and the state (d,) after its last item.

        Job items are model item indices; 0 (unknown to the model) is skipped.
        """
        if not jobs:
            return []
        states = encode_states(self.encoder, StateRequests.of_jobs(jobs))
        per_job = np.split(states, np.cumsum([len(job.positions) + 1 for job in jobs])[:-1])
        return [(unit(one[:-1]), one[-1]) for one in per_job]

    @torch.inference_mode()
    def logits(self, states: NDArray[np.float32], retrieved: Retrieved, seen: Sequence[Ints]) -> tuple[Tensor, Fused]:
        """Logit of every item index (B, items + 1) after fusion and repeat bias, and the fusion behind it."""
        fused = self.fusion(torch.from_numpy(states), MemoryTokens.of(retrieved), self.encoder.item.weight)
        scores = self.encoder.logits(fused.state)
        scores[mark(seen, scores.shape[1])] += self.fusion.repeat_bias
        return scores, fused

    def recommend(self, queries: Sequence[Query], retrieved: Retrieved, explain: Sequence[bool]) -> list[Ranked]:
        """The top-N of each query. `retrieved` holds model item indices, 0 for items unknown to the model."""
        states = np.stack([query.state for query in queries])
        scores, fused = self.logits(states, retrieved, [query.seen for query in queries])
        log_p = torch.log_softmax(scores, dim=1).numpy()
        gates = fused.gate[:, 0].tolist()
        answers = []
        for row, query in enumerate(queries):
            items = top_items(log_p[row], query)
            influences = self._influences(fused, retrieved, row, items) if explain[row] else []
            answers.append(Ranked(items, log_p[row, items], gates[row], None, influences))
        return answers

    @torch.inference_mode()
    def _influences(self, fused: Fused, retrieved: Retrieved, row: int, items: Ints) -> list[Influence]:
        one = Fused(*(getattr(fused, name)[row : row + 1] for name in ("state", "gate", "weights", "values")))
        parts = (self.encoder.item.weight[items] @ self.fusion.entry_parts(one)[0].T).numpy()
        weight = one.weights[0].mean(dim=0).tolist()
        width = retrieved.own.item.shape[1]
        valid = np.concatenate([retrieved.own.valid[row], retrieved.collective.valid[row]])
        return [
            Influence(
                "own" if column < width else "collective",
                int(column if column < width else column - width),
                weight[column],
                parts[:, column],
            )
            for column in np.flatnonzero(valid)
        ]

    def most_popular(self, query: Query) -> Ranked:
        """The most taken items of the training data; `query.state` does not matter."""
        with np.errstate(divide="ignore"):
            log_share = np.log(self.checkpoint.popularity)
        items = top_items(log_share, query)
        return Ranked(items, log_share[items])


def top_items(scores: NDArray[np.float32], query: Query) -> NDArray[np.int64]:
    """Indices of the best `top_n` allowed items with a finite score, best first; ties go to the lower index."""
    allowed = np.isfinite(scores)
    if query.candidates is not None:
        wanted = np.zeros_like(allowed)
        wanted[query.candidates] = True
        allowed &= wanted
    allowed[query.excluded] = False
    allowed[0] = False
    pool = np.flatnonzero(allowed)
    if len(pool) > query.top_n:
        edge = np.partition(scores[pool], len(pool) - query.top_n)[len(pool) - query.top_n]
        pool = pool[scores[pool] >= edge]
    return pool[np.argsort(-scores[pool], kind="stable")][: query.top_n]


def mark(items: Sequence[Ints], width: int) -> Tensor:
    """(B, width) bool: True at each row's items; index 0 is never marked."""
    marks = np.zeros((len(items), width), bool)
    rows = np.repeat(np.arange(len(items)), [len(one) for one in items])
    marks[rows, np.concatenate([NO_ITEMS, *items])] = True
    marks[:, 0] = False
    return torch.from_numpy(marks)


def _part(weights: dict[str, NDArray[Any]], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(values)
        for name, values in weights.items()
        if name.startswith(prefix)
    }
