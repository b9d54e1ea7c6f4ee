"""Prometheus metrics of the memory service, in a registry of their own, so that one process can have several apps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
K = (0, 1, 2, 3, 5, 8, 10, 12, 15, 20, 30, 50, 75, 100)


class Metrics:
    """Everything that `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "ramrec_memory_requests", "Calls by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "ramrec_memory_seconds", "Time of a call", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.users = Counter("ramrec_memory_users_retrieved", "Users asked about", registry=self.registry)
        self.events = Counter("ramrec_memory_events_written", "Interactions written", registry=self.registry)
        self.pruned = Total("ramrec_memory_entries_pruned", "Entries that writes pushed out of full banks")
        self.conflicts = Counter(
            "ramrec_memory_write_conflicts", "Users' writes that lost against another writer", registry=self.registry
        )
        self.ready = Gauge("ramrec_memory_ready", "1 while Redis answers and all is loaded", registry=self.registry)
        self.redis_up = Gauge("ramrec_memory_redis_up", "1 while Redis answers", registry=self.registry)
        self.redis_seconds = Gauge(
            "ramrec_memory_redis_ping_seconds", "Time of the last ping that Redis answered", registry=self.registry
        )
        self.primaries_lost = Gauge(
            "ramrec_memory_redis_primaries_lost", "Primaries of a Redis Cluster out of reach", registry=self.registry
        )
        self.unreplicated = Total(
            "ramrec_memory_redis_unreplicated_writes",
            "Batches of writes kept by a primary alone, which had no replica to confirm them",
        )
        self.replicas = Gauge(
            "ramrec_memory_replicas", "Replicas that are there, as this one sees it", registry=self.registry
        )
        self.lapses = Total(
            "ramrec_memory_lapses", "Times that this replica was silent for so long that it counted as gone"
        )
        self.resident = Gauge("ramrec_memory_resident_users", "Banks in memory", registry=self.registry)
        self.collective = Gauge(
            "ramrec_memory_collective_entries", "Entries in the collective index", registry=self.registry
        )
        self.collective_users = Gauge(
            "ramrec_memory_collective_users", "Users with entries in the collective index", registry=self.registry
        )
        self.recall = Gauge(
            "ramrec_memory_collective_recall",
            "Share of the 20 nearest entries that the collective index finds, as last measured; NaN before",
            registry=self.registry,
        )
        self.recall.set(math.nan)
        self.measured_at = Gauge(
            "ramrec_memory_collective_recall_timestamp_seconds", "When that was, 0 before", registry=self.registry
        )
        self.model = Gauge(
            "ramrec_memory_model",
            "1 for the model that serves, and for the one wanted",
            ["role", "version"],
            registry=self.registry,
        )
        self.model_trouble = Gauge(
            "ramrec_memory_model_trouble", "1 while a model that Redis names cannot be loaded", registry=self.registry
        )
        self.bank_size = Distribution(
            "ramrec_memory_bank_size",
            "Entries in the banks of users asked about",
            (0, 1, 2, 5, 10, 20, 30, 50, 75, 100),
        )
        self.entropy = Distribution(
            "ramrec_memory_entropy", "Entropy of users asked about", [n / 10 for n in range(1, 11)]
        )
        self.k = Distribution("ramrec_memory_k", "Adaptive K of users asked about", K)
        self.collective_k = Distribution(
            "ramrec_memory_collective_k", "Others' entries wanted for users asked about", K
        )
        totals, spreads = (
            (self.pruned, self.unreplicated, self.lapses),
            (self.bank_size, self.entropy, self.k, self.collective_k),
        )
        for one in (*totals, *spreads):
            self.registry.register(one)


class Total:
    """A Prometheus counter whose `value` is counted elsewhere."""

    def __init__(self, name: str, about: str) -> None:
        self._name, self._about, self.value = name, about, 0

    def collect(self) -> Iterable[Metric]:
        """What Prometheus reads."""
        yield CounterMetricFamily(self._name, self._about, self.value)


class Distribution:
    """A Prometheus histogram that observes whole arrays: a retrieval has one value for each of its users."""

    def __init__(self, name: str, about: str, buckets: Sequence[float]) -> None:
        self._name, self._about, self._bounds = name, about, np.array(buckets, float)
        self._counts = np.zeros(len(buckets) + 1, np.int64)
        self._sum = 0.0

    def observe(self, values: ArrayLike) -> None:
        """Count each value in the first bucket whose bound it does not exceed."""
        real = np.asarray(values, float)
        self._counts += np.bincount(np.searchsorted(self._bounds, real), minlength=len(self._counts))
        self._sum += float(real.sum())

    def collect(self) -> Iterable[Metric]:
        """What Prometheus reads."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._about)
        family.add_metric([], list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True)), self._sum)
        yield family
