"""`ramrec train` and `ramrec evaluate`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.options import DatasetOption, DeviceOption

if TYPE_CHECKING:
    from model.config import Config
    from model.data.dataset import Dataset


def train(
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")],
    config: Annotated[
        str | None,
        typer.Option(help="TOML file, the name of a shipped one (ml-100k), or a RecBole YAML file."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides training.seed of the config.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Train the encoder and the memory fusion. An interrupted run with the same config resumes where it stopped.

    Under torchrun, several processes share every batch: `torchrun --nproc-per-node 4 -m api.cli train …`. All of them
    must see the same folders --dataset and --out. With --device cuda, each process of a machine takes its own GPU.

    Equal seeds give equal checkpoints on the CPU. On a GPU they may differ in the last digits.
    """
    from api.commands.training_display import TrainingDisplay
    from model.data.dataset import read_dataset
    from model.training.distributed import joined
    from model.training.train import train as fit

    settings = _settings(config, seed)
    with joined(device) as peers:
        data = read_dataset(_dataset_path(config, dataset), settings.dataset)
        if peers.is_first:
            typer.echo(_summary(data))
        with TrainingDisplay() if peers.is_first else nullcontext(lambda epoch: None) as display:
            checkpoint = fit(data, settings, out, display, peers)
    if peers.is_first:
        typer.echo(f"checkpoint {checkpoint.version} is in {out}")


def _settings(config: str | None, seed: int | None) -> Config:
    from model.config import Config, load_config

    settings = load_config(config) if config else Config()
    if seed is None:
        return settings
    return settings.model_copy(update={"training": settings.training.model_copy(update={"seed": seed})})


def _dataset_path(config: str | None, dataset: Path) -> Path:
    """Where the dataset is: a RecBole config may name its parent folder as `data_path`.

    Prints each setting of a RecBole config that has no effect here.
    """
    from model.config import RECBOLE_SUFFIXES
    from model.recbole import read_recbole

    if config is None or Path(config).suffix not in RECBOLE_SUFFIXES:
        return dataset
    translated = read_recbole(Path(config).read_text(encoding="utf-8"))
    for key, reason in translated.ignored.items():
        typer.echo(f"{config}: {key} has no effect: {reason}")
    under = Path(translated.data_path or ".") / dataset
    return under if not dataset.exists() and under.exists() else dataset


def _summary(data: Dataset) -> str:
    lengths = data.lengths()
    return (
        f"{data.users:,} users, {data.item_count:,} items, {len(data):,} interactions after the filter; "
        f"median sequence {int(sorted(lengths)[len(lengths) // 2])}"
        f"{'' if data.has_times else ', no timestamps'}{'' if data.has_ratings else ', no ratings'}"
    )


def evaluate(
    run: Annotated[list[Path], typer.Option("--run", help="Checkpoint folder; repeat it to average over seeds.")],
    dataset: DatasetOption,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Measure how well the test items are ranked among all items, with and without memory.

    Compares the encoder alone, adaptive memory, memory with a fixed K, and shuffled memory, in both protocols.
    """
    from api.commands.report import measured_with, print_report
    from model.data.dataset import read_dataset
    from model.network.tensors import find_device
    from model.serving.recommender import Recommender
    from model.training.evaluation import evaluate as measure

    where = find_device(device)
    recommenders = [Recommender.load(folder, where) for folder in run]
    data = read_dataset(dataset, recommenders[0].config.dataset)
    report = measure(recommenders, data, dataset.name.split(".")[0])
    print_report(report)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report | {"about": measured_with()}, indent=1) + "\n", encoding="utf-8")
