"""Datasets: filter, order, split, windows and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.config import DatasetConfig
from model.data.dataset import k_core, leave_one_out, length_batches, pad_windows, read_dataset
from tests.model.data.logs import ALL, by_user, refused, write


def test_without_times_the_position_is_the_time(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", "user_id,item_id\na,x\nb,x\na,y\nc,z\na,x\nb,y\n")
    dataset = read_dataset(file, DatasetConfig(core=2))
    assert by_user(dataset) == {"a": ["x", "y", "x"], "b": ["x", "y"]}
    assert dataset.times.tolist() == [0, 1, 2, 0, 1]
    assert not dataset.has_times
    assert np.isnan(dataset.ratings).all()


def test_ties_stay_in_file_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times, users = rng.integers(0, 3, 400), rng.integers(0, 5, 400)
    rows = [f"{u},{n},{t}" for n, (u, t) in enumerate(zip(users, times, strict=True))]
    file = write(tmp_path / "log.csv", "\n".join(["user_id,item_id,timestamp", *rows]))
    expected: dict[str, list[str]] = {}
    for n in sorted(range(400), key=lambda n: times[n]):
        expected.setdefault(str(users[n]), []).append(str(n))
    assert by_user(read_dataset(file, ALL)) == expected


def test_empty_after_filtering(atomic: Path) -> None:
    parts = ["empty after filtering", "4 interactions of 2 users with 3 items", "5-core"]
    refused(atomic, *parts, config=DatasetConfig())


def test_k_core_by_hand() -> None:
    # item 2 has one event; without it user 2 has one, without user 2 item 1 still has two
    user = np.array([0, 0, 1, 1, 2, 2])
    item = np.array([0, 1, 0, 1, 1, 2])
    assert k_core(user, item, 2).tolist() == [True, True, True, True, False, False]
    assert k_core(user, item, 1).all()
    assert not k_core(user, item, 3).any()
    assert k_core(user[:0], item[:0], 2).tolist() == []


events = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)


def slow_core(pairs: list[tuple[int, int]], core: int) -> list[int]:
    """One user or item at a time, in any order: the k-core does not depend on it."""
    left = list(range(len(pairs)))
    while True:
        for side in (0, 1):
            have = [pairs[n][side] for n in left]
            poor = next((name for name in have if have.count(name) < core), None)
            if poor is not None:
                left = [n for n in left if pairs[n][side] != poor]
                break
        else:
            return left


@given(events, st.integers(1, 5))
def test_k_core_is_the_largest_part_with_enough_of_everything(pairs: list[tuple[int, int]], core: int) -> None:
    user, item = np.array(pairs, np.int64).reshape(-1, 2).T
    keep = k_core(user, item, core)
    assert np.flatnonzero(keep).tolist() == slow_core(pairs, core)
    assert k_core(user[keep], item[keep], core).all()


def test_ids_of_filtered_users_and_items_are_gone(tmp_path: Path) -> None:
    file = write(tmp_path / "log.txt", "a q x y\nb x\nc y x\n")
    dataset = read_dataset(file, DatasetConfig(core=2))
    assert by_user(dataset) == {"a": ["x", "y"], "c": ["y", "x"]}
    assert dataset.item_ids == ("x", "y")
    assert dataset.times.tolist() == [0, 1, 0, 1]
    assert dataset.owners().tolist() == [0, 0, 1, 1]
    assert dataset.positions().tolist() == [0, 1, 0, 1]


def test_leave_one_out(tmp_path: Path) -> None:
    split = leave_one_out(read_dataset(write(tmp_path / "log.txt", "a 1 2 3 4\nb 1 2\nc 1 2 3\nd 1\n"), ALL))
    assert split.train_end.tolist() == [2, 6, 7, 10]
    assert split.validation.tolist() == [2, -1, 7, -1]
    assert split.test.tolist() == [3, -1, 8, -1]


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5))
def test_windows_are_padded_on_the_right(rows: list[list[int]]) -> None:
    items = np.array([item for row in rows for item in row], np.int32)
    length = np.array([len(row) for row in rows], np.int64)
    padded = pad_windows(items, np.cumsum(length) - length, length)
    width = max(map(len, rows), default=0)
    assert padded.dtype == np.int64
    assert padded.tolist() == [row + [0] * (width - len(row)) for row in rows]


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 40))
def test_batches_hold_every_sequence_once_and_keep_to_their_size(lengths: list[int], tokens: int) -> None:
    batches = length_batches(np.array(lengths, np.int64), tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(1, *(lengths[index] for index in batch)) <= tokens
