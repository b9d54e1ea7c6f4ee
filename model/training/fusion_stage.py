"""Stage two: the fusion learns when memories help, on events new to the encoder. See `model.training.train`."""

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
from model.memory.retrieval import Retrieved
from model.memory.rules import Floats, Ints
from model.network.encoder import SequenceEncoder
from model.network.fusion import TINY, MemoryFusion, MemoryTokens
from model.network.losses import smooth_ndcg_loss
from model.network.tensors import evaluating, item_mask
from model.serving.recommender import predict
from model.training.distributed import ALONE, Peers
from model.training.memory_rules import recent_targets, some_of
from model.training.metrics import ndcg, ranks, summary
from model.training.optimisation import Epoch, Progress, Report, adamw, advance, decayed, snapshot, step
from model.training.replay import MemorySpace, Replay, adaptive, collective, own_memories, replay

UNKNOWN_SHARE = 0.02
"""Share of memories whose item is hidden from the fusion in training, so that unknown items get an embedding."""
RANK_ROWS = 256
"""Rows of scores that ranking holds at once."""
VALIDATION_USERS = 6000
"""Most users whose validation items judge an epoch of the fusion, and most of these items."""
ENOUGH_UNSEEN = 5000
"""The repeat head is fitted on events that the encoder was not trained on if there are at least this many."""
STANDARD_ROWS = 4096
"""Questions from which the inputs of the repeat head are standardised."""


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
    """The fusion of the best validation epochs, in evaluation mode, and whether lists are better without the items that
    the user had. Its config says which parts were kept.

    It is trained on `fusion_targets` in three stages: first the calibration, without any memory; then the repeat head;
    then copying and cross-attention. Each stage leaves the parameters of the earlier ones as they are, so the gain of
    memory is measured over an encoder that was calibrated on the same events. A stage in which no epoch improves
    validation changes nothing. In the end, every part without which validation is as good is left out.

    Args:
        state: (N, d) the dataset's `trajectory`. held_out: (users,) bool, users that the encoder was not trained on.
    """
    settings = config.training
    torch.manual_seed(settings.seed + 1)
    fusion = MemoryFusion(config.fusion, config.encoder.dim).to(peers.device)
    fitted, judging = fusion_targets(dataset, settings, held_out)
    unseen = _unseen(dataset, state, space, fitted, judging)
    samples, validation = unseen.take(slice(None, len(fitted))), unseen.take(slice(len(fitted), None))
    fit = _Fit(dataset, config, encoder.table().detach(), validation, report, peers)
    _calibrate(fit, fusion, samples)
    if space.rules.activation:
        few, recent = len(fitted) < ENOUGH_UNSEEN, recent_targets(dataset, settings, settings.repeat_samples)
        replayed = replay(dataset, state, space, recent).replay if few else None
        _fit_repeats(fit, fusion, samples, unseen, replayed)
    else:
        set_parts(fusion, repeats=False)
    stage = Stage("fusion", adaptive, _rank_loss(settings.rank_temperature), settings.fusion_max_epochs)
    fit(stage, fusion, _memory_optimizer(fusion, settings), samples)
    _leave_out(fit, fusion)
    report(_worth(fit, fusion))
    return fusion.eval(), _better_without_seen(fit, fusion)


def set_parts(fusion: MemoryFusion, **parts: bool) -> None:
    """Set which parts of the fusion are used (`attention`, `copying`, … of `FusionConfig`)."""
    fusion.config = fusion.config.model_copy(update=parts)


def _calibrate(fit: _Fit, fusion: MemoryFusion, samples: Replay) -> None:
    """Fit repeat bias and shift: those of the best epoch, the bias alone, or neither, whichever validates best."""
    settings = fit.config.training
    progress, best = Progress(), snapshot(fusion)
    for bias in (0.0, repeat_bias(fit.dataset, fit.table, samples)):
        fusion.repeat_bias.data.fill_(bias)
        advance(progress, fit.validated(fusion, _no_memory), fusion, best)
    fusion.load_state_dict(best)
    optimizer = adamw(fusion.calibration_parameters(), settings.fusion_calibration_rate, 0.0)
    rank_loss = _rank_loss(settings.rank_temperature)
    fit(Stage("calibration", _no_memory, rank_loss, settings.fusion_max_epochs), fusion, optimizer, samples)


