"""Text tables: CSV, and RecBole's atomic files (.inter with interactions, .item with metadata). No torch."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.config import DatasetConfig
from model.data.columns import Table, check_header, number_of, wanted_columns
from model.data.interactions import DatasetError, Metadata, id_problem, kind_of, open_log


def read_delimited(file: Path, config: DatasetConfig) -> Table:
    """The wanted columns of a CSV or .inter file, as strings, and the metadata beside it. Raises DatasetError."""
    import pyarrow as pa
    from pyarrow import csv as pacsv

    names, options = delimited_layout(file, config)
    try:
        table = pacsv.read_csv(file, *options)
    except (pa.ArrowException, OSError) as error:
        diagnose(file, names)
        raise DatasetError(f"{file}: cannot be read: {error}") from error
    wanted = table.column_names
    metadata = _read_metadata(file.with_suffix(".item"), config) if file.suffix == ".inter" else {}
    return Table(file, {name: table[name] for name in wanted}, lambda row: f"line {line_of(file, row)}", metadata)


def delimited_layout(file: Path, config: DatasetConfig) -> tuple[list[str], tuple[Any, Any, Any]]:
    """Column names of a CSV or .inter file, and pyarrow's options to read the wanted columns as strings. Raises
    DatasetError.
    """
    import pyarrow as pa
    from pyarrow import csv as pacsv

    line, names = _header(file)
    wanted = wanted_columns(file, f"line {line}: ", names, config)
    atomic = _is_atomic(file)
    return names, (
        pacsv.ReadOptions(column_names=names, skip_rows=line),
        pacsv.ParseOptions(
            delimiter=_delimiter(file), quote_char=False if atomic else '"', newlines_in_values=not atomic
        ),
        pacsv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())),
    )


def _is_atomic(file: Path) -> bool:
    return kind_of(file) != ".csv"


def _delimiter(file: Path) -> str:
    return "\t" if _is_atomic(file) else ","


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1) and fields of every line that is not blank, header included. Bytes that are not UTF-8
    become surrogates.
    """
    before = 0
    quoting: Literal[0, 3] = csv.QUOTE_NONE if _is_atomic(file) else csv.QUOTE_MINIMAL
    try:
        with open_log(file) as binary:
            texts = (line.decode("utf-8", "surrogateescape").removeprefix("\ufeff") for line in binary)
            reader = csv.reader(texts, delimiter=_delimiter(file), quoting=quoting)
            for fields in reader:
                if fields:
                    yield before + 1, fields
                before = reader.line_num
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file}: line {before + 1}: cannot be read: {error}") from error


def _header(file: Path) -> tuple[int, list[str]]:
    """Line number of the header, and the column names without RecBole's types."""
    line, names = next(_rows(file), (0, []))
    if not names:
        raise DatasetError(f"{file}: the file is empty")
    return line, [name.split(":")[0].strip() if _is_atomic(file) else name.strip() for name in names]


def line_of(file: Path, row: int) -> int:
    """Line number of a data row (from 0). It is not always row + 2, as lines may be blank or continue in quotes."""
    return next(line for number, (line, _) in enumerate(_rows(file)) if number == row + 1)


def diagnose(file: Path, names: Sequence[str]) -> None:
    """Raise DatasetError for the first line that Arrow cannot read, or if there are no lines after the header."""
    rows = 0
    for line, fields in _rows(file):
        rows += 1
        if len(fields) != len(names):
            raise DatasetError(f"{file}: line {line}: {len(fields)} columns, but the header has {len(names)}")
        for name, text in zip(names, fields, strict=True):
            if not text.isascii() and any("\udc80" <= sign <= "\udcff" for sign in text):
                raise DatasetError(f"{file}: line {line}, column '{name}': not UTF-8")
    if rows <= 1:
        raise DatasetError(f"{file}: no interactions in it")


def _read_metadata(file: Path, config: DatasetConfig) -> Metadata:
    """Attributes by item id from a .item file; {} without the file. Empty values are left out."""
    if not file.exists():
        return {}
    rows = _rows(file)
    place, header = next(rows, (1, []))
    names, _, kinds = zip(*(name.partition(":") for name in header), strict=True) if header else ((), (), ())
    check_header(file, f"line {place}: ", names, [config.item_column])
    key = names.index(config.item_column)
    metadata: Metadata = {}
    for line, texts in rows:
        if len(texts) != len(names):
            raise DatasetError(f"{file}: line {line}: {len(texts)} columns, but the header has {len(names)}")
        problem = "a second time" if texts[key] in metadata else id_problem(texts[key])
        if problem:
            raise DatasetError(f"{file}: line {line}, column '{names[key]}': item {texts[key][:40]!r}: {problem}")
        metadata[texts[key]] = {
            name: _attribute(file, line, name, kind, text)
            for name, kind, text in zip(names, kinds, texts, strict=True)
            if text and name != names[key]
        }
    return metadata


def _attribute(file: Path, line: int, name: str, kind: str, text: str) -> Any:
    """One value of a .item file: a number, a string, a list of words or a list of numbers."""
    try:
        if kind == "float":
            return _finite(text)
        if kind == "float_seq":
            return [_finite(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise DatasetError(f"{file}: line {line}, column '{name}': cannot read {text[:40]!r} as a number") from None
    if kind == "token_seq" and not ("title" in name or "name" in name):
        return text.split()
    return int(text) if name == "release_year" and text.isdecimal() else text


def _finite(text: str) -> float:
    value = number_of(text)
    if not np.isfinite(value):
        raise ValueError(text)
    return value
