"""Print what pyproject.toml wants, with the extras named: a layer of an image that changes only when that changes."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())
for group in [
    project["project"]["dependencies"],
    *(project["project"]["optional-dependencies"][e] for e in sys.argv[1:]),
]:
    print(*group, sep="\n")
