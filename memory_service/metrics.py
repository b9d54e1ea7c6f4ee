"""Prometheus metrics of the memory service. A registry of its own, so that several apps fit in one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

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
        self.entropy = Distribution(
            "ramrec_memory_entropy", "Entropy of users asked about", [n / 10 for n in range(1, 11)]
        )
        self.k = Distribution(
            "ramrec_memory_k", "Adaptive K of users asked about", (0, 1, 2, 3, 5, 8, 10, 12, 15, 20, 30, 50, 100)
        )
        for one in (self.entropy, self.k):
            self.registry.register(one)


class Distribution:
    """A Prometheus histogram that takes whole arrays: a retrieval observes a number for each of its users."""

    def __init__(self, name: str, about: str, buckets: Sequence[float]) -> None:
        self._name, self._about, self._bounds = name, about, np.array(buckets, float)
        self._counts = np.zeros(len(buckets) + 1, np.int64)
        self._sum = 0.0

    def observe(self, values: ArrayLike) -> None:
        """Count values; each belongs to the first bucket whose bound it does not exceed."""
        real = np.asarray(values, float)
        self._counts += np.bincount(np.searchsorted(self._bounds, real), minlength=len(self._counts))
        self._sum += float(real.sum())

    def collect(self) -> Iterable[Metric]:
        """What a scrape shows."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._about)
        family.add_metric([], list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True)), self._sum)
        yield family