def _fit_repeats(fit: _Fit, fusion: MemoryFusion, samples: Replay, unseen: Replay, recent: Replay | None) -> None:
    """Fit the repeat head twice, by likelihood and by smooth rank, and keep the better one.

    It is shown the model's own log-probability only if there are enough events that the encoder was not trained on.
    Otherwise it is fitted on `recent` training events, of which the model is too certain, and all `unseen` ones judge.
    """
    settings = fit.config.training
    set_parts(fusion, attention=False, copying=False, repeats=True, repeat_log_p=recent is None)
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
    set_parts(fusion, attention=fit.config.fusion.attention, copying=fit.config.fusion.copying)


def _repeats_optimizer(fusion: MemoryFusion, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; the two biases have the learning rate of copying."""
    head = fusion.repeats
    optimizer = adamw(head.layers.parameters(), settings.repeat_learning_rate, settings.fusion_weight_decay)
    biases = {"params": [head.seen, head.present], "lr": settings.copy_learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(biases)
    return optimizer


def _basket_bias(fit: _Fit, samples: Replay) -> float:
    """The bias on items in the same basket that makes taking them again as likely as observed; 0 without baskets."""
    in_basket = [row[row > 0] for row in samples.retrieved.present]
    return likely_bias(fit.dataset, fit.table, samples, in_basket) if any(map(len, in_basket)) else 0.0


def _rank_loss(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(smooth_ndcg_loss, temperature=temperature)


@torch.inference_mode()
def _standardise(fit: _Fit, fusion: MemoryFusion, samples: Replay) -> None:
    sample = samples.take(np.random.default_rng(0).permutation(len(samples.event))[:STANDARD_ROWS])
    memories = MemoryTokens.of(own_memories(sample), len(fit.table) - 1).to(fit.table.device)
    item = memories.item[:, : memories.own]
    logits = torch.from_numpy(sample.state[:, : fit.table.shape[1]]).to(fit.table.device) @ fit.table.T
    log_p = fusion.visible_log_p(torch.log_softmax(logits, dim=1).gather(1, item))
    fusion.repeats.standardise(fusion.repeats.inputs(memories, log_p)[memories.valid[:, : memories.own]])


def _leave_out(fit: _Fit, fusion: MemoryFusion) -> None:
    """Leave out every part without which validation is as good, the most expensive one first."""
    figure = fit.validated(fusion, adaptive)["ndcg@10"]
    for part in ("copying", "attention", "repeats"):
        if getattr(fusion.config, part):
            set_parts(fusion, **{part: False})
            without = fit.validated(fusion, adaptive)["ndcg@10"]
            if without < figure:
                set_parts(fusion, **{part: True})
            figure = max(figure, without)


def _better_without_seen(fit: _Fit, fusion: MemoryFusion) -> bool:
    """Whether lists without the items that the user had are as good, although they miss every repeat."""
    asked = fit.validation
    found = memory_ranks(fusion, fit.table, fit.dataset, asked, adaptive(asked))
    repeat = fit.dataset.is_repeat()[asked.event]
    return float(np.mean(ndcg(found.masked) * ~repeat)) >= float(np.mean(ndcg(found.unmasked)))


def _worth(fit: _Fit, fusion: MemoryFusion) -> Epoch:
    """The gain of memory on the events that judged: the closing remark of a training."""
    without = fit.validated(fusion, _no_memory, repeats=False)["ndcg@10"]
    figures = fit.validated(fusion, adaptive)
    kept = [part for part in ("repeats", "attention", "copying") if getattr(fusion.config, part)]
    gain = figures["ndcg@10"] / max(without, TINY) - 1
    worth = f"{gain:+.1%} NDCG@10 on validation ({without:.4f} without, {figures['ndcg@10']:.4f} with)"
    note = f"memory is worth {worth}; kept: {', '.join(kept) or 'none of its parts'}"
    return Epoch("memory", 1, 1, 0.0, figures, True, note)


@dataclass(frozen=True)
class Stage:
    """A part of the fit: which memories are used, the loss from scores (B, V) and targets (B,), the most epochs, and
    whether the learning rate decays over all of them, without an early stop.
    """

    name: str
    choose: Callable[[Replay], Retrieved]
    loss: Callable[[Tensor, Tensor], Tensor]
    max_epochs: int
    decays: bool = False


@dataclass(frozen=True)
class _Fit:
    """What all stages share. table (items + 1, d): the encoder's; validation: the events that judge."""

    dataset: Dataset
    config: Config
    table: Tensor
    validation: Replay
    report: Report
    peers: Peers

    def __call__(self, stage: Stage, fusion: MemoryFusion, optimizer: torch.optim.Optimizer, samples: Replay) -> float:
        """Train the parameters of the optimiser until validation stops improving. The weights of the best epoch stay,
        or those from before the first epoch if none was better. Returns their NDCG@10.
        """
        settings, best = self.config.training, snapshot(fusion)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in fusion.parameters():
            parameter.requires_grad_(id(parameter) in trained)
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
        self, fusion: MemoryFusion, choose: Callable[[Replay], Retrieved], repeats: bool = True
    ) -> dict[str, float]:
        """Metrics of the events that judge, unmasked. repeats: whether the repeat head is used."""
        own = self.validation.take(self.peers.share)
        found = memory_ranks(fusion, self.table, self.dataset, own, choose(own), repeats=repeats).unmasked
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
            memories = MemoryTokens.of(stage.choose(batch), len(self.table) - 1).to(fusion.device)
            memories.item[torch.rand(memories.item.shape, device=fusion.device) < UNKNOWN_SHARE] = 0
            rows = self.peers.share
            with self.peers.own_randomness():
                own = batch.take(rows)
                loss = self._loss(stage, fusion, own, memories.take(rows)) if len(own.event) else None
            losses.append(step(optimizer, fusion, loss, self.peers, len(own.event) / len(batch.event)))
        return float(np.mean(losses))

    def _loss(self, stage: Stage, fusion: MemoryFusion, asked: Replay, memories: MemoryTokens) -> Tensor:
        had = item_mask(self.dataset.history(asked.before), len(self.table), fusion.device)
        state = torch.from_numpy(asked.state).to(fusion.device)
        prediction = predict(fusion, self.table, state, memories, had)
        target = torch.from_numpy(self.dataset.items[asked.event].astype(np.int64)).to(fusion.device)
        return stage.loss(prediction.scores(), target)


