"""What the memory is worth where people come back to things: `make bench-quality`, or this module alone.

Check-ins (Foursquare NYC) and groceries (TaFeng; Complete Journey by type: `ramrec data groceries --items type
--households 500`): leave-one-out, and the whole last basket as the next-basket literature has it; what pruning by
quality (seed 0) and adaptive K are worth; own frequency and TIFU-KNN beside it. Trained seeds and finished studies are
kept in the run folder and reused. Writes habits.json and habits.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from api.commands.report import measured_with
from benchmarks.quality import next_basket
from benchmarks.quality.pruning import evictions
from model.config import Config, load_config
from model.data.dataset import Dataset, read_dataset
from model.serving.recommender import Recommender
from model.training.evaluation import BASELINE, FIXED_VARIANTS, MAIN_VARIANTS, Tested, rank_test_items, report
from model.training.metrics import ndcg, relative_gain
from model.training.train import train

HERE = Path(__file__).parent
LOGS = {  # name: file, config, what is kept from training
    "foursquare-nyc": ("foursquare-nyc.csv.gz", "check-ins", "leave-one-out"),
    "tafeng": ("tafeng.csv.gz", "baskets", "leave-one-out"),
    "groceries-types": ("groceries-types", "groceries", "leave-one-out"),
    "tafeng-baskets": ("tafeng.csv.gz", "baskets", "last-basket"),
    "groceries-baskets": ("groceries", "groceries", "last-basket"),
}
SEEDS = {"foursquare-nyc": 3, "tafeng": 2, "groceries-types": 3, "tafeng-baskets": 1, "groceries-baskets": 1}
CAPACITIES = (10, 25)
VARIANTS = [one for one in MAIN_VARIANTS if one.name in ("encoder", BASELINE, "own", "memory", "shuffled")]
VARIANTS += [one for one in FIXED_VARIANTS if one.name.startswith("own-")]
VARIANTS = [replace(one, stores=one.stores[:1]) for one in VARIANTS]  # store `train`, or none
COLUMNS = ("entropy", "k", "collective_k", "bank_size", "repeat", "basket")


def config_of(name: str, seed: int) -> Config:
    """How a seed of a log is trained."""
    _, config, holdout = LOGS[name]
    settings = load_config(config)
    dataset = settings.dataset.model_copy(update={"holdout": holdout})
    training = settings.training.model_copy(update={"seed": seed, "threads": 1})
    return settings.model_copy(update={"dataset": dataset, "training": training})


def trained(name: str, dataset: Dataset, seed: int, runs: Path) -> Recommender:
    """A seed of a log, trained where it is not yet."""
    folder = runs / f"{name}-seed{seed}"
    if not (folder / "checkpoint.json").exists():
        train(dataset, config_of(name, seed), folder, lambda epoch: print(name, seed, _line(epoch), flush=True))
    return Recommender.load(folder)


def _line(epoch: Any) -> str:
    return epoch.note or f"{epoch.stage} {epoch.epoch}/{epoch.of} NDCG@10 {epoch.validation['ndcg@10']:.4f}"


def tested(recommender: Recommender, dataset: Dataset, folder: Path) -> Tested:
    """A seed's ranks on the test items, kept beside its checkpoint."""
    file = folder / f"tested-{recommender.version}.npz"
    if not file.exists():
        done = rank_test_items(recommender, dataset, VARIANTS)
        columns = {name: getattr(done, name) for name in COLUMNS}
        np.savez_compressed(file, **columns, **{"/".join(key): ranks for key, ranks in done.ranks.items()})
    stored = np.load(file)
    ranks = {tuple(key.split("/")): stored[key] for key in stored.files if "/" in key}
    return Tested(ranks, **{name: stored[name] for name in COLUMNS})


def study(name: str, data: Path, runs: Path, seeds: int) -> dict[str, Any]:
    """Everything about one log."""
    dataset = read_dataset(data / LOGS[name][0], config_of(name, 0).dataset)
    recommenders = [trained(name, dataset, seed, runs) for seed in range(seeds)]
    found = [tested(one, dataset, runs / f"{name}-seed{seed}") for seed, one in enumerate(recommenders)]
    told, baskets = report(found, name), LOGS[name][2] == "last-basket"
    kept = [one.config.fusion for one in recommenders]
    return {
        **told,
        "log": {"users": dataset.users, "items": dataset.item_count, "events": len(dataset)},
        "repeats": float(dataset.is_repeat().mean()),
        "kept": [{part: getattr(one, part) for part in ("repeats", "attention", "copying")} for one in kept],
        "memory_over_encoder": _over(found, ("memory", "unmasked", "train"), ("encoder", "unmasked", "none")),
        "best_fixed_k": _best_fixed(found),
        "evictions": [] if baskets else evictions(recommenders[:1], dataset, capacities=CAPACITIES),
        "others": next_basket.baselines(dataset) if baskets else _counter(dataset),
    }


