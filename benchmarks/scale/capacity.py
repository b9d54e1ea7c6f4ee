"""What a cluster needs, as pure functions of measured costs: bytes, CPU seconds, machines, money, and what ends first.

Units: bytes, seconds, requests a second. A request costs one memory replica, whichever, so requests divide by replicas;
so do resident banks. What does not divide: every replica holds the whole collective index (or the same sample of it),
and every replica hears of every write.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GIB = 2.0**30
MILLION = 1e6


@dataclass(frozen=True)
class Costs:
    """What one unit costs; measured (`benchmarks/scale/results.json`)."""

    redis_user: float
    redis_entry: float
    """Bytes in Redis of a record, and of each of its entries, overheads included."""
    resident_user: float
    """Bytes of a bank kept in a memory replica."""
    shared_entry: float
    """Bytes of an entry in the collective index."""
    replica: float
    """Bytes of a memory replica that holds nothing."""
    own_s: float
    """CPU of a memory replica for a request without the collective scope."""
    others_s: float
    """CPU more for the collective scope over a million entries."""
    tenfold_s: float
    """CPU more for each ten times as many entries."""
    write_s: float
    """CPU of the memory replica that writes an event."""
    heard_s: float
    """CPU of every other one, which hears of it."""
    api_s: float
    """CPU of the api for a request."""
    redis_request_s: float
    """CPU of Redis for a request."""
    redis_write_s: float
    """CPU of Redis for an event written."""
    redis_heard_s: float
    """CPU of Redis more for each memory replica that hears of it."""
    wire_memory: float
    """Bytes between api and memory replica for a request."""
    wire_caller: float
    """Bytes between caller and api."""


@dataclass(frozen=True)
class Load:
    """What is asked of the cluster. `entries`: memories of a user on average; `writes`: events a second; `active`:
    share of the users who are resident; `share`: of all entries that the collective index keeps.
    """

    users: float
    entries: float
    requests: float
    writes: float = 0.0
    active: float = 1.0
    share: float = 1.0

    @property
    def kept(self) -> float:
        """Entries in the collective index."""
        return self.users * self.entries * self.share


@dataclass(frozen=True)
class Machine:
    """A kind of machine. A memory replica or an api is a process that uses one core."""

    cores: int = 16
    ram: float = 128 * GIB
    network: float = 1.25e9
    """Bytes a second."""
    price: float = 0.80
    """An hour, in any currency."""
    busy: float = 0.6
    """Share of CPU and network that may be used, so that latency stays low."""
    full: float = 0.75
    """Share of the RAM that may be used."""


@dataclass(frozen=True)
class Plan:
    """Machines of each kind of process. `replicas` of the memory service, at most `side_by_side` on a machine."""

    replicas: int
    side_by_side: int
    replica_bytes: float
    """RAM of each: index, resident banks, the process."""
    memory_machines: int
    redis_machines: int
    api_machines: int
    price_hour: float
    binds: str
    """What decides the number of memory machines: cpu, ram or network."""

    @property
    def machines(self) -> int:
        """All."""
        return self.memory_machines + self.redis_machines + self.api_machines


class DoesNotFitError(ValueError):
    """No number of such machines is enough."""


def own_scope_only(costs: Costs) -> Costs:
    """The same with the collective scope switched off: nobody needs to hear of others' writes."""
    return replace(costs, shared_entry=0.0, others_s=0.0, tenfold_s=0.0, heard_s=0.0, redis_heard_s=0.0)


def record_bytes(costs: Costs, entries: float) -> float:
    """A user's record in Redis, and on the way to a replica that reads it.

    >>> record_bytes(replace(NOTHING, redis_user=100.0, redis_entry=10.0), entries=5)
    150.0
    """
    return costs.redis_user + costs.redis_entry * entries


def index_bytes(costs: Costs, load: Load) -> float:
    """The collective index of each replica."""
    return load.kept * costs.shared_entry


def banks_bytes(costs: Costs, load: Load) -> float:
    """Resident banks of all replicas together: each user is at one."""
    return load.users * load.active * costs.resident_user


