"""A plane on which memories are drawn: keys near each other were written in like situations. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.rules import Floats


@dataclass(frozen=True)
class Plane:
    """Two directions in the space of keys; origin (d,), axes (d, 2) orthonormal, float32."""

    origin: NDArray[np.float32]
    axes: NDArray[np.float32]

    @classmethod
    def through(cls, points: Floats) -> Plane:
        """The plane that keeps most of the spread of `points` (n, d), d ≥ 2: their first two principal directions.

        Through the centroids of a model's collective index it shows all users' memories in one place each, which does
        not move when a bank grows.
        """
        wide = points.astype(np.float64)
        origin = wide.mean(axis=0)
        _, directions = np.linalg.eigh((wide - origin).T @ (wide - origin))
        axes = directions[:, :-3:-1]
        sign = np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # a direction has none of itself
        return cls(origin.astype(np.float32), (axes * sign).astype(np.float32))

    def places(self, keys: Floats) -> NDArray[np.float32]:
        """Where keys (..., d) lie: (..., 2)."""
        return np.asarray((keys.astype(np.float32) - self.origin) @ self.axes, np.float32)
