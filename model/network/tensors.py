"""What networks run on, and how arrays become tensors there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from model.errors import RamrecError
from model.memory.rules import Ints

CPU = torch.device("cpu")


class DeviceError(RamrecError):
    """The requested device cannot be used; the message says why."""


def find_device(name: str) -> torch.device:
    """The device of this name: `cpu`, `cuda` (this process's current GPU), or `auto` (a GPU if there is one).

    Raises:
        DeviceError: `cuda` where PyTorch sees no GPU, or another name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device {name}: unknown; use auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        built = "" if torch.version.cuda or torch.version.hip else "; this PyTorch is built for the CPU"
        raise DeviceError(f"device cuda: PyTorch sees no GPU{built}; use --device cpu")
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")


def item_mask(items: Sequence[Ints], width: int, device: torch.device) -> Tensor:
    """(B, width) bool: True at the item indices of each row, of which there are B; index 0 (padding) stays False."""
    mask = np.zeros((len(items), width), bool)
    rows = np.repeat(np.arange(len(items)), [len(row) for row in items])
    mask[rows, np.concatenate([np.zeros(0, np.int64), *items])] = True
    mask[:, 0] = False
    return torch.from_numpy(mask).to(device)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, and back in the mode that it was in."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
