"""A raw log of interactions, and the files that hold one. No torch.

Any fault of a file is a `DatasetError` that names file, line and column.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from model.errors import RamrecError

Metadata = dict[str, dict[str, Any]]

ID_BYTES = 256
"""Most bytes of a user or item id, as on the wire."""
LATEST_S = 1e11
"""Timestamps from here on (the year 5138) are taken for milliseconds and refused, as the API does."""
RATING_LIMIT = 1e9
"""Largest absolute value of a rating, as on the wire."""
FORMATS = "a RecBole folder with a .inter file, .inter, .csv, .csv.gz, .parquet, or a sequence file (.txt, .txt.gz)"


class DatasetError(RamrecError):
    """Interactions that cannot be used; the message names the file, and the line and column if there are any."""


@dataclass(frozen=True)
class Interactions:
    """A raw log in file order, not filtered.

    user, item: (N,) int64 indices from 0 into `user_ids` and `item_ids`, which are in order of first appearance.
    time: (N,) float64 seconds UTC, or None. rating: (N,) float32, NaN = none, or None.
    metadata: attributes by item id.
    basket: (N,) int64 indices from 0 into `basket_ids`, −1 = no basket, or None.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    time: NDArray[np.float64] | None = None
    rating: NDArray[np.float32] | None = None
    metadata: Metadata = field(default_factory=dict)
    basket: NDArray[np.int64] | None = None
    basket_ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.user)


def log_file(path: str | Path) -> Path:
    """The file that holds the interactions: the path itself, or the .inter file of a RecBole folder. Raises
    DatasetError.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder")
    return _atomic_file(path) if path.is_dir() else path


def kind_of(file: Path) -> str:
    """The suffix of a file without `.gz`, which tells its format."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def open_log(file: Path) -> gzip.GzipFile | BinaryIO:
    """Open a file for reading bytes, decompressed if it ends in .gz."""
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def id_problem(name: str) -> str:
    """What is wrong with an id, or ""."""
    if not name.strip():
        return "missing id"
    if "\0" in name:
        return "an id cannot contain NUL"
    size = len(name.encode())
    return f"id of {size} bytes, at most {ID_BYTES} are allowed: {name[:20]}…" if size > ID_BYTES else ""


def _atomic_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.inter"))
    named = folder / f"{folder.name}.inter"
    if not found:
        raise DatasetError(f"{folder}: no .inter file in this folder; expected {FORMATS}")
    if len(found) > 1 and named not in found:
        raise DatasetError(f"{folder}: several .inter files ({', '.join(f.name for f in found)}); name one of them")
    return named if named in found else found[0]
