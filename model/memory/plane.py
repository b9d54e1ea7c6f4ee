"""A plane on which memories are drawn: keys that lie close were written in similar situations. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.memory.rules import Floats


@dataclass(frozen=True)
class Plane:
    """A plane in the space of keys: origin (d,) and orthonormal axes (d, 2), float32. The `key_plane` (3, d) of a
    checkpoint holds the origin, then the axes.
    """

    origin: NDArray[np.float32]
    axes: NDArray[np.float32]

    @classmethod
    def through(cls, points: Floats) -> Plane:
        """The plane of the first two principal directions of `points` (n, d), d ≥ 2, which keeps most of their spread.

        Computed once from the keys of all users, it gives each memory a place that does not move when a bank grows.
        """
        wide = points.astype(np.float64)
        origin = wide.mean(axis=0)
        _, directions = np.linalg.eigh((wide - origin).T @ (wide - origin))
        axes = directions[:, :-3:-1]
        sign = np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # the sign of a direction is arbitrary: fix it
        return cls(origin.astype(np.float32), (axes * sign).astype(np.float32))

    @classmethod
    def of(cls, table: NDArray[np.float32]) -> Plane:
        """The plane in the `key_plane` (3, d) of a checkpoint."""
        return cls(table[0], table[1:].T)

    def places(self, keys: Floats) -> NDArray[np.float32]:
        """The coordinates (..., 2) of keys (..., d)."""
        return np.asarray((keys.astype(np.float32) - self.origin) @ self.axes, np.float32)
