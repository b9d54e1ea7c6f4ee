"""A plane on which memories are drawn: keys near each other were written in like situations. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.memory.rules import Floats


@dataclass(frozen=True)
class Plane:
    """Two directions in the space of keys; origin (d,), axes (d, 2) orthonormal, float32. In a checkpoint's `key_plane`
    (3, d) the origin comes first.
    """

    origin: NDArray[np.float32]
    axes: NDArray[np.float32]

    @classmethod
    def through(cls, points: Floats) -> Plane:
        """The plane that keeps most of the spread of `points` (n, d), d ≥ 2: their first two principal directions.

        Through keys of all users it shows each memory in one place, which does not move when a bank grows.
        """
        wide = points.astype(np.float64)
        origin = wide.mean(axis=0)
        _, directions = np.linalg.eigh((wide - origin).T @ (wide - origin))
        axes = directions[:, :-3:-1]
        sign = np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # a direction has none of itself
        return cls(origin.astype(np.float32), (axes * sign).astype(np.float32))

    @classmethod
    def of(cls, table: NDArray[np.float32]) -> Plane:
        """The plane that a checkpoint's table (3, d) says."""
        return cls(table[0], table[1:].T)

    def places(self, keys: Floats) -> NDArray[np.float32]:
        """Where keys (..., d) lie: (..., 2)."""
        return np.asarray((keys.astype(np.float32) - self.origin) @ self.axes, np.float32)
