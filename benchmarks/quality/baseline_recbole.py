"""Runs in RecBole's own environment (see baselines.py) and imports nothing of ours.

train MODEL DATA NAME EPOCHS OUT.json   a sequential model on DATA/NAME, with seconds and validation NDCG@10 after each
                                        epoch (unmasked by RecBole; masked: without all else that the user ever takes),
                                        and test metrics, unmasked and masked, from its full score matrix
metrics RANKS.npz OUT.json              RecBole's evaluator on scores and targets of ours
"""

import builtins
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct
from recbole.utils import get_model, get_trainer, init_seed

for name in ("bool", "float", "int", "object"):  # RecBole 1.2.1 was written for a NumPy that had them
    if not hasattr(np, name):
        setattr(np, name, getattr(builtins, name))

SETTINGS = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "TIME_FIELD": "timestamp",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "user_inter_num_interval": "[5,inf)",
    "item_inter_num_interval": "[5,inf)",
    "MAX_ITEM_LIST_LENGTH": 50,
    "hidden_size": 64,
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
    "metrics": ["Hit", "NDCG"],
    "topk": [5, 10],
    "valid_metric": "NDCG@10",
    "show_progress": False,
    "stopping_step": 10,
    "seed": 0,
}


def train(model: str, data: str, name: str, epochs: str, out: str) -> None:
    config = Config(model=model, dataset=name, config_dict=SETTINGS | {"data_path": data, "epochs": int(epochs)})
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    about = {"users": dataset.user_num - 1, "items": dataset.item_num - 1, "interactions": dataset.inter_num}
    had = history(dataset)
    parts = data_preparation(config, dataset)  # which drops every user's first event from the dataset
    network = get_model(model)(config, parts[0].dataset)
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    begin, curve, aside = time.perf_counter(), [], 0.0

    def after(epoch: int, score: float) -> None:
        nonlocal aside
        now = time.perf_counter()
        masked = figures(ranks(network, parts[1], had)[1])["ndcg@10"]
        curve.append(
            {"epoch": epoch + 1, "seconds": now - begin - aside, "ndcg@10": float(score), "ndcg@10, masked": masked}
        )
        aside += time.perf_counter() - now  # the masked figure is ours, and does not count against them
        network.train()
        print(model, curve[-1], flush=True)

    trainer.fit(parts[0], parts[1], saved=False, callback_fn=after)
    unmasked, masked = ranks(network, parts[2], had)
    by_recbole = {name: float(value) for name, value in trainer.evaluate(parts[2], load_best_model=False).items()}
    report = {"model": model, "data": about, "curve": curve, "test by RecBole": by_recbole}
    Path(out).write_text(json.dumps(report | {"test, unmasked": figures(unmasked), "test, masked": figures(masked)}))


def history(dataset: object) -> np.ndarray:
    """(users, items) True where a user ever takes an item."""
    had = np.zeros((dataset.user_num, dataset.item_num), bool)
    had[np.asarray(dataset.inter_feat["user_id"]), np.asarray(dataset.inter_feat["item_id"])] = True
    return had


@torch.no_grad()
def ranks(network: torch.nn.Module, test: object, had: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the test items, ties counted against us: among all items, and with the history less the target out."""
    network.eval()
    found = [], []
    for interaction, _, _, target in test:
        scores = network.full_sort_predict(interaction).view(len(interaction), -1).numpy()
        scores[:, 0] = -np.inf
        rows, target = np.arange(len(scores)), np.asarray(target)
        own = scores[rows, target][:, None]
        found[0].append((scores >= own).sum(axis=1))
        others = had[interaction["user_id"].numpy()]
        others[rows, target] = False
        scores[others] = -np.inf
        found[1].append((scores >= own).sum(axis=1))
    return np.concatenate(found[0]), np.concatenate(found[1])


def figures(rank: np.ndarray) -> dict[str, float]:
    gain = 1 / np.log2(rank + 1.0)
    return {f"hr@{k}": float((rank <= k).mean()) for k in (5, 10)} | {
        f"ndcg@{k}": float(np.where(rank <= k, gain, 0).mean()) for k in (5, 10)
    }


def metrics(scores_file: str, out: str) -> None:
    """scores (N, V) and target (N,): what RecBole's evaluator makes of their top 10."""
    stored = np.load(scores_file)
    scores, target = torch.from_numpy(stored["scores"]), torch.from_numpy(stored["target"])
    top = torch.topk(scores, 10, dim=1).indices
    hit = top == target[:, None]
    struct = DataStruct()
    struct.set("rec.topk", torch.cat([hit.int(), torch.ones(len(hit), 1, dtype=torch.int)], dim=1))
    config = {"metrics": ["Hit", "NDCG"], "topk": [5, 10], "metric_decimal_place": 4}
    found = Evaluator(config).evaluate(struct)
    Path(out).write_text(json.dumps({name: float(value) for name, value in found.items()}))


if __name__ == "__main__":
    {"train": train, "metrics": metrics}[sys.argv[1]](*sys.argv[2:])
