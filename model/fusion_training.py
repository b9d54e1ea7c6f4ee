"""Stage two: the fusion learns, on users that the encoder has not seen, when memories help. See `model.training`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from model.bank import Retrieved
from model.config import Config
from model.dataset import Dataset, leave_one_out
from model.encoder import SequenceEncoder
from model.fusion import MemoryFusion, MemoryTokens
from model.metrics import ranks, summary
from model.optimisation import Epoch, Progress, Report, adamw, advance, snapshot, step
from model.recommender import mark
from model.replay import Replay, adaptive, replay
from model.rules import Ints

UNKNOWN_SHARE = 0.02
"""Share of memories whose item is hidden from the fusion while fitting, so that "unknown" gets an embedding."""


def fit_fusion(
    dataset: Dataset,
    config: Config,
    encoder: SequenceEncoder,
    clusters: NDArray[np.int32],
    held_out: NDArray[np.bool_],
    report: Report,
) -> MemoryFusion:
    """The fusion of the best validation epoch, trained on the held-out users' training positions.

    Epoch 0 (no memory at all) competes too: a memory that does not help is shut out by its gate.
    """
    settings = config.training
    torch.manual_seed(settings.seed + 1)
    fusion = MemoryFusion(config.fusion, config.encoder.dim)
    samples, validation = _fusion_samples(dataset, config, encoder, clusters, held_out)
    optimizer = adamw(fusion, settings.fusion_learning_rate, settings.fusion_weight_decay)
    progress, best = Progress(), snapshot(fusion)
    while not progress.over(settings.fusion_max_epochs, settings.fusion_patience):
        rng = np.random.default_rng([settings.seed, 4, progress.epoch])
        loss = _fusion_epoch(fusion, encoder, optimizer, dataset, samples, config, rng)
        figures = _validate_fusion(fusion, encoder, dataset, validation)
        advance(progress, figures, fusion, best)
        is_best = progress.best_epoch == progress.epoch
        report(Epoch("fusion", progress.epoch, settings.fusion_max_epochs, loss, figures, is_best))
    fusion.load_state_dict(best)
    return fusion.eval()


def _fusion_samples(
    dataset: Dataset,
    config: Config,
    encoder: SequenceEncoder,
    clusters: NDArray[np.int32],
    held_out: NDArray[np.bool_],
) -> tuple[Replay, Replay]:
    """Replays of the held-out users' training positions, and of everybody's validation position."""
    split = leave_one_out(dataset)
    event, owner = np.arange(len(dataset)), dataset.owners()
    wanted = held_out[owner] & (event < split.train_end[owner])
    validation = event == split.validation[owner]
    asked = replay(dataset, encoder, config.rules, clusters, wanted | validation).replay
    is_validation = validation[asked.event]
    return asked.take(~is_validation), asked.take(is_validation)


def _fusion_epoch(
    fusion: MemoryFusion,
    encoder: SequenceEncoder,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    samples: Replay,
    config: Config,
    rng: np.random.Generator,
) -> float:
    torch.manual_seed(int(rng.integers(2**31)))
    fusion.train()
    table = encoder.item.weight.detach()
    order, size = rng.permutation(len(samples.event)), config.training.fusion_batch
    losses = []
    for at in range(0, len(order), size):
        batch = samples.take(order[at : at + size])
        memories = MemoryTokens.of(adaptive(batch.retrieved, config.rules))
        memories.item[torch.rand(memories.item.shape) < UNKNOWN_SHARE] = 0
        fused = fusion(torch.from_numpy(batch.state), memories, table)
        logits = encoder.logits(fused.state)
        logits = logits + fusion.repeat_bias * mark(history(dataset, batch.event), logits.shape[1])
        loss = functional.cross_entropy(logits, torch.from_numpy(dataset.items[batch.event].astype(np.int64)))
        step(optimizer, fusion, loss, config.training)
        losses.append(loss.item())
    return float(np.mean(losses))


def history(dataset: Dataset, event: Ints) -> list[Ints]:
    """Items that the user had before each event (index into `dataset.items`)."""
    first = dataset.offsets[np.searchsorted(dataset.offsets, event, side="right") - 1]
    return [dataset.items[start:stop] for start, stop in zip(first, event, strict=True)]


def _validate_fusion(
    fusion: MemoryFusion, encoder: SequenceEncoder, dataset: Dataset, validation: Replay
) -> dict[str, float]:
    return summary(memory_ranks(fusion, encoder, dataset, validation, masked=False))


@torch.inference_mode()
def memory_ranks(
    fusion: MemoryFusion,
    encoder: SequenceEncoder,
    dataset: Dataset,
    asked: Replay,
    *,
    masked: bool,
    retrieved: Retrieved | None = None,
    repeat_bias: bool = True,
) -> NDArray[np.int64]:
    """Rank of each asked event's item with memory.

    Args:
        masked: remove the user's history, less the target, from the ranking.
        retrieved: other memories than the adaptive choice from the asked ones.
        repeat_bias: whether the learned repeat bias is added.
    """
    fusion.eval()
    table = encoder.item.weight
    memories = adaptive(asked.retrieved, asked.rules) if retrieved is None else retrieved
    found = []
    for at in range(0, len(asked.event), 256):
        rows = slice(at, at + 256)
        event = asked.event[rows]
        target = dataset.items[event].astype(np.int64)
        state = torch.from_numpy(asked.state[rows])
        logits = encoder.logits(fusion(state, MemoryTokens.of(memories.take(rows)), table).state)
        had = mark(history(dataset, event), logits.shape[1])
        if repeat_bias:
            logits = logits + fusion.repeat_bias * had
        if masked:
            had[np.arange(len(target)), target] = False
            logits = logits.masked_fill(had, -torch.inf)
        found.append(ranks(logits.numpy(), target))
    return np.concatenate(found)