def _over(found: list[Tested], variant: tuple[str, str, str], other: tuple[str, str, str]) -> dict[str, float]:
    """Relative gain in NDCG@10 of one variant over another, means over seeds of each target."""
    with_it, without = (np.mean([ndcg(one.ranks[label]) for one in found], axis=0) for label in (variant, other))
    return relative_gain(with_it, without)


def _best_fixed(found: list[Tested]) -> dict[str, Any]:
    """The fixed own K with the largest NDCG@10, and what adaptive K gains over it."""
    labels = [label for label in found[0].ranks if label[0].startswith("own-k-")]
    best = max(labels, key=lambda label: float(np.mean([ndcg(one.ranks[label]).mean() for one in found])))
    over = _over(found, ("memory", "unmasked", "train"), best)
    return {"k": int(best[0].rpartition("-")[2]), "adaptive_over_it": over}


def _counter(dataset: Dataset) -> dict[str, Any]:
    """The user's own items by decayed count, the decay chosen on validation."""
    parts = {part: next_basket.Asked.of(dataset, part) for part in ("validation", "test")}

    def figures(part: str, decay: float) -> dict[str, float]:
        scores = next_basket.frequency_vectors(dataset, parts[part], decay)
        return next_basket.figures(dataset, parts[part], scores)

    decay = max((0.9, 0.95, 0.97, 0.99, 1.0), key=lambda one: figures("validation", one)["ndcg@10"])
    return {"own frequency": {**figures("test", decay), "parameters": {"decay": decay}}}


def main() -> None:
    """Run what is not done yet, then write habits.json and habits.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the logs")
    parser.add_argument("--runs", type=Path, default=Path("runs/habits"), help="checkpoints and finished stages")
    parser.add_argument("--seeds", nargs="*", default=[], metavar="NAME=N", help="seeds of a log; 0 leaves it out")
    parser.add_argument("--train-only", metavar="NAME:SEED", help="train one seed of one log and stop")
    asked = parser.parse_args()
    if asked.train_only:
        name, _, seed = asked.train_only.partition(":")
        dataset = read_dataset(asked.data / LOGS[name][0], config_of(name, 0).dataset)
        tested(trained(name, dataset, int(seed), asked.runs), dataset, asked.runs / f"{name}-seed{seed}")
        return
    seeds = SEEDS | {name: int(count) for name, _, count in (one.partition("=") for one in asked.seeds)}
    logs: dict[str, Any] = json.loads((HERE / "habits.json").read_text())["logs"]
    about = measured_with() | {"command": " ".join(["python -m benchmarks.quality.habits", *sys.argv[1:]])}
    for name in LOGS:
        if not (asked.data / LOGS[name][0]).exists() or not seeds[name]:
            print(f"{name}: left out ({asked.data / LOGS[name][0]}), its committed figures stay", flush=True)
            continue
        file = asked.runs / f"{name}-{seeds[name]}-seeds.json"
        if not file.exists():
            file.write_text(json.dumps(study(name, asked.data, asked.runs, seeds[name]) | {"about": about}))
        logs[name] = json.loads(file.read_text())
    (HERE / "habits.json").write_text(json.dumps({"logs": logs}, indent=1) + "\n")
    (HERE / "habits.md").write_text(table(logs))


def table(logs: dict[str, Any]) -> str:
    """habits.json as Markdown."""
    lines = []
    for name, log in logs.items():
        basket = any("basket-recall@10" in row for row in log["rows"])
        shown = ["basket-recall@10", "basket-ndcg@10", "basket-phr@10"] if basket else ["ndcg@10", "hr@10"]
        shown += ["repeat-ndcg@10", "explore-ndcg@10"]
        lines += [f"## {name}: {log['repeats']:.0%} of events repeat, {log['rows'][0]['seeds']} seeds", ""]
        lines += [f"| variant | {' | '.join(shown)} | gain in NDCG@10 over the calibrated encoder |", "|---" * 7 + "|"]
        gains = {(one["variant"], one["store"]): one for one in log["gains"]}
        for row in log["rows"]:
            if row["store"] in ("none", "train"):
                figures = " | ".join(f"{row[one]:.4f}" if one in row else "" for one in shown)
                gain = gains.get((row["variant"], row["store"]))
                over = f"{gain['gain']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]" if gain else ""
                lines.append(f"| {row['variant']} | {figures} | {over} |")
        for other, found in log["others"].items():
            figures = " | ".join(f"{found[one]:.4f}" if one in found else "" for one in shown)
            lines.append(f"| {other} | {figures} | |")
        lines += ["", f"mean own K {log['k']['mean']:.1f}, best fixed K {log['best_fixed_k']['k']}", ""]
        if log["evictions"]:
            lines += ["| capacity | eviction | NDCG@10 | quality over it |", "|---|---|---|---|"]
        for one in log["evictions"]:
            over = one["quality_over_it"]
            interval = f"{over['gain']:+.1%} [{over['low']:+.1%}, {over['high']:+.1%}]"
            lines.append(f"| {one['capacity']} | {one['eviction']} | {one['ndcg@10']:.4f} | {interval} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
