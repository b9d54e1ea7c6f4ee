"""Prometheus metrics of the memory service. A registry of its own, so that several apps fit in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Everything that `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ramrec_memory_requests", "Calls by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "ramrec_memory_seconds", "Time of a call", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.users = Counter("ramrec_memory_users_retrieved", "Users asked about", registry=self.registry)
        self.events = Counter("ramrec_memory_events_written", "Interactions written", registry=self.registry)
        self.resident = Gauge("ramrec_memory_resident_users", "Banks in memory", registry=self.registry)
        self.collective = Gauge(
            "ramrec_memory_collective_entries", "Entries in the collective index", registry=self.registry
        )
        self.redis_up = Gauge("ramrec_memory_redis_up", "1 while Redis answers", registry=self.registry)
        self.entropy = Histogram(
            "ramrec_memory_entropy",
            "Entropy of users asked about",
            buckets=[n / 10 for n in range(1, 11)],
            registry=self.registry,
        )
        self.k = Histogram(
            "ramrec_memory_k",
            "Adaptive K of users asked about",
            buckets=(0, 1, 2, 3, 5, 8, 10, 12, 15, 20, 30, 50, 100),
            registry=self.registry,
        )
