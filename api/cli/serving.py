"""`ramrec serve` and `ramrec memory`: run the services, move memories between deployments."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from api.cli.options import DataDirOption, Device, RedisOption, RunOption

memory_app = typer.Typer(help="Run the memory service on its own; export and import memories.", no_args_is_help=True)


def serve(
    run: RunOption,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the REST API.")] = 8000,
    host: Annotated[str, typer.Option(help="Address that the REST API listens on.")] = "127.0.0.1",
    memory_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the memory service.")] = 8001,
    redis_url: RedisOption = None,
    memory_url: Annotated[str | None, typer.Option(help="Use a memory service that already runs.")] = None,
    data_dir: DataDirOption = None,
    keys: Annotated[
        Path | None, typer.Option(envvar="RAMREC_API_KEYS", help="File of API keys that `ramrec keys` wrote.")
    ] = None,
    everybody: Annotated[
        bool, typer.Option("--open", envvar="RAMREC_API_OPEN", help="Listen beyond loopback without API keys.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(min=1, max=256, envvar="RAMREC_API_WORKERS", help="Number of api processes behind the port."),
    ] = 1,
    memory_replicas: Annotated[
        int,
        typer.Option(
            min=1,
            max=256,
            envvar="RAMREC_MEMORY_REPLICAS",
            help="Number of memory replicas, on the memory port and the ports after it. Each answers for any user.",
        ),
    ] = 1,
    device: Annotated[
        Device,
        typer.Option(envvar="RAMREC_API_DEVICE", help="Where the model runs; auto: on a GPU if there is one."),
    ] = "cpu",
) -> None:
    """Serve a checkpoint: the REST API, the memory service, and an embedded Valkey that keeps the memories.

    Each runs as a process of its own. A process that ends is restarted as long as another of its kind still runs.
    """
    from api.commands.supervisor import serve as supervise
    from memory_service.protocol.call.logs import configure_logs

    if device == "cuda":  # fail before any process is started
        from model.network.tensors import find_device

        find_device(device)
    configure_logs("info")
    code = supervise(
        run,
        host,
        port,
        memory_port,
        redis_url,
        memory_url,
        data_dir,
        keys,
        everybody,
        workers,
        memory_replicas,
        device,
    )
    sys.exit(code)


@memory_app.command("serve")
def memory_serve(
    run: RunOption,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    redis_url: RedisOption = None,
    data_dir: DataDirOption = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda to search memories on the first GPU (default: cpu).")
    ] = None,
) -> None:
    """Serve only the memories, for an api that runs elsewhere."""
    options = {"--run": run, "--host": host, "--port": port, "--data-dir": data_dir, "--device": device}
    _replace_process("memory_service", options, redis_url=redis_url)


@memory_app.command("export")
def memory_export(
    out: Annotated[Path, typer.Option(help="File to write JSON lines to.")],
    redis_url: RedisOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Write all items and all users' memories as JSON lines.

    A running service is not disturbed. Each line is consistent in itself; different users may be read at different
    times.
    """
    _replace_process("memory_service.transfer", {"--file": out, "--data-dir": data_dir}, "export", redis_url=redis_url)


@memory_app.command("import")
def memory_import(
    file: Annotated[Path, typer.Option(help="File that `ramrec memory export` wrote.", exists=True, dir_okay=False)],
    overwrite: Annotated[bool, typer.Option(help="Replace users who are already there.")] = False,
    redis_url: RedisOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Read exported memories. Users who are already there are kept as they are; forgotten users stay forgotten."""
    options = {"--file": file, "--data-dir": data_dir}
    more = ["--overwrite"] if overwrite else []
    _replace_process("memory_service.transfer", options, "import", *more, redis_url=redis_url)


def _replace_process(module: str, options: Mapping[str, object], *words: str, redis_url: str | None) -> NoReturn:
    """Run `python -m module` in place of this process, which has imported more than the memory service needs.

    The URL of Redis may hold a password, so it is passed in the environment.
    """
    from api.commands.supervisor import HUGE_PAGES

    words += tuple(word for name, value in options.items() if value is not None for word in (name, str(value)))
    redis = {} if redis_url is None else {"RAMREC_MEMORY_REDIS_URL": redis_url}
    os.execve(sys.executable, [sys.executable, "-m", module, *words], {**HUGE_PAGES, **os.environ, **redis})
