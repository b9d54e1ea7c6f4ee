"""Reading logs: every format, and what is refused with file, line and column."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.config import DatasetConfig
from model.data.dataset import read_dataset
from model.data.interactions import DatasetError
from model.data.reading import read_interactions
from tests.model.data.logs import ALL, HEADER, INTER, by_user, refused, write

# --- formats ---


def test_atomic_folder(atomic: Path) -> None:
    dataset = read_dataset(atomic, ALL)
    assert dataset.user_ids == ("bob", "amy")
    assert dataset.item_ids == ("x", "y", "z")
    assert dataset.offsets.tolist() == [0, 3, 4]
    assert dataset.items.tolist() == [3, 1, 2, 2]
    assert dataset.times.tolist() == [10, 30, 30, 20]
    assert dataset.ratings.tolist() == [2, 4, 1, 5]
    assert dataset.lengths().tolist() == [3, 1]
    assert (len(dataset), dataset.users, dataset.item_count) == (4, 2, 3)
    assert dataset.has_times
    assert dataset.has_ratings
    kinds = [dataset.offsets.dtype, dataset.items.dtype, dataset.times.dtype, dataset.ratings.dtype]
    assert kinds == [np.int64, np.int32, np.float64, np.float32]


def test_metadata(atomic: Path) -> None:
    assert read_dataset(atomic / "tiny.inter", ALL).metadata == {
        "x": {
            "movie_title": 'Say "Hi" Again',
            "release_year": 1995,
            "price": 1.5,
            "class": ["Drama", "Comedy"],
            "box": [1.0, 2.5],
        },
        "y": {"movie_title": "Other", "release_year": "unknown", "class": ["War"]},
    }


def test_metadata_needs_no_time_column(atomic: Path) -> None:
    write(atomic / "tiny.inter", INTER.replace("timestamp", "ts"))
    assert read_dataset(atomic, DatasetConfig(core=1, time_column="ts")).metadata["x"]["price"] == 1.5


def test_folder_with_several_logs_takes_the_one_of_its_name(atomic: Path) -> None:
    write(atomic / "other.inter", HEADER)
    assert len(read_dataset(atomic, ALL)) == 4
    (atomic / "tiny.inter").rename(atomic / "third.inter")
    refused(atomic, "several .inter files (other.inter, third.inter)")


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "LOG.CSV"])
def test_csv_with_quotes_blank_lines_and_other_columns(tmp_path: Path, name: str) -> None:
    text = '\ufeffn,user_id, item_id,rating,timestamp\r\n1,"a, b","x ""1""",,5\r\n\r\n2,"a, b",x2,3.5,4e0\r\n'
    dataset = read_dataset(write(tmp_path / name, text), ALL)
    assert by_user(dataset) == {"a, b": ["x2", 'x "1"']}
    assert dataset.times.tolist() == [4, 5]
    np.testing.assert_array_equal(dataset.ratings, np.array([3.5, np.nan], np.float32))


def test_csv_with_configured_names(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", "who,what,when\na,x,2\na,y,1\n")
    config = DatasetConfig(core=1, user_column="who", item_column="what", time_column="when")
    dataset = read_dataset(file, config)
    assert by_user(dataset) == {"a": ["y", "x"]}
    assert dataset.has_times
    assert not dataset.has_ratings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-01-01", 1704067200.0),
        ("2024-01-01T00:00:01", 1704067201.0),
        ("2024-01-01 00:00:01.5", 1704067201.5),
        ("2024-01-01T00:00:00Z", 1704067200.0),
        ("2024-01-01T02:00:00+02:00", 1704067200.0),
        (" 17.25 ", 17.25),
        ("1.7e9", 1.7e9),
        ("-5", -5.0),
    ],
)
@pytest.mark.parametrize("other", ["", "a,y,1704067300", "a,y,2024-01-01T00:01:40", "a,y,2024-01-01T00:01:40Z"])
def test_times_in_text(tmp_path: Path, text: str, seconds: float, other: str) -> None:
    file = write(tmp_path / "log.csv", f"user_id,item_id,timestamp\na,x,{text}\n{other}\n")
    expected = [seconds, 1704067300.0] if other else [seconds]
    assert read_dataset(file, ALL).times.tolist() == expected