def others_s(costs: Costs, kept: float) -> float:
    """CPU of a memory replica for the collective scope of a request over so many entries."""
    return max(0.0, costs.others_s + costs.tenfold_s * math.log10(kept / MILLION)) if kept else 0.0


def memory_s(costs: Costs, load: Load) -> float:
    """CPU of the memory replica that answers a request."""
    return costs.own_s + others_s(costs, load.kept)


def write_limit(costs: Costs, machine: Machine) -> float:
    """Events a second at which each replica is busy with hearing of them: more replicas do not help."""
    return machine.busy / costs.heard_s if costs.heard_s else math.inf


def replicas_needed(costs: Costs, load: Load, machine: Machine) -> int:
    """Memory replicas by CPU. Raises DoesNotFitError from the limit of writes on."""
    spare = machine.busy - load.writes * costs.heard_s
    if spare <= 0:
        limit = write_limit(costs, machine)
        raise DoesNotFitError(
            f"{load.writes:,.0f} writes a second are beyond the {limit:,.0f} that replicas can hear of"
        )
    divided = load.requests * memory_s(costs, load) + load.writes * max(0.0, costs.write_s - costs.heard_s)
    return max(1, math.ceil(divided / spare))


def plan(costs: Costs, load: Load, machine: Machine, redis_replicas: int = 1) -> Plan:
    """The fewest machines. Raises DoesNotFitError."""
    count = replicas_needed(costs, load, machine)
    sides = range(1, min(machine.cores, count) + 1)
    ways = [(*found, side) for side in sides if (found := _memory_machines(costs, load, machine, count, side))]
    if not ways:
        raise DoesNotFitError(f"an index of {load.kept:,.0f} entries does not fit a machine, or its network the writes")
    memory, binds, side = min(ways, key=lambda way: (way[0], way[2]))
    redis = _redis_machines(costs, load, machine, count, redis_replicas)
    api = _api_machines(costs, load, machine)
    each = costs.replica + index_bytes(costs, load) + banks_bytes(costs, load) / count
    return Plan(count, side, each, memory, redis, api, (memory + redis + api) * machine.price, binds)


def _memory_machines(costs: Costs, load: Load, machine: Machine, count: int, side: int) -> tuple[int, str] | None:
    """Machines for `count` replicas, `side` on each, and what decides it; None where that does not fit."""
    room = machine.ram * machine.full - side * (costs.replica + index_bytes(costs, load))
    read = load.writes * record_bytes(costs, load.entries) if costs.heard_s else 0.0
    network = machine.network * machine.busy - side * read
    if room <= 0 or network <= 0:
        return None
    by_cpu, by_ram = math.ceil(count / side), math.ceil(banks_bytes(costs, load) / room)
    by_network = math.ceil(load.requests * costs.wire_memory / network)
    most = max(by_cpu, by_ram, by_network)
    if by_cpu == most:
        return most, "cpu" if side in (machine.cores, count) else "ram"
    return most, "ram" if by_ram == most else "network"


def _redis_machines(costs: Costs, load: Load, machine: Machine, listeners: int, replicas: int) -> int:
    each = record_bytes(costs, load.entries)
    by_ram = load.users * each * (1 + replicas) / (machine.ram * machine.full)
    of_a_write = costs.redis_write_s + listeners * costs.redis_heard_s
    cpu_s = load.requests * costs.redis_request_s + load.writes * of_a_write
    read = load.writes * each * (listeners if costs.heard_s else 0)
    return math.ceil(max(by_ram, cpu_s / (machine.cores * machine.busy), read / (machine.network * machine.busy)))


def _api_machines(costs: Costs, load: Load, machine: Machine) -> int:
    by_cpu = load.requests * costs.api_s / (machine.cores * machine.busy)
    moved = load.requests * (costs.wire_memory + costs.wire_caller)
    return max(1, math.ceil(max(by_cpu, moved / (machine.network * machine.busy))))


NOTHING = Costs(*(0.0,) * 16)
