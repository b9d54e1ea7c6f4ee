"""Who may import whom, and that the memory service never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("model", "memory_service", "api")
BASE = ("model.config", "model.errors", "model.files", "model.checkpoint")
"""What every room may use; none of them loads torch."""
ALLOWED = {  # the longest folder that a file lies in decides, or the file itself
    "model": (*BASE, "model.recbole", "model.memory"),
    "model/memory": ("model.memory", "model.config"),
    "model/data": ("model.data", "model.memory", *BASE),
    "model/network": ("model.network", "model.data", "model.memory", *BASE),
    "model/training": ("model",),
    "model/serving": ("model.serving", "model.network", "model.memory", *BASE),
    "memory_service": ("memory_service", "model.memory", *BASE),
    "memory_service/protocol": ("memory_service.protocol", "model.memory", *BASE),
    "memory_service/store": (
        "memory_service.store",
        "memory_service.protocol",
        "memory_service.tasks",
        "model.memory",
        *BASE,
    ),
    "memory_service/index": ("memory_service.index", "memory_service.store.batch", "model.memory", *BASE),
    "api": ("api", "model", "memory_service.protocol"),
    "api/memory/in_process.py": ("api", "model", "memory_service"),  # runs it in the same process
    "api/commands/supervisor.py": (  # starts the memory service
        "api",
        "model",
        "memory_service.protocol",
        "memory_service.settings",
        "memory_service.store.embedded",
    ),
}
WITHOUT_TORCH = {"torch", "redis", "fastapi", "starlette", "uvicorn"}
"""What `model/memory` imports nothing of; `faiss` only for everybody's memories."""


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if "." in node.module else {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PARTS}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_follow_the_rules(room):
    inside = [one for one in ALLOWED if one.startswith(f"{room}/")]
    files = sorted((ROOT / room).glob("**/*.py")) or [ROOT / room]
    files = [one for one in files if not any(one.is_relative_to(ROOT / other) for other in inside)]
    assert files
    for file in files:
        for name in imported(file):
            assert any(name == one or name.startswith(f"{one}.") for one in ALLOWED[room]), f"{file}: {name}"


@pytest.mark.parametrize("module", ["memory_service.http.app", "memory_service.__main__", "model.checkpoint"])
def test_the_memory_service_never_loads_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_memory_semantics_do_no_io_and_know_no_torch():
    files = sorted((ROOT / "model" / "memory").glob("**/*.py"))
    assert len(files) > 5
    for file in files:
        text = file.read_text(encoding="utf-8")
        names = {
            alias.name.split(".")[0]
            for n in ast.walk(ast.parse(text))
            if isinstance(n, ast.Import)
            for alias in n.names
        }
        names |= {
            n.module.split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module
        }
        assert not names & WITHOUT_TORCH, file
        assert "open(" not in text, file


def test_nothing_but_tests_and_benchmarks_imports_the_memory_service_into_the_api_process():
    for part in PARTS:
        for file in (ROOT / part).glob("**/*.py"):
            assert "api.memory.in_process" not in imported(file), file


def test_no_pickle_anywhere():
    for part in PARTS:
        for file in (ROOT / part).glob("**/*.py"):
            names = {n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Import)}
            assert not any(alias.name in ("pickle", "cloudpickle", "dill") for n in names for alias in n.names)
