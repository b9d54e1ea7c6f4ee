"""Reads a log of interactions in any of the formats. No torch."""

from __future__ import annotations

from pathlib import Path

from model.config import DatasetConfig
from model.data.columns import Table, from_table, wanted_columns
from model.data.delimited import read_delimited
from model.data.interactions import FORMATS, DatasetError, Interactions, kind_of, log_file
from model.data.sequences import read_sequences


def read_interactions(path: str | Path, config: DatasetConfig | None = None) -> Interactions:
    """Read the interactions of a file in its order, without a filter; at least one.

    Raises:
        DatasetError: no such path, unknown format, missing or repeated column, missing or too long id, a number or time
            that cannot be read, or no interactions.
    """
    file, config = log_file(path), config or DatasetConfig()
    kind = kind_of(file)
    if kind == ".parquet":
        log = from_table(_read_parquet(file, config), config)
    elif kind in (".csv", ".inter"):
        log = from_table(read_delimited(file, config), config)
    elif kind in ("", ".txt", ".seq"):
        log = read_sequences(file)
    else:
        raise DatasetError(f"{file}: unknown kind of file; expected {FORMATS}")
    if not len(log):
        raise DatasetError(f"{file}: no interactions in it")
    return log


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
