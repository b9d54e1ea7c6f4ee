"""Everything about recommendation quality, rerun with one command: `make bench-quality` (`--help` for parts of it).

Stages are cached in the run folder: a seed that is trained, a dataset that is evaluated and a study that is done are
not repeated; delete their folder or file to do so. What has no data is left out and said. The result is
benchmarks/quality/results.json, results.md and the plots beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from api.commands.report import measured_with
from benchmarks.quality import adaptive, pruning, report, streams
from model.config import load_config
from model.data.dataset import Dataset, read_dataset
from model.serving.recommender import Recommender
from model.training.evaluation import MAIN_VARIANTS, VARIANTS, Tested, rank_test_items
from model.training.evaluation import report as report_of

HERE = Path(__file__).parent
FILES = {
    "ml-100k": "ml-100k",
    "beauty": "Beauty.txt.gz",
    "sports": "Sports_and_Outdoors.txt.gz",
    "ml-1m": "ml-1m.txt.gz",
}
DECIDED = ("entropy", "k", "collective_k", "bank_size")
WITHOUT_FIXED_K = ("sports",)
"""Large catalogues whose fixed-K variants would take as long as their training."""
SEEDS = {"ml-100k": 5, "beauty": 3, "sports": 3, "ml-1m": 3}


class Bench:
    """Where data and runs are, and what is cached."""

    def __init__(self, data: Path, runs: Path, seeds: dict[str, int], only_cached: bool = False) -> None:
        self.data, self.runs, self.seeds, self.only_cached = data, runs, seeds, only_cached

    def wanted(self, study: str) -> bool:
        """Whether a study is to be run, or was."""
        return not self.only_cached or self._file(study).exists()

    def _file(self, study: str) -> Path:
        return self.runs / "quality" / f"{study}.json"

    def dataset(self, name: str) -> Dataset:
        return read_dataset(self.data / FILES[name], load_config(name).dataset)

    def available(self, name: str) -> bool:
        there = (self.data / FILES[name]).exists()
        if not there:
            print(f"{name}: no {self.data / FILES[name]}, left out", flush=True)
        return there

    def trained(self, name: str) -> list[Recommender]:
        """The seeds of a dataset; those missing are trained, one thread each, an interrupted one goes on."""
        folders = [self.runs / f"{name}-seed{seed}" for seed in range(self.seeds[name])]
        for seed, folder in enumerate(folders):
            if not (folder / "checkpoint.json").exists():
                command = [sys.executable, "-m", "api.cli", "train", "--dataset", str(self.data / FILES[name])]
                command += ["--config", name, "--seed", str(seed), "--out", str(folder)]
                subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [Recommender.load(folder) for folder in folders]

    def tested(self, name: str) -> list[Tested]:
        """Each seed's ranks on the test items, kept beside its checkpoint."""
        return [self._tested(name, seed, one) for seed, one in enumerate(self.trained(name))]

    def _tested(self, name: str, seed: int, recommender: Recommender) -> Tested:
        file = self.runs / f"{name}-seed{seed}" / f"tested-{recommender.version}.npz"
        if not file.exists():
            print(f"testing {name} seed {seed} …", flush=True)
            variants = MAIN_VARIANTS if name in WITHOUT_FIXED_K else VARIANTS
            done = rank_test_items(recommender, self.dataset(name), variants)
            columns = {column: getattr(done, column) for column in DECIDED}
            np.savez_compressed(file, **columns, **{"/".join(key): ranks for key, ranks in done.ranks.items()})
        stored = np.load(file)
        ranks = {tuple(key.split("/")): stored[key] for key in stored.files if "/" in key}
        return Tested(ranks, **{column: stored[column] for column in DECIDED})

    def cached(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a stage, from its file if it was done before."""
        file = self._file(name)
        if not file.exists():
            print(f"{name} …", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(work()))
            partial.replace(file)
        return json.loads(file.read_text())


def evaluations(bench: Bench) -> dict[str, Any]:
    """Rows and gains of every dataset whose data is there."""
    reports = {}
    for name in FILES:
        if bench.available(name) and bench.seeds[name]:
            reports[name] = report_of(bench.tested(name), name)
    return reports


def experiments(bench: Bench) -> dict[str, Any]:
    """The studies beside the main table."""
    done: dict[str, Any] = {}
    folder = bench.runs / "quality"

    def one(name: str, dataset: str, work: Callable[[Dataset], Any]) -> None:
        if bench.wanted(name) and bench.available(dataset) and bench.seeds[dataset]:
            done[name] = bench.cached(name, lambda: work(bench.dataset(dataset)))

    for name in FILES:
        if bench.available(name) and bench.seeds[name] and name not in WITHOUT_FIXED_K:
            done[f"adaptive-k-{name}"] = adaptive.study(bench.tested(name))
    one("evictions-ml-100k", "ml-100k", lambda data: pruning.evictions(bench.trained("ml-100k"), data))
    if bench.wanted("repeat-log"):
        done["repeat-log"] = bench.cached("repeat-log", lambda: pruning.repeat_study(folder))
    short = _short(load_config("ml-100k"))
    one("over-time-ml-100k", "ml-100k", lambda data: streams.over_time(data, short, folder / "over-time"))
    for name in ("ml-100k", "beauty"):
        config, place = load_config(name), folder / name
        one(
            f"new-users-{name}",
            name,
            lambda data, name=name, config=config, place=place: streams.new_users(
                data, config, place, bench.trained(name)[0]
            ),
        )
        one(
            f"new-items-{name}",
            name,
            lambda data, config=config, place=place: streams.new_items(data, config, place),
        )
    return done


def _short(config: Any) -> Any:
    """Fewer epochs: the stream needs seven trainings."""
    settings = config.training.model_copy(update={"max_epochs": 15, "fusion_max_epochs": 6})
    return config.model_copy(update={"training": settings})


def main() -> None:
    """Run what is not cached, then write results.json, results.md and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help=f"folder with {', '.join(FILES.values())}")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and cached stages")
    parser.add_argument("--seeds", nargs="*", default=[], metavar="NAME=N", help="seeds of a dataset; 0 leaves it out")
    parser.add_argument("--no-experiments", action="store_true", help="only the main table")
    parser.add_argument("--only-cached", action="store_true", help="of the studies, only those already done")
    asked = parser.parse_args()
    seeds = SEEDS | {name: int(count) for name, _, count in (one.partition("=") for one in asked.seeds)}
    bench = Bench(asked.data, asked.runs, seeds, asked.only_cached)
    reports = evaluations(bench)
    results = {
        "rows": [row for one in reports.values() for row in one["rows"]],
        "gains": [gain for one in reports.values() for gain in one["gains"]],
        "spread": {
            name: {part: one[part] for part in ("entropy", "k", "collective_k")} for name, one in reports.items()
        },
        "experiments": {} if asked.no_experiments else experiments(bench),
        "about": measured_with() | {"command": " ".join(["python -m benchmarks.quality.run", *sys.argv[1:]])},
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, HERE, {name: bench.runs / f"{name}-seed0" for name in reports})


if __name__ == "__main__":
    main()
