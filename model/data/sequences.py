"""Sequence files: a user and their items in every line, oldest first. No torch."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from model.data.interactions import DatasetError, Interactions, id_problem, open_log


def read_sequences(file: Path) -> Interactions:
    """Read lines of `user item item …`, one for each user. Blank lines are skipped. Raises DatasetError."""
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
        raise DatasetError(f"{file}: line {line}, column 'user': {user!r} already has line {users[user]}")
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
    """An id of a sequence file. column: what the message calls it. Raises DatasetError."""
    try:
        name = token.decode()
    except UnicodeDecodeError:
        raise DatasetError(f"{file}: line {line}, column '{column}': not UTF-8: {token[:20]!r}") from None
    if problem := id_problem(name):
        raise DatasetError(f"{file}: line {line}, column '{column}': {problem}")
    return name
