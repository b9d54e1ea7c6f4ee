"""`python -m memory_service.transfer export|import`: move users' memories from one deployment to another.

The file consists of JSON lines: items first (`{"item": …}`), then users (`{"user": …}`).

Items are named by id, so that catalogue numbers need not agree. Keys are base64 of little-endian fp16; sums and states
of little-endian f4. Lines without habits, of an older version, are accepted: habits are computed from their logs.
Tombstones are not exported: only the deployment that forgot a user knows of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from memory_service.settings import RedisSettings, user_data_dir
from memory_service.store.embedded import embedded_valkey, running_valkey
from memory_service.transfer.files import export_file, import_file
from model.config import describe
from model.errors import RamrecError


def main() -> int:
    """The command line. Exits with code 2 and one line on stderr where settings, Redis or the file are at fault."""
    parser = argparse.ArgumentParser(prog="python -m memory_service.transfer", description=__doc__)
    parser.add_argument("what", choices=("export", "import"))
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="import: replace the records of users who have one")
    parser.add_argument("--redis-url", help="redis://, rediss:// or unix://; none: the embedded Valkey")
    parser.add_argument("--data-dir", type=Path, default=user_data_dir(), help="folder of the embedded Valkey")
    asked = parser.parse_args()
    try:
        given = RedisSettings(**({"redis_url": asked.redis_url} if asked.redis_url else {})).redis_url
        with _redis_url(given, asked.data_dir) as url:
            if asked.what == "export":
                print(f"{export_file(url, asked.file):,} lines written to {asked.file}")
            else:
                counts = import_file(url, asked.file, asked.overwrite)
                print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    except ValidationError as error:
        print(f"ramrec: settings: {describe(error)}", file=sys.stderr)
        return 2
    except RamrecError as error:
        print(f"ramrec: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _redis_url(given: str | None, data_dir: Path) -> Iterator[str]:
    """The URL that was given, or that of the embedded Valkey, which is started unless it runs already."""
    running = given or running_valkey(data_dir)
    if running is not None:
        yield running
    else:
        with embedded_valkey(data_dir, "everysec") as url:
            yield url


if __name__ == "__main__":
    sys.exit(main())
