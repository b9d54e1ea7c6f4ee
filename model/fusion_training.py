"""Stage two: the fusion learns, on events that the encoder has not seen, when memories help. See `model.training`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.bank import Retrieved
from model.config import Config, TrainingConfig
from model.dataset import Dataset, leave_one_out
from model.distributed import ALONE, Peers
from model.encoder import SequenceEncoder
from model.fusion import MemoryFusion, MemoryTokens
from model.losses import smooth_ndcg_loss
from model.marks import mark
from model.metrics import ranks, summary
from model.optimisation import Epoch, Progress, Report, adamw, advance, snapshot, step
from model.recommender import predict
from model.replay import MemorySpace, Replay, adaptive, collective, replay, trajectory
from model.rules import Floats, Ints

UNKNOWN_SHARE = 0.02
"""Share of memories whose item is hidden from the fusion while fitting, so that "unknown" gets an embedding."""
RANK_ROWS = 256
VALIDATION_USERS = 6000
"""Most users whose validation items judge an epoch of the fusion."""


def fit_fusion(
    dataset: Dataset,
    config: Config,
    encoder: SequenceEncoder,
    space: MemorySpace,
    held_out: NDArray[np.bool_],
    report: Report,
    peers: Peers = ALONE,
) -> MemoryFusion:
    """The fusion of the best validation epoch, trained on what `fusion_targets` says.

    First the calibration alone, without any memory, as far as validation improves; then, with that fixed, everything
    that memory adds. So what memory gains is over an encoder that was given all it can get from those events itself.
    """
    settings = config.training
    torch.manual_seed(settings.seed + 1)
    fusion = MemoryFusion(config.fusion, config.encoder.dim)
    samples, validation = _fusion_samples(dataset, encoder, space, *fusion_events(dataset, settings, held_out))
    fit = _Fit(dataset, config, encoder.table().detach(), samples, validation, report, peers)
    fusion.repeat_bias.data.fill_(repeat_bias(dataset, fit.table, samples))
    fit("calibration", fusion, _calibration_optimizer(fusion, settings), _no_memory)
    fit("fusion", fusion, _memory_optimizer(fusion, settings), adaptive)
    return fusion.eval()


@dataclass(frozen=True)
class _Fit:
    """What both fits of the fusion share. `table` is the encoder's, (items + 1, d)."""

    dataset: Dataset
    config: Config
    table: Tensor
    samples: Replay
    validation: Replay
    report: Report
    peers: Peers

    def __call__(
        self,
        stage: str,
        fusion: MemoryFusion,
        optimizer: torch.optim.Optimizer,
        choose: Callable[[Replay], Retrieved],
    ) -> None:
        """Train what the optimiser holds until validation no longer improves; the best epoch's weights stay, those of
        before the first among them.
        """
        settings, best = self.config.training, snapshot(fusion)
        progress = Progress(best=self._validated(fusion, choose)["ndcg@10"])
        while not progress.over(settings.fusion_max_epochs, settings.fusion_patience):
            self.peers.synchronise(fusion)
            rng = np.random.default_rng([settings.seed, 4, progress.epoch])
            loss = self._epoch(fusion, optimizer, choose, rng)
            figures = self._validated(fusion, choose)
            advance(progress, figures, fusion, best)
            is_best = progress.best_epoch == progress.epoch
            self.report(Epoch(stage, progress.epoch, settings.fusion_max_epochs, loss, figures, is_best))
        fusion.load_state_dict(best)

    def _validated(self, fusion: MemoryFusion, choose: Callable[[Replay], Retrieved]) -> dict[str, float]:
        mine = self.validation.take(self.peers.share)
        found = memory_ranks(fusion, self.table, self.dataset, mine, choose(mine)).unmasked
        return summary(self.peers.gathered(found, len(self.validation.event)))

    def _epoch(
        self,
        fusion: MemoryFusion,
        optimizer: torch.optim.Optimizer,
        choose: Callable[[Replay], Retrieved],
        rng: np.random.Generator,
    ) -> float:
        torch.manual_seed(int(rng.integers(2**31)))
        fusion.train()
        settings, losses = self.config.training, []
        order = rng.permutation(len(self.samples.event))
        for at in range(0, len(order), settings.fusion_batch):
            batch = self.samples.take(order[at : at + settings.fusion_batch])
            memories = MemoryTokens.of(choose(batch), len(self.table) - 1)
            memories.item[torch.rand(memories.item.shape) < UNKNOWN_SHARE] = 0
            rows = self.peers.share
            with self.peers.own_randomness():
                mine = batch.event[rows]
                loss = self._loss(fusion, mine, batch.state[rows], memories.take(rows)) if len(mine) else None
            losses.append(step(optimizer, fusion, loss, self.peers, len(mine) / len(batch.event)))
        return float(np.mean(losses))

    def _loss(self, fusion: MemoryFusion, event: Ints, state: Floats, memories: MemoryTokens) -> Tensor:
        had = mark(self.dataset.history(event), len(self.table))
        prediction = predict(fusion, self.table, torch.from_numpy(state), memories, had)
        target = torch.from_numpy(self.dataset.items[event].astype(np.int64))
        return smooth_ndcg_loss(prediction.scores(), target, self.config.training.rank_temperature)