MOMENT = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "times",
    [
        pa.array([1704067200, 1704067100]),
        pa.array([1704067200.0, 1704067100.0]),
        pa.array(["1704067200", "2023-12-31T23:58:20Z"]),
        pa.array(["1704067200", "1704067100"], pa.large_string()),
        pa.array([1704067200, 1704067100], pa.timestamp("s")),
        pa.array([1704067200 * 10**9, 1704067100 * 10**9], pa.timestamp("ns", "Europe/Berlin")),
    ],
)
def test_parquet(tmp_path: Path, times: pa.Array) -> None:
    users = pa.array(["u", "u"]).dictionary_encode()
    table = pa.table({"user_id": users, "item_id": [7, 8], "timestamp": times, "rating": [None, 2]})
    pq.write_table(table, tmp_path / "log.parquet")
    dataset = read_dataset(tmp_path / "log.parquet", ALL)
    assert by_user(dataset) == {"u": ["8", "7"]}
    assert dataset.times.tolist() == [1704067100, 1704067200]
    assert dataset.ratings[0] == 2
    assert np.isnan(dataset.ratings[1])


@pytest.mark.parametrize("name", ["log.txt", "log.txt.gz", "log.gz", "log"])
def test_sequence_file(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, "\ufeffbob x y x\r\n\r\namy  y\tz\n")
    dataset = read_dataset(file, ALL)
    assert by_user(dataset) == {"bob": ["x", "y", "x"], "amy": ["y", "z"]}
    assert dataset.times.tolist() == [0, 1, 2, 0, 1]
    assert not dataset.has_times
    assert not dataset.has_ratings


def test_repeated_interactions_are_kept(tmp_path: Path) -> None:
    log = read_interactions(write(tmp_path / "log.csv", "user_id,item_id,timestamp\na,x,1\na,x,1\n"))
    assert len(log) == 2
    assert log.rating is None


def test_reading_needs_no_torch() -> None:
    code = "import sys, model.data.dataset; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the file is empty"]),
        ("\n\n", ["the file is empty"]),
        ("user_id,item_id", ["no interactions"]),
        ("user_id,item_id,timestamp\n", ["no interactions"]),
        (
            "user_id,timestamp\na,1\n",
            ["line 1: ", "column 'item_id' is missing", "(columns: user_id, timestamp)"],
        ),
        ("\nitem,user_id\na,1\n", ["line 2: ", "column 'item_id' is missing"]),
        ("user_id,item_id,x,x\na,b,1,2\n", ["line 1: ", "column 'x' occurs more than once"]),
        (
            "user_id,item_id,timestamp\na,x,1\n\na,y,soon\n",
            ["line 4, column 'timestamp'", "'soon'", "ISO 8601"],
        ),
        ("user_id,item_id,timestamp\na,x,1\na,y,1_000\n", ["line 3, column 'timestamp'", "'1_000'"]),
        ("user_id,item_id,timestamp\na,x,1\na,y,\n", ["line 3, column 'timestamp'", "missing or not finite"]),
        ("user_id,item_id,timestamp\na,x,2024-01-01\na,y,\n", ["line 3, column 'timestamp'", "missing or"]),
        ("user_id,item_id,timestamp\na,x,nan\n", ["line 2, column 'timestamp'", "not finite"]),
        ("user_id,item_id,timestamp\na,x,-inf\n", ["line 2, column 'timestamp'", "not finite"]),
        ("user_id,item_id,timestamp\na,x,1704067200000\n", ["line 2, column 'timestamp'", "milliseconds"]),
        ("user_id,item_id,rating\na,x,5\na,x,good\n", ["line 3, column 'rating'", "'good' as a number"]),
        ("user_id,item_id,rating\na,x,5\na,x,inf\n", ["line 3, column 'rating'", "not finite"]),
        ("user_id,item_id\na,x\n,y\n", ["line 3, column 'user_id'", "missing id"]),
        ("user_id,item_id\na,x\nb, \nb,\n", ["line 3, column 'item_id'", "missing id"]),
        (f"user_id,item_id\na,x\nb,{'ä' * 129}\n", ["line 3, column 'item_id'", "258 bytes", "256"]),
        ("user_id,item_id,rating\na,x,1\na,x\n", ["line 3: ", "2 columns, but the header has 3"]),
        ("user_id,item_id\na,x\na,x,1\n", ["line 3: ", "3 columns, but the header has 2"]),
        (b"user_id,item_id\na,x\na,\xff\xfe\n", ["line 3, column 'item_id'", "not UTF-8"]),
    ],
)
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.inter"])
def test_bad_tables(tmp_path: Path, text: str | bytes, parts: list[str], name: str) -> None:
    if name == "log.inter":
        text = (text.encode() if isinstance(text, str) else text).replace(b",", b"\t")
    refused(write(tmp_path / name, text), *parts)


