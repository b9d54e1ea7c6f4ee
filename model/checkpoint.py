"""A trained model on disk: safetensors and JSON, never pickle. It can be read without torch.

RUN/model.safetensors   weights (`encoder.*`, `fusion.*`) and side tables: `item_clusters`, `popularity`,
                        `key_span`, `key_plane`, `item_near`, `item_nearness`
RUN/checkpoint.json     format, version (hash of the content), config, item ids in order of their index
RUN/items.json          metadata (title, …) by item id, if the dataset has any
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from model.config import Config, describe
from model.errors import RamrecError
from model.files import replace_file
from model.memory.collective.layout import Layout

FORMAT = 3
"""Format 2 added habits and the repeat head; 3 replaced centroids by neighbours of items."""
WEIGHTS_FILE = "model.safetensors"
HEADER_FILE = "checkpoint.json"
ITEMS_FILE = "items.json"
SIDE_TABLES = ("item_clusters", "popularity", "key_span", "key_plane", "item_near", "item_nearness")


class CheckpointError(RamrecError):
    """The folder holds no checkpoint that can be used; the message says what is wrong and where."""


@dataclass(frozen=True)
class Checkpoint:
    """A model: config, items, weights and side tables. Item index 0 is padding; `item_ids[i - 1]` is the id of index i.

    item_clusters: (items + 1,) int32, −1 for padding. popularity: (items + 1,) float32, shares of training events.
    key_span (2, d), item_near and item_nearness (items + 1, n): see `collective.layout`. key_plane: (3, d), see
    `plane.Plane`. weights: empty if read without them. metadata: attributes by item id. version: "" if not saved.
    """

    config: Config
    item_ids: tuple[str, ...]
    item_clusters: NDArray[np.int32]
    popularity: NDArray[np.float32]
    key_span: NDArray[np.float32]
    key_plane: NDArray[np.float32]
    item_near: NDArray[np.int32]
    item_nearness: NDArray[np.float32]
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: str = ""

    @property
    def layout(self) -> Layout:
        """The layout of the model's collective index."""
        return Layout(self.item_near, self.item_nearness, self.key_span, self.popularity)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All arrays, by their names in the file."""
        return {**self.weights, **{name: getattr(self, name) for name in SIDE_TABLES}}


def content_version(checkpoint: Checkpoint) -> str:
    """The version: 16 hex digits of a SHA-256 over config, item ids and all arrays."""
    digest = hashlib.sha256(f"{FORMAT}\n{checkpoint.config.model_dump_json()}\n".encode())
    digest.update(json.dumps(checkpoint.item_ids).encode())
    for name, values in sorted(checkpoint.tensors().items()):
        digest.update(f"{name}{values.dtype.str}{values.shape}".encode())
        digest.update(np.asarray(values, order="C").tobytes())
    return digest.hexdigest()[:16]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> str:
    """Write a checkpoint to a folder, replacing one that it holds; returns its version. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    version = content_version(checkpoint)
    header = {
        "format": FORMAT,
        "version": version,
        "config": checkpoint.config.model_dump(),
        "item_ids": list(checkpoint.item_ids),
    }
    tensors = {name: np.asarray(values, order="C") for name, values in checkpoint.tensors().items()}
    replace_file(folder / ITEMS_FILE, json.dumps(checkpoint.metadata, ensure_ascii=False).encode())
    replace_file(folder / WEIGHTS_FILE, save(tensors, metadata={"version": version}))
    replace_file(folder / HEADER_FILE, json.dumps(header, ensure_ascii=False).encode())
    return version


