"""Training by two processes over gloo: the same steps as one process takes, and one failing process ends both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from model.checkpoint import load_checkpoint
from model.training.distributed import Peers
from model.training.optimisation import STATE_FILE
from tests.synthetic import cyclic_dataset

ROOT = Path(__file__).parents[3]
CONFIG = """
[encoder]
dim = 16
layers = 1
heads = 2
window = 8
dropout = 0.0
[rules]
capacity = 10
clusters = 4
k_max = 6
k_base = 5
similarity_threshold = -1.0
[fusion]
heads = 2
dropout = 0.0
[training]
precision = "float32"
max_epochs = 3
fusion_max_epochs = 2
batch_tokens = 250
fusion_batch = 51
threads = 1
"""


def prepared(folder: Path) -> list[str]:
    """A dataset and a config without dropout; the words of `ramrec train`."""
    data = cyclic_dataset(users=41)
    owners = data.owners()
    rows = [f"{data.user_ids[u]},i{item},{time}" for u, item, time in zip(owners, data.items, data.times, strict=True)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (folder / "config.toml").write_text(CONFIG)
    return ["train", "--dataset", str(folder / "log.csv"), "--config", str(folder / "config.toml")]


def run(*words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launched = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "-m") if processes > 1 else ()
    count = (f"--nproc-per-node={processes}",) if processes > 1 else ()
    command = [sys.executable, "-m", *launched[:1], *count, *launched[1:], "api.cli", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def history(folder: Path) -> list[dict[str, float]]:
    with safe_open(folder / STATE_FILE, framework="np") as opened:
        return json.loads(opened.metadata()["progress"])["history"]


def losses(text: str) -> dict[tuple[str, str], float]:
    """The printed losses, by stage and epoch."""
    told = re.findall(r"^(\w+) (\d+)/\d+  loss (\S+)", text, re.MULTILINE)
    return {(stage, epoch): float(loss) for stage, epoch, loss in told}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[str], dict[tuple[str, str], float]]:
    """Folders of a run by one process and of a run by two; the arguments of the latter, and its losses."""
    folder = tmp_path_factory.mktemp("peers")
    words = prepared(folder)
    one, two = run(*words, "--out", str(folder / "one")), run(*words, "--out", str(folder / "two"), processes=2)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert two.stdout.count("checkpoint") == 1  # the first process alone speaks
    assert losses(two.stdout) == pytest.approx(losses(one.stdout), abs=2e-3)
    assert len(losses(two.stdout)) >= 7
    return folder / "one", folder / "two", [*words, "--out", str(folder / "two")], losses(two.stdout)


def test_two_processes_take_the_steps_of_one(trained):
    one, two, _, _ = trained
    alone, together = (load_file(folder / STATE_FILE) for folder in (one, two))
    assert alone.keys() == together.keys()
    for name, values in alone.items():
        if name.startswith("now."):
            assert np.allclose(together[name], values, atol=2e-4), name
    for first, second in zip(history(one), history(two), strict=True):
        assert second == pytest.approx(first, abs=0.03)  # a rank may change where two items are as good
    alone, together = (load_checkpoint(folder) for folder in (one, two))
    assert np.array_equal(alone.item_clusters, together.item_clusters)
    for name, values in alone.weights.items():
        assert np.allclose(together.weights[name], values, atol=1e-3), name


def test_a_run_goes_on_with_any_number_of_processes(trained):
    _, two, words, told = trained
    again = run(*words)
    assert again.returncode == 0, again.stderr
    assert {stage for stage, _ in losses(again.stdout)} == {"calibration", "fusion"}  # the encoder was done
    assert losses(again.stdout) == pytest.approx({k: v for k, v in told.items() if k[0] != "encoder"}, abs=2e-3)
    assert load_checkpoint(two).version


def test_a_failing_process_ends_all(tmp_path):
    words = prepared(tmp_path)
    text = (tmp_path / "config.toml").read_text().replace("threads = 1", "threads = 1\nlearning_rate = 1e30")
    (tmp_path / "config.toml").write_text(text)
    failed = run(*words, "--out", str(tmp_path / "out"), processes=2)
    assert failed.returncode != 0
    assert "the loss is" in failed.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_single_process_needs_no_others():
    layer, alone = torch.nn.Linear(3, 1), Peers()
    loss = layer(torch.ones(4, 3)).mean()
    assert alone.backward(layer, loss, 1.0) == loss.item()
    assert layer.weight.grad is not None
    assert list(range(10))[alone.share] == list(range(10))
    assert [list(range(10))[Peers(rank, 3).share] for rank in range(3)] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
