"""Options that several commands share, so that each is worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Device = Literal["auto", "cpu", "cuda"]
RunOption = Annotated[Path, typer.Option("--run", help="Checkpoint folder that `ramrec train` wrote.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs; auto: on a GPU if there is one.")]
DatasetOption = Annotated[
    Path,
    typer.Option(
        "--dataset",
        help="RecBole folder (.inter, .item), CSV or Parquet file, or sequence file (plain or .gz).",
    ),
]
ApiUrlOption = Annotated[str, typer.Option(help="Base URL of the REST API.")]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of the embedded Valkey (default: the user's data folder)."),
]
MemoryUrlOption = Annotated[str, typer.Option("--memory-url", help="Base URL of the memory service.")]
EngineOption = Annotated[
    Literal["local", "ray"], typer.Option(help="Work in this process, or on Ray (pip install 'ramrec[ray]').")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Ray workers, one core each (default: one for each core of the cluster).")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="Address of a Ray cluster (auto, HOST:PORT, ray://…). Without it, a cluster is started on this machine.",
    ),
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="RAMREC_MEMORY_REDIS_URL",
        show_envvar=True,
        help="Redis or Valkey that keeps the memories (default: an embedded Valkey). "
        "Pass a password in the variable: other users of the machine can read the command line.",
    ),
]