def load_checkpoint(folder: Path, *, with_weights: bool = True) -> Checkpoint:
    """Read a checkpoint. with_weights: False reads only what the memory service needs.

    Raises:
        CheckpointError: it is missing, unreadable, of another format, or its content does not match its version.
    """
    header = _read_json(folder / HEADER_FILE)
    if header.get("format") != FORMAT:
        found = f"{folder}: checkpoint format {header.get('format')!r}, this version reads {FORMAT}"
        raise CheckpointError(f"{found}: train the model again")
    try:
        tensors = _read_tensors(folder / WEIGHTS_FILE, str(header["version"]), with_weights)
        checkpoint = Checkpoint(
            config=Config.model_validate(header["config"]),
            item_ids=_item_ids(folder, header["item_ids"]),
            **{name: tensors.pop(name) for name in SIDE_TABLES},
            weights=tensors,
            metadata=_metadata(folder),
            version=str(header["version"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder}: checkpoint lacks {error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{folder}/{HEADER_FILE}: {describe(error)}") from error
    _check(folder, checkpoint, with_weights)
    return checkpoint


def find_checkpoint(version: str, folders: Sequence[Path]) -> Checkpoint:
    """The checkpoint of a version, with its weights, from the first of the folders that holds it.

    Raises:
        CheckpointError: none of the folders holds it; the message says what each one holds.
    """
    found = []
    for folder in dict.fromkeys(folders):
        try:
            held = load_checkpoint(folder, with_weights=False).version
            if held == version:
                return load_checkpoint(folder)
            found.append(f"{folder}: holds model {held}")
        except CheckpointError as error:
            found.append(str(error))
    raise CheckpointError(f"no model {version}: {'; '.join(found)}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(file.read_bytes())  # stricter than `json`: no NaN, no lone surrogates
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {file.parent}: {file.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def _item_ids(folder: Path, found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
        raise CheckpointError(f"{folder}/{HEADER_FILE}: item_ids is not a list of ids")
    if len(set(found)) < len(found):
        raise CheckpointError(f"{folder}/{HEADER_FILE}: item_ids names an item twice")
    return tuple(found)


def _metadata(folder: Path) -> dict[str, dict[str, Any]]:
    found = _read_json(folder / ITEMS_FILE)
    try:
        msgspec.msgpack.encode(found)  # as it is sent
    except (OverflowError, RecursionError) as error:
        raise CheckpointError(f"cannot use {folder / ITEMS_FILE}: {error}") from error
    for item, about in found.items():
        if not isinstance(about, dict):
            raise CheckpointError(f"{folder / ITEMS_FILE}: the metadata of {item!r} is not a JSON object")
    return found


def _read_tensors(file: Path, version: str, with_weights: bool) -> dict[str, NDArray[Any]]:
    try:
        with safe_open(file, framework="numpy") as opened:
            if (opened.metadata() or {}).get("version") != version:
                raise CheckpointError(f"{file} does not belong to {HEADER_FILE}: versions differ")
            names = opened.keys() if with_weights else SIDE_TABLES
            return {name: opened.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {file.parent}: {file.name} is missing") from error
    except (
        AttributeError,
        OSError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:  # ValueError: a type that NumPy lacks
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _check(folder: Path, checkpoint: Checkpoint, with_weights: bool) -> None:
    rows = len(checkpoint.item_ids) + 1
    for name in ("item_clusters", "popularity"):
        if getattr(checkpoint, name).shape != (rows,):
            raise CheckpointError(f"{folder}: {name} has shape {getattr(checkpoint, name).shape}, wanted {(rows,)}")
    for name, points in (("key_span", 2), ("key_plane", 3)):
        wanted = (points, checkpoint.config.encoder.width)
        if getattr(checkpoint, name).shape != wanted:
            raise CheckpointError(f"{folder}: {name} has shape {getattr(checkpoint, name).shape}, wanted {wanted}")
    near, nearness = checkpoint.item_near, checkpoint.item_nearness
    if near.ndim != 2 or len(near) != rows or nearness.shape != near.shape:
        raise CheckpointError(f"{folder}: item_near has shape {near.shape}, item_nearness {nearness.shape}")
    if with_weights and content_version(checkpoint) != checkpoint.version:
        raise CheckpointError(f"{folder}: content does not match version {checkpoint.version}; the files are damaged")
    if near.dtype.kind != "i" or near.min(initial=0) < 0 or near.max(initial=0) >= rows:
        raise CheckpointError(f"{folder}: item_near names an item that does not exist")
    clusters = checkpoint.item_clusters
    if clusters.dtype.kind != "i" or clusters.min() < -1 or clusters.max() >= checkpoint.config.rules.clusters:
        raise CheckpointError(f"{folder}: item_clusters names a cluster that does not exist")
    for name, values in checkpoint.tensors().items():
        if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
            raise CheckpointError(f"{folder}: {name} holds values that are not finite numbers")
