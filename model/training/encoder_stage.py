"""Stage one: the encoder learns to predict the next item at every position. See `model.training.train`."""

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
from model.memory.rules import Ints
from model.network.contrast import ContrastiveViews
from model.network.encoder import SequenceEncoder, encode_states
from model.network.losses import gbce_loss, sampled_softmax_loss, softmax_loss
from model.network.tensors import item_mask
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
"""Rows of logits that validation holds at once."""


def fit_encoder(
    dataset: Dataset, config: Config, users: NDArray[np.bool_], run: Path, report: Report, peers: Peers = ALONE
) -> SequenceEncoder:
    """The encoder of the best validation epoch, in evaluation mode. users (users,): whose training interactions it is
    trained on. A state saved in `run` is resumed; one is saved after every epoch.

    Raises:
        PeersError: the processes resume from different epochs.
        TrainingError: a loss was not finite, or `run` holds the state of another config or dataset.
    """
    settings = config.training
    torch.manual_seed(settings.seed)
    encoder = SequenceEncoder(config.encoder, dataset.item_count).to(peers.device)
    optimizer = adamw(encoder.parameters(), settings.learning_rate, settings.weight_decay)
    best = snapshot(encoder)
    progress = resume(run, _fingerprint(dataset, config), encoder, optimizer, best)
    peers.agree(progress.epoch, "the epoch they resume from; all need the same --out folder")
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
    """One pass with every training interaction as a target; returns the mean loss."""
    torch.manual_seed((config.training.seed + 1) * 100_003 + epoch + peers.seed_shift)
    rng = np.random.default_rng([config.training.seed, 2, epoch])
    encoder.train()
    settings, total, count = config.training, 0.0, 0.0
    views = ContrastiveViews(dataset, users, config.encoder.window) if settings.contrast_weight else None
    view_rng = rng if peers.size == 1 else np.random.default_rng([settings.seed, 5, epoch, peers.rank])
    for windows in training_batches(dataset, users, config, rng):
        own, loss, targeted = windows.take(peers.share), None, np.count_nonzero(windows.targets)
        if len(own.targets):
            loss = next_item_loss(encoder, own, settings)
            if views is not None:
                contrast = views.loss(encoder, own.targets, view_rng, settings.contrast_temperature)
                loss = loss + settings.contrast_weight * contrast
        total += targeted * step(optimizer, encoder, loss, peers, np.count_nonzero(own.targets) / targeted)
        count += targeted
    return total / count


@dataclass(frozen=True)
class Windows:
    """A batch of training windows. targets (B, T): items, right-padded with 0. before (B, T): after how many items of
    its window each target is predicted; None: after all items that precede it.
    """

    targets: NDArray[np.int64]
    before: NDArray[np.int64] | None = None

    def take(self, rows: slice) -> Windows:
        """Some of the windows."""
        return Windows(self.targets[rows], None if self.before is None else self.before[rows])


def next_item_loss(encoder: SequenceEncoder, windows: Windows, settings: TrainingConfig) -> Tensor:
    """The objective over all positions of the windows, a scalar."""
    targets = torch.from_numpy(windows.targets).to(encoder.device)
    real, states = targets > 0, encoder(targets[:, :-1])
    if windows.before is not None:
        before = torch.from_numpy(windows.before).to(encoder.device)
        states = states.gather(1, before[..., None].expand(-1, -1, states.shape[-1]))
    states, table, target = states[real], encoder.table()[1:], targets[real] - 1
    match settings.objective:
        case "softmax":
            return softmax_loss(states, table, target, softmax_dtype(settings, encoder.device))
        case "sampled":
            return sampled_softmax_loss(states, table, target, settings.negatives)
        case "gbce":
            return gbce_loss(states, table, target, settings.negatives, settings.calibration)


def softmax_dtype(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    """The type of the full softmax's products. `auto`: bfloat16 if the device has instructions for it."""
    has_bfloat16 = settings.precision == "bfloat16"
    if settings.precision == "auto":
        processor = torch.cpu.get_capabilities()
        on_cpu = bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))
        has_bfloat16 = on_cpu if device.type == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def training_batches(
    dataset: Dataset, users: NDArray[np.bool_], config: Config, rng: np.random.Generator
) -> Iterator[Windows]:
    """Windows of the training items of `users` (users,) bool, each item once, similar lengths together.

    The windows of a user follow one another from a random offset, which differs between epochs. If whole baskets are to
    be predicted (`dataset.holdout`), every item is predicted from the items before its basket.
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
    """Where every training window begins in `dataset.items`, and its length; (W,) each."""
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
    """Metrics of the encoder alone on the validation items of all users. If nobody ever takes an item again, the items
    that a user had are not ranked, as the repeat bias, which is fitted later, will lower them.
    """
    split = split_of(dataset)
    validated = Targets.of(split.validation, split.validation_end)
    own = validated.take(peers.share)
    states = encode_states(encoder, state_requests(dataset, own.before, dataset.item_count))
    target, masked = dataset.items[own.event], not dataset.repeats()
    found = []
    for at in range(0, len(own), VALIDATION_ROWS):
        rows = slice(at, at + VALIDATION_ROWS)
        with torch.inference_mode():
            scores = encoder.logits(torch.from_numpy(states[rows]).to(encoder.device))
            if masked:
                scores[item_mask(dataset.history(own.before[rows]), scores.shape[1], scores.device)] = -torch.inf
        found.append(ranks(scores.cpu().numpy(), target[rows]))
    together = np.concatenate([*found, np.zeros(0, np.int64)])
    return summary(peers.gathered(together, len(validated)))


def _fingerprint(dataset: Dataset, config: Config) -> str:
    """Identifies what a saved state belongs to: the settings that affect the encoder's training, and the data."""
    parts = config.model_dump(include={"dataset", "encoder", "training"})
    irrelevant = ("fusion", "repeat", "threads")
    parts["training"] = {name: v for name, v in parts["training"].items() if not name.startswith(irrelevant)}
    data = [dataset.users, dataset.item_count, len(dataset.items), int(dataset.items[:1000].sum())]
    return json.dumps([parts, data], sort_keys=True)
