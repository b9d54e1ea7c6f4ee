"""Where networks run: a device is found or refused, and every tensor is made where the weights are."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data.dataset import Targets, split_of
from model.memory.record import EncodeJob
from model.network.contrast import ContrastiveViews
from model.network.encoder import SequenceEncoder, StateRequests, encode_states
from model.network.tensors import CPU, DeviceError, evaluating, find_device, item_mask
from model.serving.recommender import Query, Recommender
from model.training.collective_layout import layout_of, sampled_keys
from model.training.distributed import Peers
from model.training.encoder_stage import Windows, next_item_loss, validate_encoder
from model.training.evaluation import evaluate, memory_space_of
from model.training.fusion_stage import memory_ranks, repeat_bias
from model.training.replay import adaptive, collective, replay, trajectory
from model.training.train import cluster_items, train
from tests.synthetic import cyclic_dataset, habitual_config, random_checkpoint, random_memories, small_config

ROOT = Path(__file__).parents[3]
NETWORK_FOLDERS = ("model/network", "model/serving", "model/training")
MADE_ON_THE_CPU = {
    "model/network/fusion.py": {"of"},  # memories come from numpy; `MemoryTokens.to` moves them
    "model/serving/recommender.py": {"_part", "top_items"},  # weights before they are moved; scores after
    "model/training/distributed.py": {"gathered", "from_first"},  # numbers that travel by gloo
    "model/training/memory_rules.py": {"_activation"},  # two dozen weights, fitted on the CPU
}
"""Functions that make tensors and leave them on the CPU."""
FROM_NUMPY = ("torch.from_numpy", "MemoryTokens.of")
FACTORIES = {f"torch.{name}" for name in ("arange", "empty", "eye", "full", "ones", "rand", "randn", "tensor", "zeros")}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WITH_SKETCH = {"score": "cosine", "skip": True, "sketch": 4}


# ----------------------------------------------------------------------------------- finding and refusing


def test_a_device_is_found_by_its_name(monkeypatch):
    assert find_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == find_device("cuda").type == "cuda"
    assert find_device("cpu") == CPU


def test_a_device_that_cannot_be_used_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"PyTorch sees no GPU.*--device cpu"):
        find_device("cuda")
    with pytest.raises(DeviceError, match="device tpu: unknown; use auto, cpu or cuda"):
        find_device("tpu")


@pytest.mark.parametrize(
    "command",
    [
        ["api.cli", "train", "--dataset", "none", "--out", "none"],
        ["api.cli", "evaluate", "--dataset", "none", "--run", "none"],
        ["api.cli", "serve", "--run", "none"],
        ["api", "--run", "none"],
    ],
)
def test_commands_refuse_a_missing_gpu_in_one_line(command):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *command, "--device", "cuda"]
    ended = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "device cuda: PyTorch sees no GPU" in ended.stderr
    assert ended.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------- following the weights


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return Recommender.of(random_checkpoint(habitual_config(), items=12))


@pytest.fixture
def elsewhere():
    """Tensors made without naming a device are on `meta`, and fail as soon as they meet one of the CPU."""
    with torch.device("meta"):
        yield


def test_the_objectives_make_tensors_where_the_weights_are(elsewhere):
    dataset = cyclic_dataset(users=20, items=6, length=9)
    with torch.device("cpu"):
        encoder = SequenceEncoder(small_config(WITH_SKETCH).encoder, 6)
    windows = Windows(np.array([[1, 2, 3], [4, 5, 0], [6, 0, 0]]), np.array([[0, 1, 1], [0, 1, 0], [0, 0, 0]]))
    for objective in ("softmax", "sampled", "gbce"):
        loss = next_item_loss(encoder, windows, small_config(objective=objective, negatives=5).training)
        loss.backward()
        assert loss.isfinite()
    views = ContrastiveViews(dataset, np.ones(20, bool), window=4)
    for targets in (windows.targets, windows.targets[2:]):
        assert views.loss(encoder, targets, np.random.default_rng(0), 1.0).device == CPU
    assert validate_encoder(encoder, dataset)["mrr"] > 0


@pytest.mark.parametrize("exact_items", [100, 20])
def test_serving_makes_tensors_where_the_weights_are(elsewhere, exact_items):
    with torch.device("cpu"):
        exact = Recommender.of(random_checkpoint(habitual_config(), items=40))
        recommender = Recommender(exact.checkpoint, exact.encoder, exact.fusion, exact_items=exact_items)
    assert (recommender.index is None) == (exact_items == 100)
    memories, states = random_memories(3, 4, 40), np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    asked = [Query(state, seen=np.array([3, 4]), top_n=5) for state in states]
    for answer in recommender.recommend(asked, memories, [True] * 3):
        assert len(answer.items) == 5
        assert np.isfinite(answer.explanation.state).all()
    assert recommender.encode([EncodeJob(0, np.array([1, 2, 0, 3]), np.array([0, 2, -1]))])[0][0].shape == (3, 16)


def test_fitting_makes_tensors_where_the_weights_are(recommender, elsewhere):
    dataset = cyclic_dataset(users=20, items=12, length=9)
    state, space, split = trajectory(dataset, recommender.encoder), memory_space_of(recommender), split_of(dataset)
    asked = replay(dataset, state, space, Targets.of(split.validation, split.validation_end)).replay
    asked = collective(dataset, state, space, asked, "train")
    found = memory_ranks(recommender.fusion, recommender.table, dataset, asked, adaptive(asked))
    assert found.unmasked.shape == found.masked.shape == (20,)
    assert -15 <= repeat_bias(dataset, recommender.table, asked) <= 15
    keys = sampled_keys(dataset, recommender.encoder, recommender.config)
    assert layout_of(dataset, recommender.encoder, keys).near.shape == (13, 64)
    assert len(cluster_items(recommender.encoder, recommender.config)) == 13


@pytest.mark.parametrize("folder", NETWORK_FOLDERS)
def test_every_tensor_is_made_on_a_device_or_moved_to_it(folder):
    """What comes from numpy is followed by `.to(…)` at once; other tensors name a device. Modules are moved as a whole,
    so their `__init__` need not, nor need the functions above.
    """
    for file in (ROOT / folder).glob("*.py"):
        path, tree = f"{folder}/{file.name}", ast.parse(file.read_text(encoding="utf-8"))
        moved = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "to"}
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            if function.name not in {"__init__", *MADE_ON_THE_CPU.get(path, ())}:
                for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                    name, options = ast.unparse(call.func), {option.arg for option in call.keywords}
                    assert name not in FROM_NUMPY or id(call) in moved, f"{path}:{call.lineno}"
                    assert name not in FACTORIES or "device" in options, f"{path}:{call.lineno}"


def test_a_mask_of_items_has_no_padding():
    mask = item_mask([np.array([0, 2]), np.array([], int), np.array([3, 3])], 4, CPU)
    assert mask.tolist() == [[False, False, True, False], [False] * 4, [False, False, False, True]]
    assert item_mask([], 4, CPU).shape == (0, 4)


@pytest.mark.parametrize("training", [True, False])
def test_encoding_leaves_the_encoder_in_its_mode_and_drops_nothing(training):
    torch.manual_seed(0)
    encoder = SequenceEncoder(small_config({"dropout": 0.9}).encoder, 12).train(training)
    requests = StateRequests.of_jobs([EncodeJob(0, np.array([1, 2, 3]), np.array([0]))])
    first, second = encode_states(encoder, requests), encode_states(encoder, requests)
    assert np.array_equal(first, second)
    assert all(module.training is training for module in encoder.modules())
    with evaluating(encoder):
        assert not encoder.training
    assert encoder.training is training


# ------------------------------------------------------------------------------------------------ on a GPU


@gpu
def test_a_model_answers_on_a_gpu_as_on_the_cpu():
    checkpoint = random_checkpoint(habitual_config(), items=200)
    on_cpu, on_gpu = Recommender.of(checkpoint), Recommender.of(checkpoint, find_device("cuda"))
    jobs = [EncodeJob(0, np.arange(1, 30), np.array([-1, 0, 9, 20])), EncodeJob(0, np.array([5, 0, 7]), np.array([1]))]
    for (keys, state), (keys_there, state_there) in zip(on_cpu.encode(jobs), on_gpu.encode(jobs), strict=True):
        assert np.allclose(keys, keys_there, atol=1e-4)
        assert np.allclose(state, state_there, atol=1e-4)
    memories, states = random_memories(4, 6, 200), np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    memories = replace(memories, present=np.array([[1, 2], [3, 0], [0, 0], [4, 0]]))
    asked = [Query(state, seen=np.array([3, 4]), top_n=20) for state in states]
    indexed = Recommender(checkpoint, on_gpu.encoder, on_gpu.fusion, exact_items=20)
    wanted = on_cpu.recommend(asked, memories, [True] * 4)
    for found in (on_gpu.recommend(asked, memories, [True] * 4), indexed.recommend(asked, memories, [True] * 4)):
        for mine, theirs in zip(wanted, found, strict=True):
            assert np.allclose(mine.scores, theirs.scores, atol=1e-3)
            assert np.allclose(mine.explanation.state, theirs.explanation.state, atol=1e-3)
            assert np.allclose(mine.explanation.memories, theirs.explanation.memories, atol=1e-3)


@gpu
@pytest.mark.parametrize("objective", ["softmax", "sampled", "gbce"])
def test_training_on_a_gpu_learns_and_its_run_is_resumed_there(tmp_path, objective):
    config = small_config(WITH_SKETCH, objective=objective, max_epochs=4, negatives=8, contrast_weight=0.1)
    dataset, peers, losses = cyclic_dataset(), Peers(device=find_device("cuda")), []
    on_gpu = train(dataset, config, tmp_path, lambda epoch: losses.append(epoch.loss), peers)
    assert losses[3] < losses[0]
    again = train(dataset, config, tmp_path, peers=peers)  # the encoder is read, the fusion fitted once more
    for name, values in on_gpu.weights.items():
        if name.startswith("encoder."):
            assert np.array_equal(again.weights[name], values)
    here, there = (Recommender.of(on_gpu, device) for device in (CPU, find_device("cuda")))
    for mine, theirs in zip(*(evaluate([one], dataset, "cycle")["rows"] for one in (here, there)), strict=True):
        assert mine["mrr"] == pytest.approx(theirs["mrr"], abs=0.02)
