"""What both training stages share: progress and early stopping, optimiser steps, saving and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import RamrecError
from model.training.distributed import ALONE, Peers

STATE_FILE = "training.safetensors"


class TrainingError(RamrecError):
    """Training cannot go on; the message says why."""


@dataclass(frozen=True)
class Epoch:
    """What is reported after every epoch. `of`: the most epochs of the stage; `note`: a closing remark."""

    stage: str
    epoch: int
    of: int
    loss: float
    validation: dict[str, float]
    best: bool
    note: str = ""


Report = Callable[[Epoch], None]


@dataclass
class Progress:
    """Progress of a stage: epochs done, the best validation NDCG@10 and its epoch, and the metrics of every epoch."""

    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def over(self, max_epochs: int, patience: int) -> bool:
        """Whether to stop: after `max_epochs`, or `patience` epochs without a better one."""
        return self.epoch >= max_epochs or self.epoch - self.best_epoch >= patience


def adamw(parameters: Iterable[torch.nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices only."""
    parameters = list(parameters)
    matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def decayed(rate: float, done: float, final: float) -> float:
    """The learning rate by cosine decay, from `rate` to `final`·rate as `done` goes from 0 to 1.

    >>> [decayed(1.0, done, 0.0) for done in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    return rate * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the following steps."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def step(
    optimizer: torch.optim.Optimizer,
    network: torch.nn.Module,
    loss: Tensor | None,
    peers: Peers = ALONE,
    part: float = 1.0,
) -> float:
    """One optimiser step with clipped gradients; returns the mean loss over all processes. loss, part: see
    `Peers.backward`. Raises TrainingError if the loss is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    mean = peers.backward(network, loss, part)
    if not math.isfinite(mean):
        raise TrainingError(f"the loss is {mean}: lower the learning rate, or check the data")
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return mean


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: values.detach().clone() for name, values in network.state_dict().items()}


def named_weights(network: torch.nn.Module, prefix: str) -> dict[str, NDArray[Any]]:
    """All weights as arrays, with `prefix` before their names."""
    return {prefix + name: values.cpu().numpy() for name, values in snapshot(network).items()}


def advance(progress: Progress, figures: dict[str, float], network: torch.nn.Module, best: dict[str, Tensor]) -> None:
    """Count an epoch with validation metrics `figures`; copy its weights to `best` if it is the best so far."""
    progress.epoch += 1
    progress.history.append(figures)
    if figures["ndcg@10"] > progress.best:
        progress.best, progress.best_epoch = figures["ndcg@10"], progress.epoch
        best.update(snapshot(network))


def save_state(
    run: Path,
    fingerprint: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    progress: Progress,
) -> None:
    """Save all that resuming needs in `run`, replacing the last state."""
    run.mkdir(parents=True, exist_ok=True)
    tensors = {f"now.{name}": values for name, values in snapshot(network).items()}
    tensors |= {f"best.{name}": values for name, values in best.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    file = run / STATE_FILE
    about = {"fingerprint": fingerprint, "progress": json.dumps(asdict(progress))}
    save_file(tensors, file.with_suffix(".partial"), metadata=about)
    file.with_suffix(".partial").replace(file)


def resume(
    run: Path,
    fingerprint: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
) -> Progress:
    """Load a saved state into network, optimiser and `best`; without one, return fresh progress.

    Raises:
        TrainingError: the state belongs to another config or dataset.
    """
    file = run / STATE_FILE
    if not file.exists():
        return Progress()
    about = _metadata(file)
    if about.get("fingerprint") != fingerprint:
        raise TrainingError(f"{file} belongs to another config or dataset; use another --out or delete it")
    tensors = load_file(file)
    network.load_state_dict({n[4:]: v for n, v in tensors.items() if n.startswith("now.")})
    best.update({n[5:]: v for n, v in tensors.items() if n.startswith("best.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, values in tensors.items():
        if name.startswith("adam."):
            _, number, moment = name.split(".")
            moments.setdefault(int(number), {})[moment] = values
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return Progress(**json.loads(about["progress"]))


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}
