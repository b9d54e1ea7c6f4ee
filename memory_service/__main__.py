"""`python -m memory_service`: serve the banks of one checkpoint."""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import ValidationError

from memory_service.http.app import create_app
from memory_service.protocol.call.logs import configure_logs
from memory_service.protocol.call.tracing import tracer_of
from memory_service.settings import MemorySettings
from memory_service.store.embedded import embedded_valkey
from model.config import describe
from model.errors import RamrecError


def main() -> int:
    """Serve until stopped; returns the exit code. Expected errors end it with exit code 2 and one line on stderr."""
    # uvicorn re-raises SIGTERM once it has stopped; as KeyboardInterrupt it ends the embedded Valkey, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        settings = MemorySettings(**_options())
        configure_logs(settings.log_level)
        with ExitStack() as stack:
            if settings.redis_url is None:
                url = stack.enter_context(embedded_valkey(settings.data_dir, settings.fsync))
                settings = settings.model_copy(update={"redis_url": url})
            server = LeavingServer(
                uvicorn.Config(
                    create_app(settings, tracer_of("ramrec-memory")),
                    host=settings.host,
                    port=settings.port,
                    access_log=False,
                    log_config=None,
                    timeout_graceful_shutdown=10,
                )
            )
            gc.freeze()  # what was loaded stays, and collecting it would delay all calls
            server.run()
            return 0 if server.started else 1
    except ValidationError as error:
        print(f"memory service: settings: {describe(error)}", file=sys.stderr)
    except RamrecError as error:
        print(f"memory service: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 0
    return 2


class LeavingServer(uvicorn.Server):
    """Keeps answering until callers ask the other memory replicas."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let others take over, then stop."""
        app: Any = self.config.app
        if not self.force_exit:
            await app.state.service.leave(app.state.settings.leave_s)
        await super().shutdown(sockets)


def _options() -> dict[str, Any]:
    """The options of the command line; other settings come from the environment and the defaults."""
    parser = argparse.ArgumentParser(prog="python -m memory_service", description=__doc__)
    parser.add_argument("--run", type=Path, help="checkpoint folder")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int)
    parser.add_argument("--open", action="store_const", const=True, help="listen beyond loopback without a token")
    parser.add_argument("--redis-url", help="redis://, rediss:// or unix://; none: an embedded Valkey")
    parser.add_argument("--data-dir", type=Path, help="folder of the embedded Valkey")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where banks are searched")
    parser.add_argument(
        "--collective",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether users' entries are searched for others",
    )
    parser.add_argument("--fsync", choices=("everysec", "always"), help="AOF policy of the embedded Valkey")
    return {name: value for name, value in vars(parser.parse_args()).items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
