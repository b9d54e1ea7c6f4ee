"""The numbers that stand for items and users, as types that mypy keeps apart."""

from __future__ import annotations

from typing import NewType

import numpy as np
from numpy.typing import NDArray

CatalogueNumber = NewType("CatalogueNumber", int)
"""The number of an item in the catalogue in Redis, the same for all models and processes; 0 is no item."""
CatalogueNumbers = NewType("CatalogueNumbers", NDArray[np.int64])
"""Catalogue numbers, of any shape."""
ItemIndex = NewType("ItemIndex", int)
"""The row of an item in one model's tables; 0 is padding, or an item that the model does not know."""
ItemIndices = NewType("ItemIndices", NDArray[np.int64])
"""Item indices, of any shape."""
UserSlot = NewType("UserSlot", int)
"""The place of a user in the arrays of one process; it never leaves the process."""
