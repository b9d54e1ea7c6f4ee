"""Others' code in the same harness: RecBole's SASRec and BERT4Rec, RecTools' SASRec, RecBole's evaluator on our scores.

Each library is installed into an environment of its own under the run folder; none is a dependency. Timings only mean
something on an otherwise idle machine; ours and theirs run one after the other in one call, with the same threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from api.commands.report import measured_with
from benchmarks.quality.run import FILES
from model.config import load_config
from model.data.dataset import Dataset, Targets, read_dataset, split_of
from model.network.encoder import encode_states
from model.serving.recommender import Recommender
from model.training.encoder_stage import fit_encoder
from model.training.metrics import ranks, summary
from model.training.optimisation import Epoch
from model.training.replay import state_requests

ENVIRONMENTS = {
    "recbole": ("recbole==1.2.1", "torch==2.13.0", "numpy<2", "pandas<3", "scipy<1.14", "setuptools<81"),
    "rectools": ("rectools==0.19.0", "torch==2.13.0", "pytorch-lightning==2.5.2", "setuptools<81"),
}
HERE = Path(__file__).parent
EPOCHS = {"ml-100k": 4, "beauty": 3}
"""Of ours and of RecTools'; RecBole's are as many as `--epochs` says."""


def environment(folder: Path, name: str) -> Path:
    """Python of an environment with a baseline's library, made if it is not there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        venv.create(folder / name, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]], check=True)
    return python.absolute()


def run(python: Path, script: str, *words: object, folder: Path) -> None:
    """Run a script of this folder in another environment; libraries log into their working folder, so they get one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([str(part) for part in (python, (HERE / script).absolute(), *words)], check=True, cwd=folder)


def recbole(python: Path, model: str, dataset: Dataset, data: Path, epochs: int, out: Path) -> dict[str, Any]:
    """Train a model of RecBole's on an atomic file and read its report."""
    file = (out / f"{data.name}-{model}.json").absolute()
    run(python, "baseline_recbole.py", "train", model, data.parent.absolute(), data.name, epochs, file, folder=out)
    report: dict[str, Any] = json.loads(file.read_text())
    expected = {"users": dataset.users, "items": dataset.item_count, "interactions": len(dataset)}
    if report["data"] != expected:
        raise SystemExit(f"RecBole sees other data: {report['data']}, wanted {expected}")
    return report


def atomic(dataset: Dataset, name: str, folder: Path) -> Path:
    """A dataset without times as a RecBole folder: the order within each user stands for the time."""
    place = folder / "atomic" / name
    place.mkdir(parents=True, exist_ok=True)
    rows = zip(dataset.owners(), dataset.items, dataset.positions(), strict=True)
    lines = [f"{user}\t{item}\t{when}" for user, item, when in rows]
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (place / f"{name}.inter").write_text("\n".join([head, *lines]) + "\n")
    return place


def rectools(python: Path, dataset: Dataset, name: str, epochs: int, out: Path) -> dict[str, Any]:
    """Train RecTools' SASRec on the training events and read its report."""
    out.mkdir(parents=True, exist_ok=True)
    events, file = (out / f"{name}-events.npz").absolute(), (out / f"{name}-rectools.json").absolute()
    split, owner = split_of(dataset), dataset.owners()
    training = np.arange(len(dataset)) < split.train_end[owner]
    targets = Targets.of(split.validation, split.validation_end)
    np.savez(
        events,
        user=owner[training],
        item=dataset.items[training],
        order=dataset.positions()[training],
        asked=owner[targets.event],
        target=dataset.items[targets.event],
    )
    run(python, "baseline_rectools.py", events, epochs, file, folder=out)
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def ours(dataset: Dataset, name: str, epochs: int, out: Path) -> list[dict[str, float]]:
    """Seconds and validation NDCG@10 (what was had left out) after each epoch of our encoder, on all users."""
    config = load_config(name)
    settings = config.training.model_copy(update={"max_epochs": epochs})
    curve: list[dict[str, float]] = []
    begin = time.perf_counter()

    def after(epoch: Epoch) -> None:
        seconds = time.perf_counter() - begin
        curve.append({"epoch": epoch.epoch, "seconds": seconds, "ndcg@10": epoch.validation["ndcg@10"]})
        print(f"ours {name}", curve[-1], flush=True)

    everybody = np.ones(dataset.users, bool)
    fit_encoder(dataset, config.model_copy(update={"training": settings}), everybody, out, after)
    return curve


