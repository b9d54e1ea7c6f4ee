"""Stage two: the fusion learns, on events that the encoder has not seen, when memories help. See `model.training`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.config import Config, TrainingConfig
from model.data.dataset import Dataset, Targets, split_of
from model.data.marks import mark
from model.memory.bank import Retrieved
from model.memory.rules import Floats, Ints
from model.network.encoder import SequenceEncoder
from model.network.fusion import TINY, MemoryFusion, MemoryTokens
from model.network.losses import smooth_ndcg_loss
from model.serving.recommender import predict
from model.training.distributed import ALONE, Peers
from model.training.memory_rules import recent_targets, some_of
from model.training.metrics import ndcg, ranks, summary
from model.training.optimisation import Epoch, Progress, Report, adamw, advance, decayed, snapshot, step
from model.training.replay import MemorySpace, Replay, adaptive, collective, own_memories, replay

UNKNOWN_SHARE = 0.02
"""Share of memories whose item is hidden from the fusion while fitting, so that "unknown" gets an embedding."""
RANK_ROWS = 256
VALIDATION_USERS = 6000
"""Most users whose validation items judge an epoch of the fusion, and most such items."""
ENOUGH_UNSEEN = 5000
"""Events that the encoder was not trained on, from which on the repeat head is fitted on those."""
STANDARD_ROWS = 4096


def fit_fusion(
    dataset: Dataset,
    config: Config,
    encoder: SequenceEncoder,
    state: Floats,
    space: MemorySpace,
    held_out: NDArray[np.bool_],
    report: Report,
    peers: Peers = ALONE,
) -> tuple[MemoryFusion, bool]:
    """The fusion of the best validation epochs, trained on what `fusion_targets` says (its config says what was kept),
    and whether lists are better without what the user had.

    First the calibration alone, without any memory; then, with that fixed, what people come back to; then all that
    others' memories and cross-attention add. So what memory gains is over an encoder that was given all it can get from
    those events itself. Each stage keeps the weights of before it where validation was no better after any epoch, and
    in the end each part is left out without which validation is as good. `state`: the dataset's `trajectory`.
    """
    settings = config.training
    torch.manual_seed(settings.seed + 1)
    fusion = MemoryFusion(config.fusion, config.encoder.dim)
    fitted, judging = fusion_targets(dataset, settings, held_out)
    unseen = _unseen(dataset, state, space, fitted, judging)
    samples, validation = unseen.take(slice(None, len(fitted))), unseen.take(slice(len(fitted), None))
    fit = _Fit(dataset, config, encoder.table().detach(), validation, report, peers)
    _calibrate(fit, fusion, samples)
    if space.rules.activation:
        recent = None
        if len(fitted) < ENOUGH_UNSEEN:
            recent = replay(dataset, state, space, recent_targets(dataset, settings, settings.repeat_samples)).replay
        _fit_repeats(fit, fusion, samples, unseen, recent)
    else:
        keep(fusion, repeats=False)
    rank_loss = _rank_loss(settings.rank_temperature)
    stage = Stage("fusion", adaptive, rank_loss, settings.fusion_max_epochs)
    fit(stage, fusion, _memory_optimizer(fusion, settings), samples)
    _leave_out(fit, fusion)
    report(_worth(fit, fusion))
    return fusion.eval(), _better_without_seen(fit, fusion)


def keep(fusion: MemoryFusion, **parts: bool) -> None:
    """Say which parts of the fusion there are (`FusionConfig`)."""
    fusion.config = fusion.config.model_copy(update=parts)


def _calibrate(fit: _Fit, fusion: MemoryFusion, samples: Replay) -> None:
    """Repeat bias and shift: those of the best epoch, the bias alone, or neither, whichever validation likes best."""
    settings = fit.config.training
    progress, best = Progress(), snapshot(fusion)
    for bias in (0.0, repeat_bias(fit.dataset, fit.table, samples)):
        fusion.repeat_bias.data.fill_(bias)
        advance(progress, fit.validated(fusion, _no_memory), fusion, best)
    fusion.load_state_dict(best)
    optimizer = adamw(fusion.calibration(), settings.fusion_calibration_rate, 0.0)
    rank_loss = _rank_loss(settings.rank_temperature)
    fit(Stage("calibration", _no_memory, rank_loss, settings.fusion_max_epochs), fusion, optimizer, samples)


def _fit_repeats(fit: _Fit, fusion: MemoryFusion, samples: Replay, unseen: Replay, recent: Replay | None) -> None:
    """The repeat head, by likelihood and by smooth rank; the better of the two stays.

    It looks at the model's own log-probability only where there are enough events that the encoder was not trained on.
    Where not, it is fitted on `recent` training events, of which the model is too sure, and all `unseen` ones judge.
    """
    settings = fit.config.training
    keep(fusion, attention=False, copying=False, repeats=True, repeat_log_p=recent is None)
    if recent is not None:
        fit, samples = replace(fit, validation=unseen), recent
    _standardise(fit, fusion, samples)
    fusion.repeats.present.data.fill_(_basket_bias(fit, samples))
    fresh, best, best_figure = snapshot(fusion), snapshot(fusion), -1.0
    for name, loss in (("likelihood", functional.cross_entropy), ("rank", _rank_loss(settings.repeat_temperature))):
        fusion.load_state_dict(fresh)
        optimizer = _repeats_optimizer(fusion, settings)
        stage = Stage(f"repeats by {name}", own_memories, loss, settings.repeat_max_epochs, decays=True)
        figure = fit(stage, fusion, optimizer, samples)
        if figure > best_figure:
            best, best_figure = snapshot(fusion), figure
    fusion.load_state_dict(best)
    keep(fusion, attention=fit.config.fusion.attention, copying=fit.config.fusion.copying)


def _repeats_optimizer(fusion: MemoryFusion, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; the two biases learn as fast as copying does."""
    head = fusion.repeats
    optimizer = adamw(head.layers.parameters(), settings.repeat_learning_rate, settings.fusion_weight_decay)
    quick = {"params": [head.seen, head.present], "lr": settings.copy_learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(quick)
    return optimizer


def _basket_bias(fit: _Fit, samples: Replay) -> float:
    """The bias on what is in the same basket that makes taking it again as likely as it is; 0 without any baskets."""
    in_basket = [row[row > 0] for row in samples.retrieved.present]
    return likely_bias(fit.dataset, fit.table, samples, in_basket) if any(map(len, in_basket)) else 0.0


def _rank_loss(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(smooth_ndcg_loss, temperature=temperature)


@torch.inference_mode()
def _standardise(fit: _Fit, fusion: MemoryFusion, samples: Replay) -> None:
    some = samples.take(np.random.default_rng(0).permutation(len(samples.event))[:STANDARD_ROWS])
    memories = MemoryTokens.of(own_memories(some), len(fit.table) - 1)
    item = memories.item[:, : memories.own]
    logits = torch.from_numpy(some.state[:, : fit.table.shape[1]]) @ fit.table.T
    log_p = fusion.looked_at(torch.log_softmax(logits, dim=1).gather(1, item))
    fusion.repeats.standardise(fusion.repeats.inputs(memories, log_p)[memories.valid[:, : memories.own]])


def _leave_out(fit: _Fit, fusion: MemoryFusion) -> None:
    """Leave out every part that validation is as good without, the most costly first."""
    figure = fit.validated(fusion, adaptive)["ndcg@10"]
    for part in ("copying", "attention", "repeats"):
        if getattr(fusion.config, part):
            keep(fusion, **{part: False})
            without = fit.validated(fusion, adaptive)["ndcg@10"]
            if without < figure:
                keep(fusion, **{part: True})
            figure = max(figure, without)


def _better_without_seen(fit: _Fit, fusion: MemoryFusion) -> bool:
    """Whether lists that leave out what the user had hit as well as others, although they miss every repeat."""
    asked = fit.validation
    found = memory_ranks(fusion, fit.table, fit.dataset, asked, adaptive(asked))
    repeat = fit.dataset.is_repeat()[asked.event]
    return float(np.mean(ndcg(found.masked) * ~repeat)) >= float(np.mean(ndcg(found.unmasked)))


def _worth(fit: _Fit, fusion: MemoryFusion) -> Epoch:
    """What memory is worth on the events that judged: the last line of a training."""
    without = fit.validated(fusion, _no_memory, without=True)["ndcg@10"]
    figures = fit.validated(fusion, adaptive)
    kept = [part for part in ("repeats", "attention", "copying") if getattr(fusion.config, part)]
    gain = figures["ndcg@10"] / max(without, TINY) - 1
    worth = f"{gain:+.1%} NDCG@10 on validation ({without:.4f} without, {figures['ndcg@10']:.4f} with)"
    note = f"memory is worth {worth}; kept: {', '.join(kept) or 'none of its parts'}"
    return Epoch("memory", 1, 1, 0.0, figures, True, note)


@dataclass(frozen=True)
class Stage:
    """A part of the fit: which memories are used, the loss of scores (B, V) and targets (B,), how many epochs at most,
    and whether the rate decays over all of them, without an early stop.
    """

    name: str
    choose: Callable[[Replay], Retrieved]
    loss: Callable[[Tensor, Tensor], Tensor]
    max_epochs: int
    decays: bool = False


@dataclass(frozen=True)
class _Fit:
    """What all stages share. `table` is the encoder's, (items + 1, d)."""

    dataset: Dataset
    config: Config
    table: Tensor
    validation: Replay
    report: Report
    peers: Peers

    def __call__(self, stage: Stage, fusion: MemoryFusion, optimizer: torch.optim.Optimizer, samples: Replay) -> float:
        """Train what the optimiser holds until validation no longer improves; the best epoch's weights stay, those of
        before the first among them. Returns their NDCG@10.
        """
        settings, best = self.config.training, snapshot(fusion)
        trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for one in fusion.parameters():
            one.requires_grad_(id(one) in trained)
        progress = Progress(best=self.validated(fusion, stage.choose)["ndcg@10"])
        patience = stage.max_epochs if stage.decays else settings.fusion_patience
        rates = [group["lr"] for group in optimizer.param_groups]
        while not progress.over(stage.max_epochs, patience):
            if stage.decays:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = decayed(rate, progress.epoch / stage.max_epochs, settings.final_rate)
            self.peers.synchronise(fusion)
            rng = np.random.default_rng([settings.seed, 4, progress.epoch])
            loss = self._epoch(stage, fusion, optimizer, samples, rng)
            figures = self.validated(fusion, stage.choose)
            advance(progress, figures, fusion, best)
            is_best = progress.best_epoch == progress.epoch
            self.report(Epoch(stage.name, progress.epoch, stage.max_epochs, loss, figures, is_best))
        fusion.load_state_dict(best)
        return progress.best

    def validated(
        self, fusion: MemoryFusion, choose: Callable[[Replay], Retrieved], without: bool = False
    ) -> dict[str, float]:
        """Figures of the events that judge, unmasked; `without`: as if there were no repeat head."""
        mine = self.validation.take(self.peers.share)
        found = memory_ranks(fusion, self.table, self.dataset, mine, choose(mine), repeats=not without).unmasked
        return summary(self.peers.gathered(found, len(self.validation.event)))

    def _epoch(
        self,
        stage: Stage,
        fusion: MemoryFusion,
        optimizer: torch.optim.Optimizer,
        samples: Replay,
        rng: np.random.Generator,
    ) -> float:
        torch.manual_seed(int(rng.integers(2**31)))
        fusion.train()
        settings, losses = self.config.training, []
        order = rng.permutation(len(samples.event))
        for at in range(0, len(order), settings.fusion_batch):
            batch = samples.take(order[at : at + settings.fusion_batch])
            memories = MemoryTokens.of(stage.choose(batch), len(self.table) - 1)
            memories.item[torch.rand(memories.item.shape) < UNKNOWN_SHARE] = 0
            rows = self.peers.share
            with self.peers.own_randomness():
                mine = batch.take(rows)
                loss = self._loss(stage, fusion, mine, memories.take(rows)) if len(mine.event) else None
            losses.append(step(optimizer, fusion, loss, self.peers, len(mine.event) / len(batch.event)))
        return float(np.mean(losses))

    def _loss(self, stage: Stage, fusion: MemoryFusion, asked: Replay, memories: MemoryTokens) -> Tensor:
        had = mark(self.dataset.history(asked.before), len(self.table))
        prediction = predict(fusion, self.table, torch.from_numpy(asked.state), memories, had)
        target = torch.from_numpy(self.dataset.items[asked.event].astype(np.int64))
        return stage.loss(prediction.scores(), target)


def _no_memory(asked: Replay) -> Retrieved:
    return Retrieved.nothing(asked.retrieved.entropy, asked.retrieved.bank_size)


def _memory_optimizer(fusion: MemoryFusion, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; the few parameters of copying learn faster than the attention, the calibration stays as it is."""
    optimizer = adamw(fusion.attention(), settings.fusion_learning_rate, settings.fusion_weight_decay)
    quick = {"params": [*fusion.copy.parameters()], "lr": settings.copy_learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(quick)
    return optimizer


def fusion_targets(dataset: Dataset, settings: TrainingConfig, held_out: NDArray[np.bool_]) -> tuple[Targets, Targets]:
    """What the fusion is fitted on, and what, of other users, judges its epochs."""
    split, owner, event = split_of(dataset), dataset.owners(), np.arange(len(dataset))
    validation = Targets.of(split.validation, split.validation_end)
    place = np.random.default_rng(0).permutation(dataset.users)[owner[validation.event]]
    if settings.fusion_targets == "validation":
        judge = place < max(1, dataset.users // 5)
        fitted, judging = validation.take(~judge), validation.take(judge)
    else:
        some = np.flatnonzero(held_out[owner] & (event < split.train_end[owner]))
        fitted, judging = Targets(some, some), validation.take(place < VALIDATION_USERS)
    return some_of(fitted, settings.fusion_samples, settings.seed), some_of(judging, VALIDATION_USERS, settings.seed)


def _unseen(dataset: Dataset, state: Floats, space: MemorySpace, fitted: Targets, judging: Targets) -> Replay:
    """Replays of what the fusion is fitted on, then of what judges it: events that the encoder was not trained on."""
    pairs = ((fitted.event, judging.event), (fitted.before, judging.before))
    both = Targets(*(np.concatenate(pair) for pair in pairs))
    return collective(dataset, state, space, replay(dataset, state, space, both).replay, "train")


def repeat_bias(dataset: Dataset, table: Tensor, asked: Replay) -> float:
    """The bias on items that the user has had which makes repeats as likely as they are."""
    return likely_bias(dataset, table, asked, dataset.history(asked.before))


@torch.inference_mode()
def likely_bias(dataset: Dataset, table: Tensor, asked: Replay, items: Sequence[Ints]) -> float:
    """The bias on some items of each question which makes taking one of them as likely as it is: the maximum-likelihood
    one of the encoder alone, half an event added so that it stays finite where it never happens. In [−15, 15].
    """
    mass, hits = [], 0.5
    for at in range(0, len(asked.event), RANK_ROWS):
        event = asked.event[at : at + RANK_ROWS]
        some = mark(items[at : at + RANK_ROWS], len(table))
        logits = torch.from_numpy(asked.state[at : at + RANK_ROWS, : table.shape[1]]) @ table.T
        logits[:, 0] = -torch.inf
        mass.append((torch.softmax(logits, dim=1) * some).sum(dim=1))
        hits += float(some[np.arange(len(event)), dataset.items[event]].sum())
    share = torch.cat(mass).double().clamp(1e-12, 1 - 1e-12)
    low, high = -15.0, 15.0
    for _ in range(50):
        middle = (low + high) / 2
        expected = float(torch.sigmoid(torch.logit(share) + middle).sum())
        low, high = (low, middle) if expected > hits else (middle, high)
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
    repeats: bool = True,
) -> Ranks:
    """Ranks with the memories in `retrieved`, among all items of the dataset; those that the model does not know can
    only be copied.

    Args:
        table: the encoder's, (items + 1, d).
        calibrated: whether repeat bias and shift are added. repeats: whether what the repeat head knows is added, its
            bias on all that was seen included.
    """
    fusion.eval()
    found, kept = [], fusion.config.repeats
    keep(fusion, repeats=kept and repeats)
    for at in range(0, len(asked.event), RANK_ROWS):
        rows = slice(at, at + RANK_ROWS)
        event = asked.event[rows]
        target = dataset.items[event].astype(np.int64)
        memories = MemoryTokens.of(retrieved.take(rows), len(table) - 1)
        had = mark(dataset.history(asked.before[rows]), dataset.item_count + 1)
        known = had[:, : len(table)]
        scores = predict(fusion, table, torch.from_numpy(asked.state[rows]), memories, known, calibrated).scores()
        scores = functional.pad(scores, (0, had.shape[1] - scores.shape[1]), value=-torch.inf)
        unmasked = ranks(scores.numpy(), target)
        had[np.arange(len(target)), target] = False
        found.append((unmasked, ranks(scores.masked_fill_(had, -torch.inf).numpy(), target)))
    keep(fusion, repeats=kept)
    return Ranks(*(np.concatenate(part) for part in zip(*found, strict=True)))