def test_line_after_a_quoted_line_break(tmp_path: Path) -> None:
    file = write(tmp_path / "log.csv", 'user_id,item_id,rating\n"a\nb",x,1\na,x,?\n')
    refused(file, "line 4, column 'rating'", "'?'")


@pytest.mark.parametrize(("column", "name"), [("time_column", "when"), ("rating_column", "stars")])
def test_a_column_that_the_config_names_must_be_there(tmp_path: Path, column: str, name: str) -> None:
    file = write(tmp_path / "log.csv", "user_id,item_id\na,x\n")
    refused(file, "line 1: ", f"column '{name}' is missing", config=DatasetConfig(core=1, **{column: name}))


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such file or folder")
    refused(tmp_path, "no .inter file")
    refused(write(tmp_path / "log.xlsx", "PK"), "unknown kind of file", ".parquet")


@pytest.mark.parametrize("name", ["log.csv.gz", "log.txt.gz"])
def test_damaged_gzip(tmp_path: Path, name: str) -> None:
    whole = gzip.compress("\n".join(["user_id,item_id", *(f"{n * 7919},{n}" for n in range(9999))]).encode())
    file = tmp_path / name
    for raw in (whole[: len(whole) // 2], b"plain text"):
        file.write_bytes(raw)
        refused(file, "cannot be read")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no interactions"]),
        ("a x\nb\n", ["line 2, column 'item'", "'b' has no items"]),
        ("a x\n\na y\n", ["line 3, column 'user'", "'a' already has line 1"]),
        (f"a x\nb x {'i' * 257}\n", ["line 2, column 'item'", "257 bytes"]),
        (f"a x\n{'u' * 257} x\n", ["line 2, column 'user'", "257 bytes"]),
        (b"a x\nb x \xff\n", ["line 2, column 'item'", "not UTF-8"]),
    ],
)
def test_bad_sequence_files(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    refused(write(tmp_path / "log.txt", text), *parts)


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"user_id": ["a"]}, ["column 'item_id' is missing"]),
        ({"user_id": ["a", None], "item_id": [1, 2]}, ["row 2, column 'user_id'", "missing id"]),
        ({"user_id": [["a"]], "item_id": [1]}, ["column 'user_id' does not hold ids"]),
        (
            {"user_id": ["a", "a"], "item_id": [1, 2], "timestamp": [1.0, None]},
            ["row 2, column 'timestamp'", "missing or"],
        ),
        (
            {"user_id": ["a", "a"], "item_id": [1, 2], "timestamp": [MOMENT, None]},
            ["row 2, column 'timestamp'", "missing or"],
        ),
        ({"user_id": ["a"], "item_id": [1], "rating": ["good"]}, ["row 1, column 'rating'", "'good'"]),
        ({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())}, ["no interactions"]),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, object], parts: list[str]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    refused(tmp_path / "log.parquet", *parts)


def test_parquet_with_a_repeated_column_and_no_parquet_at_all(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["user_id", "item_id", "item_id"]), file)
    refused(file, "column 'item_id' occurs more than once")
    refused(write(file, "no parquet"), "cannot be read as Parquet")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["line 1: ", "column 'item_id' is missing"]),
        ("id:token\tx:float\n", ["line 1: ", "column 'item_id' is missing"]),
        ("item_id:token\tx:float\tx:token\n", ["line 1: ", "column 'x' occurs more than once"]),
        ("item_id:token\tx:float\na\t1\n\nb\tdear\n", ["line 4, column 'x'", "'dear' as a number"]),
        ("item_id:token\tx:float_seq\na\t1 nan\n", ["line 2, column 'x'", "'1 nan' as a number"]),
        ("item_id:token\tx:float\na\t1\nb\n", ["line 3: ", "1 columns, but the header has 2"]),
        ("item_id:token\tx:float\na\t1\na\t2\n", ["line 3, column 'item_id'", "'a': a second time"]),
        ("item_id:token\tx:float\n\t1\n", ["line 2, column 'item_id'", "missing id"]),
    ],
)
def test_bad_metadata(atomic: Path, text: str, parts: list[str]) -> None:
    file = write(atomic / "tiny.item", text)
    with pytest.raises(DatasetError, match=re.escape(str(file))) as caught:
        read_dataset(atomic, ALL)
    for part in parts:
        assert part in str(caught.value)