def times_faster(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float | None]:
    """Seconds to the best masked validation NDCG@10 that both reached: theirs over ours. None: we did not get there."""
    goal = min(max(one["ndcg@10"] for one in mine), max(one["ndcg@10, masked"] for one in theirs))
    ours_s = next((one["seconds"] for one in mine if one["ndcg@10"] >= goal), None)
    theirs_s = next((one["seconds"] for one in theirs if one["ndcg@10, masked"] >= goal), None)
    ratio = theirs_s / ours_s if ours_s and theirs_s else None
    return {"validation ndcg@10": goal, "ours_s": ours_s, "theirs_s": theirs_s, "ratio": ratio}


def same_metrics(python: Path, checkpoint: Path, dataset: Dataset, out: Path) -> dict[str, Any]:
    """Our summary and RecBole's evaluator on the same scores of our encoder on the test items."""
    recommender = Recommender.load(checkpoint)
    split = split_of(dataset)
    targets = Targets.of(split.test, split.test_end)
    states = encode_states(recommender.encoder, state_requests(dataset, targets.before, dataset.item_count))
    with torch.inference_mode():
        scores = recommender.encoder.logits(torch.from_numpy(states)).numpy()
    target = dataset.items[targets.event].astype(np.int64)
    out.mkdir(parents=True, exist_ok=True)
    stored, found = ((out / name).absolute() for name in ("scores.npz", "metrics.json"))
    np.savez(stored, scores=scores, target=target)
    run(python, "baseline_recbole.py", "metrics", stored, found, folder=out)
    mine, theirs = summary(ranks(scores, target)), json.loads(found.read_text())
    pairs = {name: (mine[name.replace("hit", "hr")], theirs[name]) for name in theirs}
    equal = all(round(a, 4) == round(b, 4) for a, b in pairs.values())
    return {"ours": {name: a for name, (a, _) in pairs.items()}, "recbole": theirs, "equal_to_4_decimals": equal}


def compared(name: str, dataset: Dataset, data: Path, models: list[str], epochs: int, out: Path) -> dict[str, Any]:
    """Everybody's training on one dataset, one after the other."""
    report: dict[str, Any] = {"ours": ours(dataset, name, EPOCHS[name], out / f"ours-{name}-{int(time.time())}")}
    found = {"RecTools SASRec": rectools(environment(out, "rectools"), dataset, name, EPOCHS[name], out)}
    for model in models:
        found[f"RecBole {model}"] = recbole(environment(out, "recbole"), model, dataset, data, epochs, out)
    faster = {who: times_faster(report["ours"], one["curve"]) for who, one in found.items()}
    print(json.dumps(faster, indent=1), flush=True)
    return report | found | {"times_faster": faster}


def main() -> None:
    """Write what is asked for into baselines.json beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument(
        "--run", type=Path, default=Path("runs/ml-100k-seed0"), help="ML-100K run; its scores are compared"
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each RecBole model")
    parser.add_argument("--datasets", nargs="*", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--models", nargs="*", default=["SASRec", "BERT4Rec"])
    asked = parser.parse_args()
    out = asked.out.absolute()
    file_out = HERE / "baselines.json"
    report: dict[str, Any] = json.loads(file_out.read_text()) if file_out.exists() else {}
    for name in asked.datasets:
        file = asked.data / FILES[name]
        dataset = read_dataset(file, load_config(name).dataset)
        data = file if file.is_dir() else atomic(dataset, name, out)
        if name == "ml-100k":
            report["metrics"] = same_metrics(environment(out, "recbole"), asked.run, dataset, out)
        report[name] = compared(name, dataset, data, asked.models, asked.epochs, out)
        command = " ".join(["python -m benchmarks.quality.baselines", *sys.argv[1:]])
        report[name]["about"] = measured_with() | {"command": command}
        file_out.write_text(json.dumps(report, indent=1) + "\n")  # now: the next one may take long


if __name__ == "__main__":
    main()
