"""`python -m api`: serve the REST API with one checkpoint."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import ValidationError

from api.http.app import create_app
from api.http.draining import DrainingServer
from api.settings import ApiSettings
from api.workers import Worker
from memory_service.protocol.call.logs import configure_logs
from memory_service.protocol.call.tracing import tracer_of
from model.config import describe
from model.errors import RamrecError


def main() -> int:
    """Serve until SIGTERM or Ctrl-C. Returns 2, with one line on stderr, if settings or the checkpoint are at fault."""
    try:
        options = _options()
        place = options.pop("worker", None)
        settings = ApiSettings(**options)
        configure_logs(settings.log_level)
        worker = Worker(place) if place else None
        app = create_app(settings, tracer_of("ramrec-api"), worker)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=10,
        )
        server = DrainingServer(config, settings.drain_s)
        gc.freeze()  # what is loaded stays: a collection that visits it would stop all requests for a tenth of a second
        server.run(worker.listen(settings.host, settings.port) if worker else None)
        return 0 if server.started else 1
    except ValidationError as error:
        print(f"api: settings: {describe(error)}", file=sys.stderr)
    except RamrecError as error:
        print(f"api: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 0
    return 2


def _options() -> dict[str, Any]:
    """Options that the command line names; all others come from the environment or are defaults."""
    parser = argparse.ArgumentParser(prog="python -m api", description=__doc__)
    parser.add_argument("--run", type=Path, help="checkpoint folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the model runs")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int)
    parser.add_argument("--keys", type=Path, help="file of API keys (`ramrec keys create`)")
    parser.add_argument("--open", action="store_const", const=True, help="listen beyond loopback without API keys")
    parser.add_argument("--memory-url", help="base URL of the memory service")
    parser.add_argument("--worker", type=Path, help="path of this worker's files among those of `ramrec serve`")
    return {name: value for name, value in vars(parser.parse_args()).items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
