"""Speed of the serving API, rerun with one command: `make bench-serving`. Results: benchmarks/serving/results.json.

    python -m benchmarks.serving.run --run RUN --dataset data/ml-1m.txt.gz [PART …]

Starts `ramrec serve`, gives it everybody's history (once; it is kept in --work for the next time, unless `ingest` is
among the parts: then anew, and timed), and asks. The api, the memory service, Valkey and who asks share the machine.
Needs wrk. `--url` measures a service that runs already on this machine, with --dataset ingested.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.measures import Measure, measured, store
from benchmarks.serving import litserve_peer, speed
from benchmarks.serving.asking import write_bodies
from benchmarks.serving.deployment import Deployment, ingest, is_empty, serving
from model.checkpoint import load_checkpoint
from model.config import load_config
from model.data.dataset import Dataset, read_dataset

RESULTS = Path(__file__).with_name("results.json")
PARTS = ("ingest", "speed", "overload", "litserve")
INGEST_TARGET = 5000


def main() -> None:
    asked = _arguments()
    dataset = read_dataset(asked.dataset, load_config(asked.config).dataset)
    write_bodies(asked.work / "bodies", dataset)
    with _deployment(asked, dataset) as (run, deployment):
        bench = speed.Bench(deployment, asked.work / "bodies", asked.seconds)
        parts = {
            "speed": partial(speed.measure, bench),
            "overload": partial(speed.overload, bench),
            "litserve": partial(litserve_peer.measure, bench, run, asked.work),
        }
        for name in (name for name in parts if name in asked.parts):
            print(f"— {name}", flush=True)
            _keep(asked, name, parts[name]())


def _keep(asked: argparse.Namespace, name: str, measures: list[Measure]) -> None:
    from api.commands.report import measured_with

    command = f"python -m benchmarks.serving.run --run RUN --dataset {asked.dataset.name} {name}"
    about = {"command": command, "seconds": asked.seconds}
    store(name, measures, measured_with() | about, asked.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="trained checkpoint")
    parser.add_argument("--dataset", type=Path, required=True, help="what it was trained on")
    parser.add_argument("--config", default="ml-1m", help="the shipped config that says how both are laid out now")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--work", type=Path, default=Path("build/bench-serving"), help="memories, environments, bodies")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--url", help="a running `ramrec serve` of --run")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    asked = parser.parse_args()
    asked.parts = asked.parts or [part for part in PARTS if not (asked.url and part == "ingest")]
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if asked.url and "ingest" in asked.parts:
        parser.error("ingest begins with an empty service of its own: not with --url")
    return asked


@contextmanager
def _deployment(asked: argparse.Namespace, dataset: Dataset) -> Iterator[tuple[Path, Deployment]]:
    """The checkpoint and a service of it that knows everybody's history."""
    if asked.url:
        yield asked.run, Deployment.at(asked.url)
        return
    run = asked.run
    data_dir = asked.work / f"memories-{load_checkpoint(run, with_weights=False).version}"
    if "ingest" in asked.parts:
        shutil.rmtree(data_dir, ignore_errors=True)
    with serving(run, data_dir) as url:
        deployment = Deployment.at(url)
        if is_empty(url):
            name = f"ramrec ingest of {asked.dataset.name}, end to end"
            print("— ingest", flush=True)
            rate = measured(name, ingest(deployment, asked.dataset), "interactions/s", at_least=INGEST_TARGET)
            if "ingest" in asked.parts:
                _keep(asked, "ingest", [rate])
        yield run, deployment


if __name__ == "__main__":
    main()
