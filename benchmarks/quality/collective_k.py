"""Whether few memories of others do as well as a hundred: the shipped rule against K = 100 for everybody.

    python -m benchmarks.quality.collective_k beauty=RUN:DATASET sports=RUN:DATASET

Both rules with the same trained model (store `train` and `live`, nothing masked). Writes collective_k.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from api.commands.report import measured_with
from model.data.dataset import Dataset, read_dataset
from model.serving.recommender import Recommender
from model.training.evaluation import MAIN_VARIANTS, Tested, rank_test_items
from model.training.metrics import ndcg, relative_gain

RESULTS = Path(__file__).with_suffix(".json")
MOST = 100
VARIANTS = [one for one in MAIN_VARIANTS if one.name == "memory"]


def study(recommender: Recommender, dataset: Dataset) -> dict[str, Any]:
    """Mean K, NDCG@10 and what the shipped rule gains over K = 100, by store."""
    shipped = rank_test_items(recommender, dataset, VARIANTS)
    config = recommender.checkpoint.config
    bounds = {"collective_k_base": 10.0 * MOST, "collective_k_min": MOST, "collective_k_max": MOST}
    config = config.model_copy(update={"rules": config.rules.model_copy(update=bounds)})
    recommender.checkpoint = replace(recommender.checkpoint, config=config)
    most = rank_test_items(recommender, dataset, VARIANTS)
    return {"mean_k": float(shipped.collective_k.mean()), "stores": _stores(shipped, most)}


def _stores(shipped: Tested, most: Tested) -> dict[str, Any]:
    labels = [label for label in shipped.ranks if label[1] == "unmasked"]
    return {
        store: {
            "ndcg@10": float(ndcg(shipped.ranks[name, protocol, store]).mean()),
            "over_k_100": relative_gain(
                ndcg(shipped.ranks[name, protocol, store]), ndcg(most.ranks[name, protocol, store])
            ),
        }
        for name, protocol, store in labels
    }


def main() -> None:
    """Study the runs named."""
    found = {}
    for named in sys.argv[1:]:
        name, _, paths = named.partition("=")
        run, _, file = paths.partition(":")
        recommender = Recommender.load(Path(run))
        found[name] = study(recommender, read_dataset(Path(file), recommender.config.dataset))
        print(name, found[name], flush=True)
    about = measured_with() | {"command": "python -m benchmarks.quality.collective_k NAME=RUN:DATASET …"}
    RESULTS.write_text(json.dumps({"logs": found, "about": about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
