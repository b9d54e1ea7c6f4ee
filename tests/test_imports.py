"""Who may import whom, and that the memory service never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("model", "memory_service", "api")
ALLOWED = {
    "model": ("model",),
    "memory_service": (
        "memory_service",
        "model.rules",
        "model.bank",
        "model.habits",
        "model.collective",
        "model.events",
        "model.plane",
        "model.checkpoint",
        "model.config",
        "model.errors",
    ),
    "api": (
        "api",
        "model",
        "memory_service.schemas",
        "memory_service.settings",
        "memory_service.slots",
        "memory_service.telemetry",
        "memory_service.embedded",  # `ramrec serve` starts all parts
    ),
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if "." in node.module else {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_imports_follow_the_rules(part):
    files = sorted((ROOT / part).glob("**/*.py"))
    assert len(files) > 5
    for file in files:
        for name in imported(file):
            assert any(name == one or name.startswith(f"{one}.") for one in ALLOWED[part]), f"{file}: {name}"


@pytest.mark.parametrize("module", ["memory_service.app", "memory_service.__main__", "model.checkpoint"])
def test_the_memory_service_never_loads_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_pure_parts_do_no_io():
    for name in ("rules", "bank", "habits", "events", "metrics"):
        text = (ROOT / "model" / f"{name}.py").read_text(encoding="utf-8")
        assert not {"torch", "redis", "faiss", "fastapi", "open("} & set(text.replace("(", "( ").split())


def test_no_pickle_anywhere():
    for part in PARTS:
        for file in (ROOT / part).glob("**/*.py"):
            names = {n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Import)}
            assert not any(alias.name in ("pickle", "cloudpickle", "dill") for n in names for alias in n.names)
