"""Reads a log of interactions in portions: a file may be larger than memory. No torch.

It reads every format of `model.data.reading`, and JSON lines; faults of a file are the same `DatasetError`. Portions
are cut by row number alone, so a file gives the same ones every time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from model.config import DatasetConfig
from model.data.columns import Table, from_table, wanted_columns
from model.data.delimited import delimited_layout, diagnose, line_of
from model.data.interactions import (
    FORMATS,
    LATEST_S,
    RATING_LIMIT,
    DatasetError,
    Interactions,
    id_problem,
    kind_of,
    log_file,
    open_log,
)
from model.data.sequences import decode_id
from model.memory.rules import Ints

PORTION = 131_072
"""Rows of a portion; they take about 40 MB."""
LINE_LIMIT = 1 << 20
"""Longest line of a JSON lines file, in bytes."""
JSON_LINES = (".jsonl", ".ndjson")


class LogLine(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One interaction, with the fields of `POST /memories`."""

    user_id: str
    item_id: str
    timestamp: float | None = None
    rating: float | None = None
    event_id: str | None = None
    recommendation_id: str | None = None
    basket_id: str | None = None


def portions(path: str | Path, config: DatasetConfig | None = None, size: int = PORTION) -> Iterator[list[LogLine]]:
    """The interactions of a file in its order, `size` at a time; none for an empty file.

    Raises:
        DatasetError: see `read_interactions`; a fault is raised when its portion is reached.
    """
    file = log_file(path)
    kind = kind_of(file)
    if kind in JSON_LINES:
        return _chunked(_json_lines(file), size)
    if kind in ("", ".txt", ".seq"):
        return _chunked(_sequence_lines(file), size)
    if kind in (".csv", ".inter", ".parquet"):
        return _table_portions(file, kind, config or DatasetConfig(), size)
    raise DatasetError(f"{file}: unknown kind of file; expected {FORMATS}, or JSON lines (.jsonl, .jsonl.gz)")


def _chunked(lines: Iterator[LogLine], size: int) -> Iterator[list[LogLine]]:
    while portion := list(islice(lines, size)):
        yield portion


def _numbered(file: Path, limit: int = -1) -> Iterator[tuple[int, bytes]]:
    """Line number (from 1) and bytes of each line that is not blank, without a byte order mark."""
    number = 0
    try:
        with open_log(file) as source:
            while line := source.readline(limit):
                number += 1
                if len(line) == limit and not line.endswith(b"\n"):
                    raise DatasetError(f"{file}: line {number}: longer than {limit} bytes")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file}: line {number + 1}: cannot be read: {error}") from error


def _json_lines(file: Path) -> Iterator[LogLine]:
    decode = msgspec.json.Decoder(LogLine).decode
    for number, text in _numbered(file, LINE_LIMIT):
        try:
            line = decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DatasetError(f"{file}: line {number}: {error}") from None
        line.basket_id = line.basket_id if line.basket_id and line.basket_id.strip() else None
        _check(file, number, line)
        yield line


def _check(file: Path, number: int, line: LogLine) -> None:
    """Raise DatasetError for faults that the types do not exclude."""
    for column in ("user_id", "item_id", "event_id", "recommendation_id", "basket_id"):
        name = getattr(line, column)
        if name is not None and (problem := id_problem(name)):
            raise DatasetError(f"{file}: line {number}, column '{column}': {problem}")
    if line.timestamp is not None and abs(line.timestamp) >= LATEST_S:
        what = f"{line.timestamp:.0f} is not a time in seconds (milliseconds?)"
        raise DatasetError(f"{file}: line {number}, column 'timestamp': {what}")
    if line.rating is not None and abs(line.rating) > RATING_LIMIT:
        raise DatasetError(f"{file}: line {number}, column 'rating': rating beyond ±{RATING_LIMIT:.0e}")


def _sequence_lines(file: Path) -> Iterator[LogLine]:
    """Lines of `user item item …`, oldest first. A user may have several lines, in order of time."""
    for number, text in _numbered(file):
        first, *items = text.split()
        user = decode_id(file, number, "user", first)
        if not items:
            raise DatasetError(f"{file}: line {number}, column 'item': user {user[:40]!r} has no items")
        for item in items:
            yield LogLine(user, decode_id(file, number, "item", item))


def _table_portions(file: Path, kind: str, config: DatasetConfig, size: int) -> Iterator[list[LogLine]]:
    start = 0
    batches = _parquet_batches(file, config) if kind == ".parquet" else _delimited_batches(file, config)
    for table in _rebatched(batches, size):
        columns = {name: table[name] for name in table.column_names}
        yield _lines(from_table(Table(file, columns, partial(_place, file, kind, start)), config))
        start += len(table)


def _place(file: Path, kind: str, start: int, row: int) -> str:
    """Describes where a row is in its file; the portion begins at row `start`."""
    return f"row {start + row + 1}" if kind == ".parquet" else f"line {line_of(file, start + row)}"


def _parquet_batches(file: Path, config: DatasetConfig) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as source:
            columns = wanted_columns(file, "", source.schema_arrow.names, config)
            for group in range(source.num_row_groups):  # of all groups at once, Arrow would hold more and more
                yield from source.iter_batches(row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as Parquet: {error}") from error


def _delimited_batches(file: Path, config: DatasetConfig) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import csv as pacsv

    names, options = delimited_layout(file, config)
    try:
        with pacsv.open_csv(file, *options) as source:
            yield from source
    except (pa.ArrowException, OSError) as error:
        diagnose(file, names)
        raise DatasetError(f"{file}: cannot be read: {error}") from error


def _rebatched(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Arrow tables of `size` rows; the last one has the remaining rows."""
    import pyarrow as pa

    parts: list[Any] = []
    rows = 0
    for batch in batches:
        while len(batch):
            parts.append(batch.slice(0, size - rows))
            rows += len(parts[-1])
            batch = batch.slice(len(parts[-1]))
            if rows == size:
                yield pa.Table.from_batches(parts)
                parts, rows = [], 0
    if parts:
        yield pa.Table.from_batches(parts)


def _lines(log: Interactions) -> list[LogLine]:
    users = [log.user_ids[code] for code in log.user.tolist()]
    items = [log.item_ids[code] for code in log.item.tolist()]
    times = repeat(None) if log.time is None else log.time.tolist()
    ratings = repeat(None) if log.rating is None else [None if np.isnan(r) else r for r in log.rating.tolist()]
    baskets = repeat(None) if log.basket is None else _named(log.basket, log.basket_ids)
    return [
        LogLine(user, item, time, rating, basket_id=basket)
        for user, item, time, rating, basket in zip(users, items, times, ratings, baskets, strict=False)
    ]


def _named(codes: Ints, ids: Sequence[str]) -> list[str | None]:
    return [None if code < 0 else ids[code] for code in codes.tolist()]
