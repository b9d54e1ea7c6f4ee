"""Runs in RecTools' own environment (see baselines.py) and imports nothing of ours.

EVENTS.npz EPOCHS OUT.json    RecTools' SASRec on training events (user, item, order), with seconds and validation
                              NDCG@10 after each epoch: unmasked, and masked (what was had left out)
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

SHAPE = {
    "n_factors": 64,
    "n_blocks": 2,
    "n_heads": 2,
    "session_max_len": 50,
    "dropout_rate": 0.2,
    "loss": "softmax",
    "lr": 1e-3,
    "batch_size": 128,
}


def train(events: str, epochs: str, out: str) -> None:
    stored = np.load(events)
    frame = pd.DataFrame({Columns.User: stored["user"], Columns.Item: stored["item"], Columns.Weight: 1.0})
    frame[Columns.Datetime] = pd.to_datetime(stored["order"], unit="s")
    dataset, curve, seconds = Dataset.construct(frame), [], 0.0
    model = SASRecModel(**SHAPE, deterministic=True)
    for epoch in range(1, int(epochs) + 1):
        begin = time.perf_counter()
        model.fit_partial(dataset, min_epochs=1, max_epochs=1)
        seconds += time.perf_counter() - begin
        found = {name: ndcg(model, dataset, stored, masked) for name, masked in (("", False), (", masked", True))}
        curve.append({"epoch": epoch, "seconds": seconds} | {f"ndcg@10{name}": value for name, value in found.items()})
        print("RecTools SASRec", curve[-1], flush=True)
    about = {"users": len(np.unique(stored["user"])), "interactions": len(frame)}
    Path(out).write_text(json.dumps({"model": "SASRec", "data": about, "settings": SHAPE, "curve": curve}))


def ndcg(model: SASRecModel, dataset: Dataset, stored: np.lib.npyio.NpzFile, masked: bool) -> float:
    """NDCG@10 of the validation items; ties are broken by the library."""
    users = stored["asked"]
    lists = model.recommend(users=users, dataset=dataset, k=10, filter_viewed=masked)
    target = pd.Series(stored["target"], index=users)
    rank = lists.loc[lists[Columns.Item].to_numpy() == target.loc[lists[Columns.User]].to_numpy(), Columns.Rank]
    return float((1 / np.log2(rank.to_numpy() + 1.0)).sum() / len(users))


if __name__ == "__main__":
    train(*sys.argv[1:])
