"""Small logs, how they are written, and what is asked of reading them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from model.config import DatasetConfig
from model.data.dataset import Dataset, read_dataset
from model.data.interactions import DatasetError

ALL = DatasetConfig(core=1)
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
INTER = HEADER + "bob\tx\t4\t30\namy\ty\t5\t20\nbob\tz\t2\t10\nbob\ty\t1\t30\n"
ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tprice:float\tclass:token_seq\tbox:float_seq\n"
    'x\tSay "Hi" Again\t1995\t1.5\tDrama Comedy\t1 2.5\n'
    "y\tOther\tunknown\t\tWar\t\n"
)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def by_user(dataset: Dataset) -> dict[str, list[str]]:
    names = np.array(("", *dataset.item_ids))
    return {user: names[dataset.items[dataset.sequence(n)]].tolist() for n, user in enumerate(dataset.user_ids)}


def refused(path: Path, *parts: str, config: DatasetConfig = ALL) -> None:
    with pytest.raises(DatasetError) as caught:
        read_dataset(path, config)
    for part in (str(path), *parts):
        assert part in str(caught.value)
