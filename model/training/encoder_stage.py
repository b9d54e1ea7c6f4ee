"""Stage one: the encoder learns to predict the next item at every position. See `model.training`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import Config, TrainingConfig
from model.data.dataset import Dataset, Targets, length_batches, pad_windows, split_of
from model.data.marks import mark
from model.memory.rules import Ints
from model.network.contrast import ContrastiveViews
from model.network.encoder import SequenceEncoder, encode_states
from model.network.losses import gbce_loss, sampled_softmax_loss, softmax_loss
from model.training.distributed import ALONE, Peers
from model.training.metrics import ranks, summary
from model.training.optimisation import (
    Epoch,
    Report,
    adamw,
    advance,
    decayed,
    resume,
    save_state,
    set_rate,
    snapshot,
    step,
)
from model.training.replay import state_requests

VALIDATION_ROWS = 512


def fit_encoder(
    dataset: Dataset, config: Config, users: NDArray[np.bool_], run: Path, report: Report, peers: Peers = ALONE
) -> SequenceEncoder:
    """The encoder of the best validation epoch, trained on the marked users' training interactions."""
    settings = config.training
    torch.manual_seed(settings.seed)
    encoder = SequenceEncoder(config.encoder, dataset.item_count)
    optimizer = adamw(encoder.parameters(), settings.learning_rate, settings.weight_decay)
    best = snapshot(encoder)
    progress = resume(run, _fingerprint(dataset, config), encoder, optimizer, best)
    peers.agree(progress.epoch, "the epoch they go on from; the run's folder must be one for all")
    while not progress.over(settings.max_epochs, settings.patience):
        set_rate(optimizer, decayed(settings.learning_rate, progress.epoch / settings.max_epochs, settings.final_rate))
        peers.synchronise(encoder)
        loss = _encoder_epoch(encoder, optimizer, dataset, users, config, progress.epoch, peers)
        figures = validate_encoder(encoder, dataset, peers)
        advance(progress, figures, encoder, best)
        if peers.is_first:
            save_state(run, _fingerprint(dataset, config), encoder, optimizer, best, progress)
        is_best = progress.best_epoch == progress.epoch
        report(Epoch("encoder", progress.epoch, settings.max_epochs, loss, figures, is_best))
    encoder.load_state_dict(best)
    return encoder.eval()


def _encoder_epoch(
    encoder: SequenceEncoder,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    users: NDArray[np.bool_],
    config: Config,
    epoch: int,
    peers: Peers,
) -> float:
    """One pass over every training interaction as a target; returns the mean loss."""
    torch.manual_seed((config.training.seed + 1) * 100_003 + epoch + peers.seed_shift)
    rng = np.random.default_rng([config.training.seed, 2, epoch])
    encoder.train()
    settings, total, count = config.training, 0.0, 0.0
    views = ContrastiveViews(dataset, users, config.encoder.window) if settings.contrast_weight else None
    view_rng = rng if peers.size == 1 else np.random.default_rng([settings.seed, 5, epoch, peers.rank])
    for windows in training_batches(dataset, users, config, rng):
        targets = windows.targets
        mine, loss, targeted = targets[peers.share], None, np.count_nonzero(targets)
        if len(mine):
            before = None if windows.before is None else torch.from_numpy(windows.before[peers.share])
            loss = next_item_loss(encoder, torch.from_numpy(mine), settings, before)
            if views is not None:
                contrast = views.loss(encoder, torch.from_numpy(mine), view_rng, settings.contrast_temperature)
                loss = loss + settings.contrast_weight * contrast
        total += targeted * step(optimizer, encoder, loss, peers, np.count_nonzero(mine) / targeted)
        count += targeted
    return total / count


@dataclass(frozen=True)
class Windows:
    """A batch of training windows: targets (B, T) items, right-padded with 0; before (B, T): after how many items of
    the window each is predicted, None: after those that precede it.
    """

    targets: NDArray[np.int64]
    before: NDArray[np.int64] | None = None


