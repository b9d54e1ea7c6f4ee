"""`ramrec ingest`, `ramrec recommend` and `ramrec reembed`: jobs over all users of a running service."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import ApiUrlOption, EngineOption, MemoryUrlOption, RayOption, RunOption, WorkersOption


def reembed(
    run: RunOption,
    memory_url: MemoryUrlOption = "http://127.0.0.1:8001",
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    ray_address: RayOption = None,
) -> None:
    """Move all users to the model that `POST /model/reload` (or SIGHUP) asked for, then switch the service to it.

    The job may be stopped and started again. If the memory service needs a token, set RAMREC_MEMORY_TOKEN.

    Ray workers need the folder --run and the memory service under the same names.
    """
    from api.jobs.bulk import open_runner
    from api.jobs.reembed import reembed as move

    with open_runner(engine, workers, ray_address) as runner:
        moved = move(run, memory_url, _memory_token(), runner)
    typer.echo(f"{moved:,} users moved; the model in {run} serves")


def recommend(
    run: RunOption,
    out: Annotated[Path, typer.Option(help="Folder to write Parquet files to.")],
    memory_url: MemoryUrlOption = "http://127.0.0.1:8001",
    top_n: Annotated[int, typer.Option(min=1, max=1000, help="Number of items for each user.")] = 10,
    include_seen: Annotated[
        bool | None,
        typer.Option(
            "--include-seen/--exclude-seen",
            help="List items that the user already had, or leave them out (default: what the model's data suggests).",
        ),
    ] = None,
    timestamp: Annotated[
        float | None, typer.Option(help="Time of all recommendations, seconds UTC (default: when the job begins).")
    ] = None,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    ray_address: RayOption = None,
) -> None:
    """Write recommendations for all users, as POST /recommend would answer them at one time, to Parquet files.

    One row per user: user_id, items, scores (best first), source, version of the record, model_version. The job does
    not count as a use of memories.

    Each file appears when it is complete. If the job is stopped, the same command writes the missing files. Ray workers
    need the folders --run and --out and the memory service under the same names. If the memory service needs a token,
    set RAMREC_MEMORY_TOKEN.
    """
    from api.jobs.bulk import open_runner
    from api.jobs.recommend_all import recommend_all

    with open_runner(engine, workers, ray_address) as runner:
        written = recommend_all(
            run,
            memory_url,
            out,
            top_n,
            exclude_seen=None if include_seen is None else not include_seen,
            timestamp=timestamp,
            token=_memory_token(),
            runner=runner,
        )
    typer.echo(f"{written.users:,} users in {written.files} files written to {out}; {written.before} were there")


def _memory_token() -> str | None:
    """The memory service's token, from the environment."""
    return os.environ.get("RAMREC_MEMORY_TOKEN") or os.environ.get("RAMREC_API_MEMORY_TOKEN")


def ingest(
    file: Annotated[
        Path,
        typer.Option(
            help="JSON lines (.jsonl, each line an interaction as in POST /memories), CSV, Parquet, RecBole folder or "
            ".inter, or sequence file; all but Parquet also as .gz."
        ),
    ],
    url: ApiUrlOption = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="RAMREC_KEY", help="API key with the scope `ingest`.")] = None,
    config: Annotated[
        str | None, typer.Option(help="As for `ramrec train`; its `dataset` section names the columns of a table.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a service that is overloaded or cannot be reached.")
    ] = 300,
    again: Annotated[bool, typer.Option(help="Send everything, also what was acknowledged before.")] = False,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    ray_address: RayOption = None,
) -> None:
    """Send a log of interactions to a running service, each user's events in order of time.

    The whole file is checked first, then sent in bounded memory. If the job is stopped, the same command resumes it:
    what was acknowledged is noted in ~/.local/state/ramrec (XDG_STATE_HOME) under the file's checksum and the URL.

    On Ray, the users are divided into 16 parts, each with a journal of its own. All workers read the file and write to
    that folder under the same names. Resume with the engine that you started with.
    """
    from api.jobs.backfill import backfill
    from api.jobs.bulk import open_runner
    from model.config import Config, load_config

    dataset = (load_config(config) if config else Config()).dataset
    try:
        with open_runner(engine, workers, ray_address) as runner:
            outcome = backfill(url, file, dataset, key=key, patience_s=patience, again=again, runner=runner)
    except KeyboardInterrupt:
        typer.echo("ramrec: stopped; the same command goes on from there", err=True)
        sys.exit(130)
    for reason in outcome.tally.reasons:
        typer.echo(f"rejected: {reason}", err=True)
    typer.echo(outcome.tally.summary())
    if outcome.before:
        typer.echo(f"{outcome.before:,} were acknowledged before and not sent; --again sends everything")
