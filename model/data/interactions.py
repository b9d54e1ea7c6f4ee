"""Reading a log of interactions: RecBole atomic folders, CSV, Parquet and sequence files. No torch.

Whatever is wrong with a file is a `DatasetError` that names file, line and column. pyarrow reads the tables;
only when something is wrong does a slow pass look for its line.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from model.config import DatasetConfig
from model.errors import RamrecError

Metadata = dict[str, dict[str, Any]]

ID_BYTES = 256
"""Longest user or item id, as on the wire."""
LATEST_S = 1e11
"""Timestamps from here on (the year 5138) are taken for milliseconds and refused, as the API does."""
RATING_LIMIT = 1e9
"""Largest size of a rating, as on the wire."""
FORMATS = "a RecBole folder with a .inter file, .inter, .csv, .csv.gz, .parquet, or a sequence file (.txt, .txt.gz)"


class DatasetError(RamrecError):
    """Interactions that cannot be used; says in which file, and where it applies in which line and column."""


@dataclass(frozen=True)
class Interactions:
    """A raw log in file order, nothing filtered.

    `user` and `item` (N,) int64 count from 0 into `user_ids` and `item_ids`, which stand in order of first
    appearance. `time` (N,) float64 seconds UTC or None; `rating` (N,) float32, NaN where there is none, or
    None. `basket` (N,) int64 counts from 0 into `basket_ids`, −1 where an interaction is in none, or None.
    `metadata`: item id → attributes.
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


def read_interactions(path: str | Path, config: DatasetConfig | None = None) -> Interactions:
    """Read a log as it stands in its file, without filter or sorting. At least one interaction.

    Raises:
        DatasetError: no such path, unknown format, missing or repeated column, missing or over-long id, a
            number or time that cannot be read, or an empty file.
    """
    file, config = log_file(path), config or DatasetConfig()
    kind = kind_of(file)
    if kind == ".parquet":
        log = from_table(_read_parquet(file, config), config)
    elif kind in (".csv", ".inter"):
        log = from_table(_read_delimited(file, config), config)
    elif kind in ("", ".txt", ".seq"):
        log = _read_sequences(file)
    else:
        raise DatasetError(f"{file}: unknown kind of file; expected {FORMATS}")
    if not len(log):
        raise DatasetError(f"{file}: no interactions in it")
    return log


def log_file(path: str | Path) -> Path:
    """The file that holds the interactions: the path itself, or a RecBole folder's .inter file."""
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder")
    return _atomic_file(path) if path.is_dir() else path


# --- tables: .inter, CSV, Parquet ---


@dataclass(frozen=True)
class Table:
    """Wanted columns of a file as Arrow arrays; `place` says where a row (from 0) is in the file."""

    file: Path
    columns: dict[str, Any]
    place: Callable[[int], str]
    metadata: Metadata = field(default_factory=dict)

    def fault(self, row: int, column: str, what: str) -> DatasetError:
        """The error to raise about a value."""
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
    """Codes (N,) of a column of ids, and the ids; −1 where there is none, if rows `may_lack` one."""
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


def id_problem(name: str) -> str:
    """What is wrong with an id; "" if nothing is."""
    if not name.strip():
        return "missing id"
    if "\0" in name:
        return "an id holds no NUL"
    size = len(name.encode())
    return f"id of {size} bytes, at most {ID_BYTES} are allowed: {name[:20]}…" if size > ID_BYTES else ""


def _ratings(table: Table, column: str) -> NDArray[np.float32]:
    ratings = _reals(table, column, _number)
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
        what = f"{seconds[row]:.0f} is no time in seconds (milliseconds?)"
        raise table.fault(row, column, what if np.isfinite(seconds[row]) else "time missing or not finite")
    return seconds


def _instants(values: Any) -> Any:
    """The column as Arrow timestamps or dates, if it holds these or ISO 8601 texts; else None."""
    import pyarrow as pa

    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return values
    if not _is_text(values.type):
        return None
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return values.cast(kind)
        except pa.ArrowInvalid:  # numbers, or other texts: `_moment` says what is wrong with them
            continue
    return None


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _reals(table: Table, column: str, parse: Callable[[str], float]) -> NDArray[np.float64]:
    """A column as float64, NaN where it is empty. Only what Arrow cannot convert goes through `parse`."""
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


def _number(text: str) -> float:
    if "_" in text:  # float() takes 1_000; no file means that
        raise ValueError(text)
    return float(text)


def _moment(text: str) -> float:
    """Seconds UTC of a number or an ISO 8601 time; without an offset it is taken as UTC."""
    try:
        return _number(text)
    except ValueError:
        moment = datetime.fromisoformat(text.strip())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def wanted_columns(file: Path, place: str, names: Sequence[str], config: DatasetConfig) -> list[str]:
    """The columns to read. Time, rating and basket may be absent unless the config gives them a name of its own."""
    default = DatasetConfig()
    optional = {default.time_column, default.rating_column, default.basket_column}
    others = (config.time_column, config.rating_column, config.basket_column)
    columns = (config.user_column, config.item_column, *others)
    _check_header(file, place, names, [column for column in columns if column not in optional])
    return [name for name in names if name in columns]