def next_item_loss(
    encoder: SequenceEncoder, targets: Tensor, settings: TrainingConfig, before: Tensor | None = None
) -> Tensor:
    """The objective at every position; arguments as of `Windows`."""
    real, states = targets > 0, encoder(targets[:, :-1])
    if before is not None:
        states = states.gather(1, before[..., None].expand(-1, -1, states.shape[-1]))
    states, table, target = states[real], encoder.table()[1:], targets[real] - 1
    match settings.objective:
        case "softmax":
            return softmax_loss(states, table, target, softmax_dtype(settings))
        case "sampled":
            return sampled_softmax_loss(states, table, target, settings.negatives)
        case "gbce":
            return gbce_loss(states, table, target, settings.negatives, settings.calibration)


def softmax_dtype(settings: TrainingConfig) -> torch.dtype:
    """What the full softmax multiplies in; `auto` is bfloat16 where the processor has instructions for it."""
    if settings.precision == "auto":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32


def training_batches(
    dataset: Dataset, users: NDArray[np.bool_], config: Config, rng: np.random.Generator
) -> Iterator[Windows]:
    """Windows of the marked users' training items, each item once a pass, similar lengths together.

    The windows of a user are laid end to end from a random offset, other ones every epoch. Where whole baskets are to
    be predicted (`dataset.holdout`), every item is predicted from what came before its basket.
    """
    begin, length = _training_windows(dataset, users, config.encoder.window, rng)
    batches = length_batches(length + rng.random(len(length)), config.training.batch_tokens)
    basket = dataset.basket_starts()
    for batch in rng.permutation(len(batches)):
        first, size = begin[batches[batch]], length[batches[batch]]
        targets = pad_windows(dataset.items, first, size)
        before = None
        if dataset.holdout == "last-basket":
            before = np.maximum(pad_windows(basket, first, size) - first[:, None], 0)
        yield Windows(targets, before)


def _training_windows(
    dataset: Dataset, users: NDArray[np.bool_], window: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Begin (in `dataset.items`) and length of every training window."""
    first = dataset.offsets[:-1][users]
    train_end = split_of(dataset).train_end[users] - first
    lead = np.where(train_end > window, rng.integers(1, window + 1, len(first)), train_end)
    more = np.maximum(-(-(train_end - lead) // window), 0)
    user = np.repeat(np.arange(len(first)), 1 + more)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(1 + more) - (1 + more), 1 + more)
    start = np.where(nth == 0, 0, lead[user] + (nth - 1) * window)
    stop = np.minimum(np.where(nth == 0, lead[user], start + window), train_end[user])
    return first[user] + start, stop - start


def validate_encoder(encoder: SequenceEncoder, dataset: Dataset, peers: Peers = ALONE) -> dict[str, float]:
    """Metrics of the encoder alone on the validation items of all users. Where nobody ever takes an item again, what a
    user has had is left out of the ranking: the repeat bias, fitted later, will do the same.
    """
    split = split_of(dataset)
    validated = Targets.of(split.validation, split.validation_end)
    mine = validated.take(peers.share)
    states = encode_states(encoder, state_requests(dataset, mine.before, dataset.item_count))
    target, masked = dataset.items[mine.event], not dataset.repeats()
    found = []
    for at in range(0, len(mine), VALIDATION_ROWS):
        rows = slice(at, at + VALIDATION_ROWS)
        with torch.inference_mode():
            scores = encoder.logits(torch.from_numpy(states[rows]))
            if masked:
                scores[mark(dataset.history(mine.before[rows]), scores.shape[1])] = -torch.inf
        found.append(ranks(scores.numpy(), target[rows]))
    together = np.concatenate([*found, np.zeros(0, np.int64)])
    return summary(peers.gathered(together, len(validated)))


def _fingerprint(dataset: Dataset, config: Config) -> str:
    """What a saved state belongs to: everything that shapes the encoder's course, and the data."""
    parts = config.model_dump(include={"dataset", "encoder", "training"})
    elsewhere = ("fusion", "repeat", "threads")
    parts["training"] = {k: v for k, v in parts["training"].items() if not k.startswith(elsewhere)}
    data = [dataset.users, dataset.item_count, len(dataset.items), int(dataset.items[:1000].sum())]
    return json.dumps([parts, data], sort_keys=True)