def _no_memory(asked: Replay) -> Retrieved:
    return Retrieved.nothing(asked.retrieved.entropy, asked.retrieved.bank_size)


def _memory_optimizer(fusion: MemoryFusion, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW for attention and copying, whose few parameters learn faster; the calibration is not changed."""
    optimizer = adamw(fusion.attention_parameters(), settings.fusion_learning_rate, settings.fusion_weight_decay)
    copying = {"params": [*fusion.copy.parameters()], "lr": settings.copy_learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(copying)
    return optimizer


def fusion_targets(dataset: Dataset, settings: TrainingConfig, held_out: NDArray[np.bool_]) -> tuple[Targets, Targets]:
    """The events that the fusion is fitted on, and those of other users that judge its epochs. held_out: (users,)."""
    split, owner, event = split_of(dataset), dataset.owners(), np.arange(len(dataset))
    validation = Targets.of(split.validation, split.validation_end)
    place = np.random.default_rng(0).permutation(dataset.users)[owner[validation.event]]
    if settings.fusion_targets == "validation":
        judge = place < max(1, dataset.users // 5)
        fitted, judging = validation.take(~judge), validation.take(judge)
    else:
        events = np.flatnonzero(held_out[owner] & (event < split.train_end[owner]))
        fitted, judging = Targets(events, events), validation.take(place < VALIDATION_USERS)
    return some_of(fitted, settings.fusion_samples, settings.seed), some_of(judging, VALIDATION_USERS, settings.seed)


def _unseen(dataset: Dataset, state: Floats, space: MemorySpace, fitted: Targets, judging: Targets) -> Replay:
    """Replays of the events that the fusion is fitted on, then of those that judge it; all are new to the encoder."""
    pairs = ((fitted.event, judging.event), (fitted.before, judging.before))
    both = Targets(*(np.concatenate(pair) for pair in pairs))
    return collective(dataset, state, space, replay(dataset, state, space, both).replay, "train")


def repeat_bias(dataset: Dataset, table: Tensor, asked: Replay) -> float:
    """The bias on items that the user had that makes repeats as likely as observed."""
    return likely_bias(dataset, table, asked, dataset.history(asked.before))


@torch.inference_mode()
def likely_bias(dataset: Dataset, table: Tensor, asked: Replay, items: Sequence[Ints]) -> float:
    """The bias on the given items of each question that makes taking one of them as likely as observed, in [−15, 15].

    It is the maximum-likelihood bias for the encoder alone. Half an event is added to the observed ones, so that it
    stays finite if there are none.
    """
    mass, hits = [], 0.5
    for at in range(0, len(asked.event), RANK_ROWS):
        event = asked.event[at : at + RANK_ROWS]
        raised = item_mask(items[at : at + RANK_ROWS], len(table), table.device)
        logits = torch.from_numpy(asked.state[at : at + RANK_ROWS, : table.shape[1]]).to(table.device) @ table.T
        logits[:, 0] = -torch.inf
        mass.append((torch.softmax(logits, dim=1) * raised).sum(dim=1))
        hits += float(raised[np.arange(len(event)), dataset.items[event]].sum())
    share = torch.cat(mass).double().clamp(1e-12, 1 - 1e-12)
    low, high = -15.0, 15.0
    for _ in range(50):
        middle = (low + high) / 2
        expected = float(torch.sigmoid(torch.logit(share) + middle).sum())
        low, high = (low, middle) if expected > hits else (middle, high)
    return (low + high) / 2


@dataclass(frozen=True)
class Ranks:
    """The rank of the item of each event that was asked for, (N,) int64 each: among all items (unmasked), and among
    those that the user did not have before (masked).
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
    """Ranks with the memories in `retrieved`, among all items of the dataset. Items that the model does not know can
    only be copied.

    Args:
        table: (items + 1, d) the encoder's.
        calibrated: whether repeat bias and shift are added. repeats: whether the repeat head is used, its bias on items
            that the user had included.
    """
    found = []
    with evaluating(fusion):
        for at in range(0, len(asked.event), RANK_ROWS):
            rows = slice(at, at + RANK_ROWS)
            target = dataset.items[asked.event[rows]].astype(np.int64)
            memories = MemoryTokens.of(retrieved.take(rows), len(table) - 1).to(fusion.device)
            had = item_mask(dataset.history(asked.before[rows]), dataset.item_count + 1, fusion.device)
            known, state = had[:, : len(table)], torch.from_numpy(asked.state[rows]).to(fusion.device)
            prediction = predict(fusion, table, state, memories, known, calibrated=calibrated, repeats=repeats)
            scores = prediction.scores()
            scores = functional.pad(scores, (0, had.shape[1] - scores.shape[1]), value=-torch.inf)
            unmasked = ranks(scores.cpu().numpy(), target)
            had[np.arange(len(target)), target] = False
            found.append((unmasked, ranks(scores.masked_fill_(had, -torch.inf).cpu().numpy(), target)))
    return Ranks(*(np.concatenate(part) for part in zip(*found, strict=True)))