def _check_header(file: Path, place: str, names: Sequence[str], needed: Sequence[str]) -> None:
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise DatasetError(f"{file}: {place}column '{repeated[0]}' stands more than once in the header")
    missing = [name for name in needed if name not in names]
    if missing:
        there = ", ".join(names)
        raise DatasetError(f"{file}: {place}column '{missing[0]}' is missing (columns: {there})")


def _read_parquet(file: Path, config: DatasetConfig) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as source:
            wanted = wanted_columns(file, "", source.schema_arrow.names, config)
            table = source.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file}: cannot be read as Parquet: {error}") from error
    return Table(file, {name: table[name] for name in wanted}, lambda row: f"row {row + 1}")


def _read_delimited(file: Path, config: DatasetConfig) -> Table:
    """Wanted columns of a CSV or .inter file, as strings."""
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
    """Column names of a CSV or .inter file, and what makes pyarrow read the wanted ones of them as strings."""
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


def kind_of(file: Path) -> str:
    """The suffix that says how to read a file, without `.gz`."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _is_atomic(file: Path) -> bool:
    return kind_of(file) != ".csv"


def _delimiter(file: Path) -> str:
    return "\t" if _is_atomic(file) else ","


def open_log(file: Path) -> gzip.GzipFile | BinaryIO:
    """A file as bytes, decompressed if it is a .gz."""
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1) and fields of every line that is not blank, header included.

    What is not UTF-8 survives as surrogates.
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
    """Line of the header and its column names, without RecBole's types."""
    line, names = next(_rows(file), (0, []))
    if not names:
        raise DatasetError(f"{file}: the file is empty")
    return line, [name.split(":")[0].strip() if _is_atomic(file) else name.strip() for name in names]


def line_of(file: Path, row: int) -> int:
    """Line of a data row (from 0); blank lines and quoted line breaks make it differ from row + 2."""
    return next(line for number, (line, _) in enumerate(_rows(file)) if number == row + 1)


def diagnose(file: Path, names: Sequence[str]) -> None:
    """Raise for the first line that Arrow cannot read, or if there is none but the header."""
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


# --- RecBole's atomic folder ---


def _atomic_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.inter"))
    named = folder / f"{folder.name}.inter"
    if not found:
        raise DatasetError(f"{folder}: no .inter file in this folder; expected {FORMATS}")
    if len(found) > 1 and named not in found:
        raise DatasetError(f"{folder}: several .inter files ({', '.join(f.name for f in found)}); give one of them")
    return named if named in found else found[0]


def _read_metadata(file: Path, config: DatasetConfig) -> Metadata:
    """Attributes of each item in a .item file; {} if there is no such file. Empty values are left out."""
    if not file.exists():
        return {}
    rows = _rows(file)
    place, header = next(rows, (1, []))
    names, _, kinds = zip(*(name.partition(":") for name in header), strict=True) if header else ((), (), ())
    _check_header(file, f"line {place}: ", names, [config.item_column])
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
    """One value of a .item file: number, string, list of words or list of numbers."""
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
    value = _number(text)
    if not np.isfinite(value):
        raise ValueError(text)
    return value


# --- sequence files ---


def _read_sequences(file: Path) -> Interactions:
    """`user item item …`, one user a line, oldest first. Blank lines are skipped."""
    try:
        with open_log(file) as source:
            lines = source.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file}: cannot be read: {error}") from error
    users: dict[str, int] = {}
    items: dict[bytes, int] = {}
    counts, codes = [], []
    for number, line in enumerate(lines, 1):
        tokens = line.split()
        if tokens:
            _take_user(file, number, tokens, users)
            counts.append(len(tokens) - 1)
            codes.extend([items.setdefault(token, len(items)) for token in tokens[1:]])
    item_ids = tuple(_item_id(file, lines, token) for token in items)
    user = np.repeat(np.arange(len(counts)), np.array(counts, np.int64))
    return Interactions(user.astype(np.int64), np.array(codes, np.int64), tuple(users), item_ids)


def _take_user(file: Path, line: int, tokens: list[bytes], users: dict[str, int]) -> None:
    user = decode_id(file, line, "user", tokens[0])
    if user in users:
        raise DatasetError(f"{file}: line {line}, column 'user': {user!r} has a line already, line {users[user]}")
    if len(tokens) == 1:
        raise DatasetError(f"{file}: line {line}, column 'item': user {user[:40]!r} has no items")
    users[user] = line


def _item_id(file: Path, lines: list[bytes], token: bytes) -> str:
    try:
        return decode_id(file, 0, "item", token)
    except DatasetError:
        line = next(number for number, line in enumerate(lines, 1) if token in line.split()[1:])
        return decode_id(file, line, "item", token)


def decode_id(file: Path, line: int, column: str, token: bytes) -> str:
    """An id of a sequence file; `column` says whose. Raises DatasetError."""
    try:
        name = token.decode()
    except UnicodeDecodeError:
        raise DatasetError(f"{file}: line {line}, column '{column}': not UTF-8: {token[:20]!r}") from None
    if problem := id_problem(name):
        raise DatasetError(f"{file}: line {line}, column '{column}': {problem}")
    return name
