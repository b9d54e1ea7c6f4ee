"""The source distribution and the wheel: complete, and usable outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.system.test_imports import PARTS, ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SHIPPED = ("*.py", "py.typed", "configs/*.toml", "inspector/static/*")


def python(*words: object, cwd: Path, **environment: str) -> str:
    """Run this Python in a folder; returns what it printed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped_files() -> set[str]:
    """All files of the packages that users need."""
    found = (file for part in PARTS for pattern in SHIPPED for file in (ROOT / part).rglob(pattern))
    return {file.relative_to(ROOT).as_posix() for file in found if "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel installed, which was built from the source distribution."""
    made = tmp_path_factory.mktemp("made")
    source = made / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    python("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(made)!r})", cwd=source)
    with tarfile.open(made / f"ramrec-{VERSION}.tar.gz") as archive:
        archive.extractall(made, filter="data")
    pip = ("-m", "pip", "--disable-pip-version-check")
    unpacked = made / f"ramrec-{VERSION}"
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", made, unpacked, cwd=made)
    wheel, target = made / f"ramrec-{VERSION}-py3-none-any.whl", made / "installed"
    python(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=made)
    return target


def test_the_wheel_holds_every_package_and_its_data(installed):
    parts = {file.relative_to(installed).parts[0] for file in installed.rglob("*.py")}
    assert parts == set(PARTS)
    found = {file.relative_to(installed).as_posix() for file in installed.rglob("*") if file.is_file()}
    files = shipped_files()
    assert {"model/configs/ml-100k.toml", "api/inspector/static/index.html", *(f"{p}/py.typed" for p in PARTS)} <= files
    assert files - found == set()


def test_the_installed_command_runs_outside_the_repository(installed, tmp_path):
    words = (installed / "bin" / "ramrec", "--version")
    assert python(*words, cwd=tmp_path, PYTHONPATH=str(installed)) == f"ramrec {VERSION}\n"
    code = "import api.cli, memory_service, model; print(api.cli.__file__, memory_service.__file__, model.__file__)"
    for file in python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split():
        assert Path(file).is_relative_to(installed)


def test_the_chart_has_the_version_of_the_package():
    chart = yaml.safe_load((ROOT / "docker/helm/ramrec/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)
    assert f"## [{VERSION}] - " in (ROOT / "CHANGELOG.md").read_text()
