"""Others' code in the same harness: RecBole's SASRec and BERT4Rec on ML-100K, and RecBole's evaluator on our scores.

RecBole is installed into an environment of its own under the run folder; nothing of it is a dependency. Timings only
mean something on an otherwise idle machine; ours and theirs run one after the other in one call, with the same threads.
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

from api.cli import measured_with
from model.config import load_config
from model.dataset import leave_one_out, read_dataset
from model.encoder import SequenceEncoder, encode_states
from model.encoder_training import fit_encoder
from model.metrics import ranks, summary
from model.optimisation import Epoch
from model.recommender import Recommender
from model.replay import state_requests

PINNED = ("recbole==1.2.1", "torch==2.13.0", "numpy<2", "pandas<3", "scipy<1.14", "setuptools<81")
SCRIPT = Path(__file__).with_name("baseline_recbole.py")


def environment(folder: Path) -> Path:
    """Python of an environment with RecBole, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINNED], check=True)
    return python.absolute()


def recbole(python: Path, model: str, data: Path, epochs: int, out: Path) -> dict[str, Any]:
    """Train a model of RecBole's and read its report. RecBole logs into its working folder, so it gets one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [python, SCRIPT.absolute(), "train", model, data.absolute(), str(epochs), out.absolute()]
    subprocess.run([str(part) for part in command], check=True, cwd=out.parent)
    report: dict[str, Any] = json.loads(out.read_text())
    expected = {"users": 943, "items": 1349, "interactions": 99287}
    if report["data"] != expected:
        raise SystemExit(f"RecBole sees other data: {report['data']}, wanted {expected}")
    return report


def ours(data: Path, epochs: int, out: Path) -> list[dict[str, float]]:
    """Seconds and validation NDCG@10 (what was had left out) after each epoch of our encoder, on all users."""
    dataset, config = read_dataset(data / "ml-100k"), load_config("ml-100k")
    settings = config.training.model_copy(update={"max_epochs": epochs})
    curve: list[dict[str, float]] = []
    begin = time.perf_counter()

    def after(epoch: Epoch) -> None:
        seconds = time.perf_counter() - begin
        curve.append({"epoch": epoch.epoch, "seconds": seconds, "ndcg@10": epoch.validation["ndcg@10"]})

    everybody = np.ones(dataset.users, bool)
    encoder = fit_encoder(dataset, config.model_copy(update={"training": settings}), everybody, out, after)
    assert isinstance(encoder, SequenceEncoder)
    return curve


def times_faster(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float | None]:
    """Seconds to the best masked validation NDCG@10 that both reached: theirs over ours. None: we did not get there."""
    goal = min(max(one["ndcg@10"] for one in mine), max(one["ndcg@10, masked"] for one in theirs))
    ours_s = next((one["seconds"] for one in mine if one["ndcg@10"] >= goal), None)
    theirs_s = next((one["seconds"] for one in theirs if one["ndcg@10, masked"] >= goal), None)
    ratio = theirs_s / ours_s if ours_s and theirs_s else None
    return {"validation ndcg@10": goal, "ours_s": ours_s, "theirs_s": theirs_s, "ratio": ratio}


def same_metrics(python: Path, run: Path, data: Path, out: Path) -> dict[str, Any]:
    """Our summary and RecBole's evaluator on the same scores of our encoder on the test items."""
    recommender, dataset = Recommender.load(run), read_dataset(data / "ml-100k")
    event = leave_one_out(dataset).test
    states = encode_states(recommender.encoder, state_requests(dataset, event, dataset.item_count))
    with torch.inference_mode():
        scores = recommender.encoder.logits(torch.from_numpy(states)).numpy()
    target = dataset.items[event].astype(np.int64)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "scores.npz", scores=scores, target=target)
    files = [(out / name).absolute() for name in ("scores.npz", "metrics.json")]
    subprocess.run([str(part) for part in (python, SCRIPT.absolute(), "metrics", *files)], check=True, cwd=out)
    mine, theirs = summary(ranks(scores, target)), json.loads(files[1].read_text())
    pairs = {name: (mine[name.replace("hit", "hr")], theirs[name]) for name in theirs}
    equal = all(round(a, 4) == round(b, 4) for a, b in pairs.values())
    return {"ours": {name: a for name, (a, _) in pairs.items()}, "recbole": theirs, "equal_to_4_decimals": equal}


def main() -> None:
    """Write baselines.json beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument(
        "--run", type=Path, default=Path("runs/ml-100k-seed0"), help="checkpoint whose scores are compared"
    )
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each baseline")
    parser.add_argument("--models", nargs="*", default=["SASRec", "BERT4Rec"])
    asked = parser.parse_args()
    python = environment(asked.out / "recbole")
    report: dict[str, Any] = {"metrics": same_metrics(python, asked.run, asked.data, asked.out)}
    report["ours"] = ours(asked.data, 4, asked.out / f"ours-{int(time.time())}")
    for model in asked.models:
        report[model] = recbole(python, model, asked.data, asked.epochs, asked.out / f"{model}.json")
    report["times_faster"] = {model: times_faster(report["ours"], report[model]["curve"]) for model in asked.models}
    report["about"] = measured_with() | {"command": " ".join(["python -m benchmarks.quality.baselines", *sys.argv[1:]])}
    print(json.dumps({name: report[name] for name in ("times_faster", "metrics")}, indent=1))
    Path(__file__).with_name("baselines.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
