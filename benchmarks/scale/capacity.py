"""What a cluster needs, as pure functions of measured costs: bytes, CPU seconds, machines, money, and what ends first.

Units: bytes, seconds, requests a second. Own scope and writes divide by user. The collective scope does not: the owner
asks every other replica with the same query, and each looks through its part of every probed list. So a request costs
each of n replicas a fixed part (a call, the choice of lists), and all together the entries of the probed lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GIB = 2.0**30


@dataclass(frozen=True)
class Costs:
    """What one unit costs; measured (`benchmarks/scale/results.json`, `benchmarks/serving/results.json`)."""

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
    """CPU of the owner for a request without the collective scope."""
    call_s: float
    """CPU of a replica for a query of the collective scope, whatever it holds: the call itself."""
    list_s: float
    """CPU of comparing a query with one centroid."""
    entry_s: float
    """CPU of looking at one entry of a probed list."""
    api_s: float
    """CPU of the api for a request to a single memory service."""
    merge_s: float
    """CPU of the api for each further replica: its call, and merging."""
    wire_own: float
    """Bytes between api and owner for a request."""
    wire_part: float
    """Bytes between api and each other replica."""
    wire_caller: float
    """Bytes between caller and api."""


@dataclass(frozen=True)
class Load:
    """What is asked of the cluster. `entries`: memories of a user on average; `active`: share of the users who are
    resident; `lists`, `probes`: of the collective index.
    """

    users: float
    entries: float
    requests: float
    active: float = 1.0
    lists: int = 6000
    probes: int = 16


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
    """Share of the CPU that may be used, so that latency stays low."""
    full: float = 0.75
    """Share of the RAM that may be used."""


@dataclass(frozen=True)
class Plan:
    """Machines of each kind of process. `copies`: of the memory tier, each of `replicas` that share all users;
    `side_by_side`: replicas on a machine, fewer than its cores where RAM or the work of asking many is dearer.
    """

    replicas: int
    copies: int
    side_by_side: int
    memory_machines: int
    redis_machines: int
    api_machines: int
    price_hour: float
    binds: str
    """What decides the number of memory replicas: ram or cpu."""
    fan_out_limit: float
    """Requests a second that one copy cannot pass, whatever its size: each asks every replica."""

    @property
    def machines(self) -> int:
        """All."""
        return self.memory_machines + self.redis_machines + self.api_machines


def own_scope_only(costs: Costs) -> Costs:
    """The same where nobody is asked for others' memories: the collective scope switched off."""
    return replace(costs, shared_entry=0.0, call_s=0.0, list_s=0.0, entry_s=0.0, merge_s=0.0, wire_part=0.0)


def redis_bytes(costs: Costs, users: float, entries: float) -> float:
    """Records of users in Redis, without replicas.

    >>> redis_bytes(replace(NOTHING, redis_user=100.0, redis_entry=10.0), users=2, entries=5)
    300.0
    """
    return users * (costs.redis_user + costs.redis_entry * entries)


def memory_bytes(costs: Costs, load: Load, replicas: int = 1) -> float:
    """All memory replicas together: resident banks and the collective index, each once, and the processes."""
    banks = load.users * load.active * costs.resident_user
    return replicas * costs.replica + banks + load.users * load.entries * costs.shared_entry


def fan_out_s(costs: Costs, load: Load) -> float:
    """CPU of each replica for any request of the cluster, whatever the replica holds."""
    return costs.call_s + costs.list_s * load.lists


def scan_s(costs: Costs, load: Load, replicas: int = 1) -> float:
    """CPU of one replica for looking through its part of the probed lists."""
    return costs.entry_s * load.users * load.entries * load.probes / load.lists / replicas


def memory_s(costs: Costs, load: Load, replicas: int = 1) -> float:
    """CPU of all memory replicas together for a request."""
    return costs.own_s + replicas * (fan_out_s(costs, load) + scan_s(costs, load, replicas))


def api_s(costs: Costs, replicas: int = 1) -> float:
    """CPU of the api for a request."""
    return costs.api_s + (replicas - 1) * costs.merge_s


def wire_bytes(costs: Costs, replicas: int = 1) -> float:
    """Bytes that a request moves between api and memory replicas."""
    return costs.wire_own + (replicas - 1) * costs.wire_part


def fan_out_limit(costs: Costs, load: Load, machine: Machine) -> float:
    """Requests a second at which every replica is busy with the fixed part alone: more replicas do not help."""
    each = fan_out_s(costs, load)
    return machine.busy / each if each else math.inf


def best_lists(costs: Costs, load: Load, replicas: int) -> int:
    """Lists for which all replicas together do least: as much time for centroids as for entries."""
    entries = load.users * load.entries
    return max(load.probes, round(math.sqrt(costs.entry_s * entries * load.probes / (costs.list_s * replicas))))


def replicas_needed(costs: Costs, load: Load, machine: Machine, side_by_side: int) -> tuple[int, str]:
    """Memory replicas of one copy, and what decides it. Raises ValueError from the fan-out limit on."""
    for_each = machine.ram * machine.full / side_by_side - costs.replica
    by_ram = max(1, math.ceil(memory_bytes(costs, load, 0) / for_each))
    spare = machine.busy - load.requests * fan_out_s(costs, load)
    if spare <= 0:
        raise ValueError(f"{load.requests:,.0f} requests a second are beyond the fan-out limit")
    divided = load.requests * (costs.own_s + scan_s(costs, load))
    by_cpu = max(1, math.ceil(divided / spare))
    return max(by_ram, by_cpu), "ram" if by_ram >= by_cpu else "cpu"


def plan(costs: Costs, load: Load, machine: Machine, redis_replicas: int = 1) -> Plan:
    """The cheapest way: how many copies of the memory tier, and how many replicas on a machine."""
    least = math.floor(load.requests / fan_out_limit(costs, load, machine)) + 1
    sides = [side for side in (1, 2, 4, 8, 16, 32, 64) if side <= machine.cores]
    ways = ((least + more, side) for more in range(100) for side in sides)
    found = [_way(costs, load, machine, redis_replicas, copies, side) for copies, side in ways]
    return min(found, key=lambda one: (one.machines, one.copies, one.replicas))


def _way(costs: Costs, load: Load, machine: Machine, redis_replicas: int, copies: int, side_by_side: int) -> Plan:
    replicas, binds = replicas_needed(costs, replace(load, requests=load.requests / copies), machine, side_by_side)
    memory = math.ceil(copies * replicas / side_by_side)
    kept = redis_bytes(costs, load.users, load.entries) * (1 + redis_replicas)
    redis = math.ceil(kept / (machine.ram * machine.full))
    by_cpu = load.requests * api_s(costs, replicas) / (machine.cores * machine.busy)
    by_network = load.requests * (wire_bytes(costs, replicas) + costs.wire_caller) / (machine.network * machine.busy)
    api = math.ceil(max(by_cpu, by_network))
    limit, price = fan_out_limit(costs, load, machine), (memory + redis + api) * machine.price
    return Plan(replicas, copies, side_by_side, memory, redis, api, price, binds, limit)


NOTHING = Costs(*(0.0,) * 14)
