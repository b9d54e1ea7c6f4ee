"""Sets of items as boolean rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.memory.rules import Ints


def mark(items: Sequence[Ints], width: int) -> Tensor:
    """(B, width) bool: True at each row's items; index 0 is never marked."""
    marks = np.zeros((len(items), width), bool)
    rows = np.repeat(np.arange(len(items)), [len(one) for one in items])
    marks[rows, np.concatenate([np.zeros(0, np.int64), *items])] = True
    marks[:, 0] = False
    return torch.from_numpy(marks)