def _no_memory(asked: Replay) -> Retrieved:
    return Retrieved.nothing(asked.retrieved.entropy, asked.retrieved.bank_size)


def _calibration_optimizer(fusion: MemoryFusion, settings: TrainingConfig) -> torch.optim.Optimizer:
    return adamw(fusion.calibration(), settings.fusion_calibration_rate, 0.0)


def _memory_optimizer(fusion: MemoryFusion, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; the few parameters of copying learn faster than the attention, the calibration stays as it is."""
    optimizer = adamw(fusion.attention(), settings.fusion_learning_rate, settings.fusion_weight_decay)
    quick = {"params": [*fusion.copy.parameters()], "lr": settings.copy_learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(quick)
    return optimizer


def fusion_events(
    dataset: Dataset, settings: TrainingConfig, held_out: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) which events the fusion is fitted on, and which ones, of other users, judge its epochs."""
    split, owner, event = leave_one_out(dataset), dataset.owners(), np.arange(len(dataset))
    place = np.random.default_rng(0).permutation(dataset.users)[owner]
    is_validation = event == split.validation[owner]
    if settings.fusion_targets == "validation":
        judge = place < max(1, dataset.users // 5)
        return is_validation & ~judge, is_validation & judge
    return held_out[owner] & (event < split.train_end[owner]), is_validation & (place < VALIDATION_USERS)


def _fusion_samples(
    dataset: Dataset,
    encoder: SequenceEncoder,
    space: MemorySpace,
    fitted: NDArray[np.bool_],
    judging: NDArray[np.bool_],
) -> tuple[Replay, Replay]:
    """Replays of the events (N,) that the fusion is fitted on, and of those that judge it."""
    state = trajectory(dataset, encoder)
    asked = replay(dataset, state, space, fitted | judging).replay
    asked = collective(dataset, state, space, asked, "train")
    is_judging = judging[asked.event]
    return asked.take(~is_judging), asked.take(is_judging)


@torch.inference_mode()
def repeat_bias(dataset: Dataset, table: Tensor, asked: Replay) -> float:
    """The bias on items that the user has had which makes repeats as likely as they are: the maximum-likelihood one of
    the encoder alone, half a repeat added so that it stays finite where nobody repeats. In [−15, 15].
    """
    mass, repeats = [], 0.5
    for at in range(0, len(asked.event), RANK_ROWS):
        event = asked.event[at : at + RANK_ROWS]
        had = mark(dataset.history(event), len(table))
        logits = torch.from_numpy(asked.state[at : at + RANK_ROWS, : table.shape[1]]) @ table.T
        logits[:, 0] = -torch.inf
        mass.append((torch.softmax(logits, dim=1) * had).sum(dim=1))
        repeats += float(had[np.arange(len(event)), dataset.items[event]].sum())
    share = torch.cat(mass).double().clamp(1e-12, 1 - 1e-12)
    low, high = -15.0, 15.0
    for _ in range(50):
        middle = (low + high) / 2
        expected = float(torch.sigmoid(torch.logit(share) + middle).sum())
        low, high = (low, middle) if expected > repeats else (middle, high)
    return (low + high) / 2


@dataclass(frozen=True)
class Ranks:
    """Rank of each asked event's item, (N,) int64 each: among all items, and with the user's history less the target
    removed.
    """

    unmasked: NDArray[np.int64]
    masked: NDArray[np.int64]


@torch.inference_mode()
def memory_ranks(
    fusion: MemoryFusion,
    table: Tensor,
    dataset: Dataset,
    asked: Replay,
    retrieved: Retrieved,
    *,
    calibrated: bool = True,
) -> Ranks:
    """Ranks with the memories in `retrieved`, among all items of the dataset; those that the model does not know can
    only be copied.

    Args:
        table: the encoder's, (items + 1, d).
        calibrated: whether repeat bias and shift are added.
    """
    fusion.eval()
    found = []
    for at in range(0, len(asked.event), RANK_ROWS):
        rows = slice(at, at + RANK_ROWS)
        event = asked.event[rows]
        target = dataset.items[event].astype(np.int64)
        memories = MemoryTokens.of(retrieved.take(rows), len(table) - 1)
        had = mark(dataset.history(event), dataset.item_count + 1)
        known = had[:, : len(table)]
        scores = predict(fusion, table, torch.from_numpy(asked.state[rows]), memories, known, calibrated).scores()
        scores = functional.pad(scores, (0, had.shape[1] - scores.shape[1]), value=-torch.inf)
        unmasked = ranks(scores.numpy(), target)
        had[np.arange(len(target)), target] = False
        found.append((unmasked, ranks(scores.masked_fill_(had, -torch.inf).numpy(), target)))
    return Ranks(*(np.concatenate(part) for part in zip(*found, strict=True)))
