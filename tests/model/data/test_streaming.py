"""Logs read in portions: the same interactions as when read whole, the same errors, bounded memory."""

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv as pacsv

from model.config import DatasetConfig
from model.data.interactions import DatasetError
from model.data.reading import read_interactions
from model.data.streaming import LogLine, portions

ROWS = [(f"u{n % 7}", f"i{n % 31}", 1_600_000_000.0 + n * 37 % 1000, None if n % 5 == 0 else n % 5) for n in range(250)]


def table() -> pa.Table:
    users, items, times, ratings = (list(column) for column in zip(*ROWS, strict=True))
    return pa.table({"user_id": users, "item_id": items, "timestamp": times, "rating": ratings})


def write(folder: Path, kind: str) -> Path:
    """The rows in a file of a kind; in several record batches where it has such."""
    file = folder / f"log.{kind}"
    if kind == "parquet":
        pq.write_table(table(), file, row_group_size=60, use_dictionary=["item_id"])
    elif kind == "csv":
        pacsv.write_csv(table(), file)
    elif kind == "csv.gz":
        file.write_bytes(gzip.compress(write(folder, "csv").read_bytes()))
    elif kind == "inter":
        rows = ["\t".join("" if value is None else str(value) for value in row) for row in ROWS]
        file.write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float\trating:float", *rows]) + "\n")
    else:
        lines = [" ".join([f"u{u}", *(f"i{n % 31}" for n in range(u, 250, 7))]) for u in range(7)]
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "inter", "parquet", "txt.gz"])
def test_portions_hold_what_is_read_whole(tmp_path, kind):
    file = write(tmp_path, kind)
    whole = read_interactions(file)
    read = list(portions(file, size=64))
    assert [len(one) for one in read] == [64, 64, 64, 58]
    lines = [line for portion in read for line in portion]
    assert [line.user_id for line in lines] == [whole.user_ids[code] for code in whole.user]
    assert [line.item_id for line in lines] == [whole.item_ids[code] for code in whole.item]
    if whole.time is None:
        assert {line.timestamp for line in lines} == {None}
    else:
        assert [line.timestamp for line in lines] == whole.time.tolist()
        assert [line.rating for line in lines] == [None if np.isnan(one) else one for one in whole.rating.tolist()]


def test_a_recbole_folder_and_other_column_names(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.inter").write_text("who:token\twhat:token\nu\ti\n")
    config = DatasetConfig(user_column="who", item_column="what")
    assert list(portions(folder, config)) == [[LogLine("u", "i")]]


def test_json_lines_are_interactions(tmp_path):
    file = tmp_path / "events.jsonl"
    full = {"user_id": "ü", "item_id": "i", "timestamp": 5, "rating": 1.5, "event_id": "e", "recommendation_id": "r"}
    file.write_text("\ufeff" + json.dumps(full) + '\n\n{"user_id": "v", "item_id": "j", "rating": null}\r\n', "utf-8")
    assert list(portions(file)) == [[LogLine(**full), LogLine("v", "j")]]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.jsonl", '{"user_id": "u", "item_id": "i"}\n{"user_id": "u"}', "line 2: .*missing required field `item_id`"),
        ("a.jsonl", '{"user_id": "u", "item_id": "i", "when": 1}', "line 1: .*unknown field `when`"),
        ("a.jsonl", '{"user_id": 7, "item_id": "i"}', r"line 1: Expected `str`, got `int` - at `\$.user_id`"),
        ("a.jsonl", '{"user_id": "u", "item_id": ', "line 1: .*truncated"),
        ("a.jsonl", '{"user_id": "", "item_id": "i"}', "line 1, column 'user_id': missing id"),
        ("a.jsonl", '{"user_id": "u", "item_id": "a\\u0000"}', "line 1, column 'item_id': an id cannot contain NUL"),
        ("a.jsonl", '{"user_id": "u", "item_id": "i", "event_id": "%s"}' % ("e" * 257), "column 'event_id': id of 257"),
        ("a.jsonl", '{"user_id": "u", "item_id": "i", "timestamp": 1e12}', "column 'timestamp': .*milliseconds"),
        ("a.jsonl", '{"user_id": "u", "item_id": "i", "rating": -1e10}', "column 'rating': rating beyond"),
        ("a.jsonl", "\n" + "x" * (1 << 20), "line 2: longer than"),
        ("a.csv", "user_id,item_id\nu,i\nu,i\n\nu,\n", "line 5, column 'item_id': missing id"),
        (
            "a.csv",
            "user_id,item_id,timestamp\nu,i,1\nu,i,2\nu,i,soon\n",
            "line 4, column 'timestamp': cannot read 'soon'",
        ),
        ("a.csv", "user_id,item_id\nu,i\nu,i,3\n", "line 3: 3 columns"),
        ("a.csv", "user_id,item_id,rating\nu,i,1e10\n", "line 2, column 'rating': rating beyond"),
        ("a.txt", "u i j\nv\n", "line 2, column 'item': user 'v' has no items"),
        ("a.xml", "<x/>", "unknown kind of file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, name, text, complaint):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(DatasetError, match=f"{name}: .*{complaint}"):
        list(portions(file, size=2))


def test_a_damaged_archive_is_named(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"user_id": "u", "item_id": "i"}\n' * 9)[:-9])
    with pytest.raises(DatasetError, match=r"a\.jsonl\.gz: line .* cannot be read"):
        list(portions(file))


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    def peak(rows: int) -> int:
        file = tmp_path / f"{rows}.{kind}"
        line = '{"user_id": "u%d", "item_id": "i%d"}\n' if kind == "jsonl" else "u%d i%d\n"
        file.write_text("".join(line % (n, n) for n in range(rows)))
        tracemalloc.start()
        for _ in portions(file, size=1000):
            pass
        return (tracemalloc.get_traced_memory()[1], tracemalloc.stop())[0]

    assert peak(30_000) < 1.5 * peak(3000)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_arrow_memory_does_not_grow_with_the_file(tmp_path, kind):
    """What is held between portions of a file, beside what Arrow reads ahead."""

    def peak(rows: int) -> int:
        file = tmp_path / f"{rows}.{kind}"
        table = pa.table({"user_id": [f"user-{n:040}" for n in range(rows)], "item_id": ["item"] * rows})
        if kind == "csv":
            pacsv.write_csv(table, file)
        else:
            pq.write_table(table, file, row_group_size=20_000)
        del table
        before = pa.total_allocated_bytes()
        return max(pa.total_allocated_bytes() - before for _ in portions(file, size=50_000))

    assert peak(2_400_000) < 1.2 * peak(1_200_000)
