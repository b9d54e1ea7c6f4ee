"""Columns of a table (CSV, .inter, Parquet) as arrays. pyarrow converts whole columns; a slow pass looks for the row of
a fault only if there is one. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import DatasetConfig
from model.data.interactions import LATEST_S, RATING_LIMIT, DatasetError, Interactions, Metadata, id_problem


@dataclass(frozen=True)
class Table:
    """Some columns of a file as Arrow arrays, by name. place: describes where a row (from 0) is in the file."""

    file: Path
    columns: dict[str, Any]
    place: Callable[[int], str]
    metadata: Metadata = field(default_factory=dict)

    def fault(self, row: int, column: str, what: str) -> DatasetError:
        """The error to raise for a faulty value."""
        return DatasetError(f"{self.file}: {self.place(row)}, column '{column}': {what}")


def from_table(table: Table, config: DatasetConfig) -> Interactions:
    """The interactions in a table. Raises DatasetError, see `read_interactions`."""
    user, user_ids = _codes(table, config.user_column)
    item, item_ids = _codes(table, config.item_column)
    time = _times(table, config.time_column) if config.time_column in table.columns else None
    rating = _ratings(table, config.rating_column) if config.rating_column in table.columns else None
    log = Interactions(user, item, user_ids, item_ids, time, rating, table.metadata)
    if config.basket_column not in table.columns:
        return log
    basket, basket_ids = _codes(table, config.basket_column, may_lack=True)
    return replace(log, basket=basket, basket_ids=basket_ids)


def _codes(table: Table, column: str, *, may_lack: bool = False) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """A column of ids as indices (N,) into the ids, and the ids. may_lack: an id may be missing, index −1."""
    import pyarrow as pa

    try:
        texts = table.columns[column].cast(pa.string()).fill_null("")
    except pa.ArrowException as error:
        raise DatasetError(f"{table.file}: column '{column}' does not hold ids: {error}") from error
    encoded = texts.dictionary_encode().unify_dictionaries()
    if not len(encoded):
        return np.zeros(0, np.int64), ()
    parts = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    codes = np.concatenate(parts).astype(np.int64)
    ids = tuple(encoded.chunk(0).dictionary.to_pylist())
    for code, name in enumerate(ids):
        if may_lack and not name.strip():
            codes[codes == code] = -1
        elif problem := id_problem(name):
            raise table.fault(int((codes == code).argmax()), column, problem)
    return codes, ids


def _ratings(table: Table, column: str) -> NDArray[np.float32]:
    ratings = _reals(table, column, number_of)
    wrong = np.abs(ratings) > RATING_LIMIT
    if wrong.any():
        row = int(wrong.argmax())
        what = "rating is not finite" if np.isinf(ratings[row]) else f"rating beyond ±{RATING_LIMIT:.0e}"
        raise table.fault(row, column, what)
    return ratings.astype(np.float32)


def _times(table: Table, column: str) -> NDArray[np.float64]:
    import pyarrow as pa

    instants = _instants(table.columns[column])
    if instants is None:
        seconds = _reals(table, column, _moment)
    else:
        micros = instants.cast(pa.timestamp("us", getattr(instants.type, "tz", None)), safe=False)
        seconds = np.asarray(micros.cast(pa.int64()).to_numpy(), dtype=np.float64) / 1e6
    wrong = ~(np.abs(seconds) < LATEST_S)
    if wrong.any():
        row = int(wrong.argmax())
        what = f"{seconds[row]:.0f} is not a time in seconds (milliseconds?)"
        raise table.fault(row, column, what if np.isfinite(seconds[row]) else "time missing or not finite")
    return seconds


def _instants(values: Any) -> Any:
    """The column as Arrow timestamps or dates if it holds these or ISO 8601 texts, else None."""
    import pyarrow as pa

    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return values
    if not _is_text(values.type):
        return None
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return values.cast(kind)
        except pa.ArrowInvalid:  # numbers, or other texts, which `_moment` reads
            continue
    return None


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _reals(table: Table, column: str, parse: Callable[[str], float]) -> NDArray[np.float64]:
    """A column as float64, NaN for empty values. `parse` is used only if Arrow cannot convert the column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = table.columns[column]
    try:
        if _is_text(values.type):
            texts = values.cast(pa.string())
            values = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
        return np.asarray(values.cast(pa.float64()).to_numpy(), dtype=np.float64)
    except pa.ArrowException:
        return _parse_all(table, column, parse)


def _parse_all(table: Table, column: str, parse: Callable[[str], float]) -> NDArray[np.float64]:
    values = table.columns[column].to_pylist()
    reals = np.full(len(values), np.nan)
    for row, text in enumerate(values):
        try:
            reals[row] = np.nan if text in ("", None) else parse(str(text))
        except (ValueError, OverflowError):
            what = f"cannot read {str(text)[:40]!r} as a number{_hint(parse)}"
            raise table.fault(row, column, what) from None
    return reals


def _hint(parse: Callable[[str], float]) -> str:
    return " of seconds or an ISO 8601 time" if parse is _moment else ""


def number_of(text: str) -> float:
    """A number as written in a file. Raises ValueError."""
    if "_" in text:  # float() accepts 1_000, which is no number in any file
        raise ValueError(text)
    return float(text)


def _moment(text: str) -> float:
    """Seconds UTC from a number or an ISO 8601 time; a time without an offset is UTC. Raises ValueError."""
    try:
        return number_of(text)
    except ValueError:
        moment = datetime.fromisoformat(text.strip())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def wanted_columns(file: Path, place: str, names: Sequence[str], config: DatasetConfig) -> list[str]:
    """The columns to read, out of `names`. Time, rating and basket may be missing if the config keeps their defaults.

    place: prefix of the message about a fault. Raises DatasetError if a needed column is missing or repeated.
    """
    default = DatasetConfig()
    optional = {default.time_column, default.rating_column, default.basket_column}
    others = (config.time_column, config.rating_column, config.basket_column)
    columns = (config.user_column, config.item_column, *others)
    check_header(file, place, names, [column for column in columns if column not in optional])
    return [name for name in names if name in columns]


def check_header(file: Path, place: str, names: Sequence[str], needed: Sequence[str]) -> None:
    """Raise DatasetError if a column is repeated, or a needed one is missing. place: prefix of the message."""
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise DatasetError(f"{file}: {place}column '{repeated[0]}' occurs more than once in the header")
    missing = [name for name in needed if name not in names]
    if missing:
        found = ", ".join(names)
        raise DatasetError(f"{file}: {place}column '{missing[0]}' is missing (columns: {found})")
